"""Random command lines over all flags end in a plan or in one sentence, never in a traceback."""

import dataclasses
import time
import types
import typing

import pytest
from binaries import call, one_sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.building.config import Config
from experiments.planning.options import Options
from jaxlocal.methods import METHODS

pytestmark = pytest.mark.slow

EXAMPLES = 300
SLOWEST = 20.0  # seconds of one plan on a busy machine
WHOLE = [*("-1", "0", "1", "2", "3", "4", "7", "8", "64", "1000", "2147483648", "1" * 30, "1e6")]
REAL = ["-1", "0", "-0.0", "1e-320", "0.05", "0.5", "1", "1.5", "1e30", "1e309", "nan", "-inf"]
WORDS = ["", " ", "abc", "½", "\0", "\n", "\ud800", "a" * 5000, "../x", "~nobody/x", "gs://a/b"]
COMPRESSORS = [
    *("identity", "zero", "grbs:4", "random_k:2", "top_k:4:chunk", "top_k:4+int8", "sign", "int8"),
    *("qsgd:4", "powersgd:2", "grbs:0", "powersgd:-1", "top_k:nan", "grbs:1e400", "sign+sign"),
]
OF = {
    "method": list(METHODS),
    "period": ["constant", "quadratic", "linear", "cubic", "post_local", "swap"],
    "schedule": ["constant", "cosine", "linear", "step", "cosine_step"],
    "rates": ["1", "0.5", "0.5,1", "nan", "1,", ",", "full", "slow_one", "straggler", "1e-300"],
    "worker_weights": ["uniform", "data", "1,2", "nan", "1e308,1e308", "0", "-1,1"],
    "hub_graph": ["complete", "ring", "path", "star", "erdos_renyi:0.9:1", "erdos_renyi:nan:x"],
    "mesh": ["1x1", "2x4", "axb", "0x1", "1x1x2", "999999x999999", "1x-1"],
    "partition": ["iid", "fresh", "sorted", "sorted:nan", "dirichlet:0", "unequal"],
    "dataset": ["digits", "least_squares", "perceptron", "two_quadratics:3", "docstrings", "mnist"],
    "model": ["logistic", "linear", "mlp", "mll_cnn", "small_transformer"],
    "optimizer": ["sgd", "nesterov", "adam", "adamw", "lamb", "lion", "rmsprop", "adagrad"],
    "outer_optimizer": ["sgd", "nesterov", "adam"],
    "optimizer_state": ["keep", "average", "reset"],
    "model_state": ["keep", "average", "reestimate"],
    "worker_map": ["vmap", "map", "blocks:2", "blocks:0", "blocks:-1"],
    "augment": ["none", "crop", "crop:99", "flip", "crop,flip", "crop:-1"],
    "precision": ["float32", "bfloat16"],
    **dict.fromkeys(("gradient_compressor", "reset_compressor", "sync_compressor"), COMPRESSORS),
    "all_reduce": ["ring", "halving_doubling", "server"],
    "format": ["text", "json"],
}  # fmt: skip


def kinds():
    """The type of every flag of plan."""
    hints = typing.get_type_hints(Config) | typing.get_type_hints(Options)
    named = [f.name for f in dataclasses.fields(Config)] + list(Options._fields)
    inner = lambda hint: typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    return {name: inner(hints[name]) for name in named} | {"format": str}


def values(name, kind):
    """The values of a flag: mostly such as it takes, else of any kind."""
    usual = {int: ["1", "2", "4", "8"], float: ["0.05", "0.5"], bool: ["true", "false"], str: WORDS}
    edge = {int: WHOLE, float: REAL}.get(kind, OF.get(name, WORDS))
    fitting = st.sampled_from(OF.get(name, usual[kind]))
    other = st.sampled_from(WHOLE + REAL + WORDS) | st.text(max_size=9)
    return st.one_of(fitting, fitting, fitting, fitting, st.sampled_from(edge), other)


@st.composite
def command_lines(draw):
    """A method and some other flags, of a model without examples in half of the cases."""
    known = kinds()
    names = draw(st.lists(st.sampled_from(sorted(known)), max_size=5, unique=True))
    names = ["method", *(name for name in names if name != "method")]
    line = [f"--{name}={draw(values(name, known[name]))}" for name in names]
    return [*draw(st.sampled_from([["--parameters=640"], ["--model=logistic"]])), *line]


def test_a_command_line_is_planned_or_refused_in_one_sentence(times):
    statuses = []

    @settings(max_examples=EXAMPLES * times, deadline=None, suppress_health_check=list(HealthCheck))
    @given(command_lines())
    def plan(line):
        began = time.monotonic()
        done = call("plan", *line)
        assert time.monotonic() - began < SLOWEST
        statuses.append(done.status)
        if done.status:
            assert done.status == 2 and not done.out
            last = done.error.splitlines(keepends=True)[-1]  # warnings may come before
            assert one_sentence(last) and len(last) < 1500
        else:
            assert done.out

    plan()
    print({status: statuses.count(status) for status in sorted(set(statuses))})
    assert 0 in statuses and 2 in statuses
