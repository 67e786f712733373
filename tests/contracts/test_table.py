"""The table of methods: what it records of each agrees with its code."""

import inspect
import re

import optax
import problems
import pytest

import jaxlocal
from jaxlocal import periods
from jaxlocal.compression import parse
from jaxlocal.methods import METHODS, table

SPECS = pytest.mark.parametrize("name", METHODS)
SHARED = ("model_state", "worker_map")


@SPECS
def test_a_method_takes_everything_but_gradient_and_optimizer_by_name(name):
    parameters = list(inspect.signature(METHODS[name].build).parameters.values())
    assert [p.name for p in parameters[:2]] == ["grad_fn", "optimizer"]
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert set(SHARED) <= {p.name for p in parameters[2:]}


@SPECS
def test_a_wrong_argument_is_refused_with_the_nearest(name):
    build = METHODS[name].build
    for slip, near in (("worker_mpa", "worker_map"), ("model_sate", "model_state")):
        with pytest.raises(TypeError, match=f"unknown argument of {name} '{slip}'.*'{near}'"):
            build(problems.grad_fn, optax.sgd(0.1), **{slip: None})
    with pytest.raises(jaxlocal.ConfigurationError, match="unknown argument.*'gradient_mixer'"):
        build(problems.grad_fn, optax.sgd(0.1), gradient_mixer=jaxlocal.mixing.mean())
    with pytest.raises(TypeError, match="by position and all else by name, got 3"):
        build(problems.grad_fn, optax.sgd(0.1), 4)


@SPECS
def test_every_method_is_public_and_documented(name):
    build = METHODS[name].build
    assert getattr(jaxlocal, name) is build and getattr(jaxlocal.methods, name) is build
    assert name in jaxlocal.__all__ and name in table.__all__
    text = inspect.getdoc(build)
    parts = ("Args:", "grad_fn", "optimizer", "Returns:", ">>> ")
    assert all(part in text for part in parts)
    assert "https://" in text or "Source: as" in text or name == "data_parallel"
    arguments = inspect.signature(build).parameters
    assert all(re.search(rf"\b{argument}\b", text) for argument in arguments)


@SPECS
def test_compressors_of_the_table_are_arguments_and_have_specs_that_parse(name):
    spec = METHODS[name]
    for kind, default in spec.compressors.items():
        assert kind in ("gradient", "reset", "sync")
        assert spec.takes(f"{kind}_compressor") or spec.takes("compressor")
        assert default is None or parse(default).name == default
    takes = any("compressor" in argument for argument in inspect.signature(spec.build).parameters)
    assert takes == bool(spec.compressors)


@SPECS
def test_what_else_the_table_records_agrees_with_the_signature(name):
    spec = METHODS[name]
    assert spec.takes("outer_optimizer") == (spec.outer_optimizer is not None)
    assert spec.takes("hub_period") == (spec.network == "hubs")
    assert (spec.takes("period") or spec.takes("hub_period")) != spec.own_period
    assert not spec.every_step or spec.own_period
    for argument in spec.own_options.values():
        assert spec.default(argument) is not inspect.Parameter.empty
    rules = ("constant", "quadratic", "linear", "cubic", "post_local", "swap")
    assert spec.period in rules and spec.network in ("", "hubs", "workers")


@pytest.mark.parametrize("name", ["slowmo", "diloco", "sparse_loco"])
def test_the_default_outer_optimizer_of_the_table_is_that_of_the_method(name):
    """The first two updates of what the table builds, against the documented optax optimizer."""
    documented = {
        "slowmo": optax.sgd(1.0, momentum=0.7),
        "diloco": optax.sgd(0.7, momentum=0.9, nesterov=True),
        "sparse_loco": optax.sgd(1.0),
    }[name]
    built = METHODS[name].outer_optimizer.build()
    states = [optimizer.init(1.0) for optimizer in (built, documented)]
    for gradient in (1.0, -3.0):
        updates, states = zip(
            *(o.update(gradient, s) for o, s in zip((built, documented), states, strict=True)),
            strict=True,
        )
        assert updates[0] == updates[1]


def test_the_table_lists_its_names_in_full():
    assert sorted(table.__all__) == sorted(["METHODS", *METHODS])


def test_a_rule_that_reads_another_schedule_than_the_optimizer_is_refused():
    optimizer = jaxlocal.scheduled(optax.sgd, optax.cosine_decay_schedule(0.5, 200))
    other = periods.qsr(optax.cosine_decay_schedule(0.4, 200), coefficient=1.0, base=4)
    same = periods.qsr(optax.cosine_decay_schedule(0.5, 200), coefficient=1.0, base=4)
    sentence = "the period reads the learning rate 0.4 at step 0, and the optimizer follows 0.5"
    with pytest.raises(jaxlocal.ConfigurationError, match=sentence):
        jaxlocal.local_sgd(problems.grad_fn, optimizer, period=other)
    assert jaxlocal.local_sgd(problems.grad_fn, optimizer, period=same).period is same
    own = periods.qsr(optimizer.learning_rate, coefficient=1.0, base=4)
    assert jaxlocal.local_sgd(problems.grad_fn, optimizer, period=own).period is own


def test_slowmo_reads_the_learning_rate_of_a_scheduled_optimizer_or_asks_for_it():
    with pytest.raises(jaxlocal.ConfigurationError, match="needs the learning rate"):
        jaxlocal.slowmo(problems.grad_fn, optax.sgd(0.1))
    assert jaxlocal.slowmo(problems.grad_fn, jaxlocal.scheduled(optax.sgd, 0.1)).outer.anchored
