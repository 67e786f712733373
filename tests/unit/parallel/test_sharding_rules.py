"""Rules of how a worker is sharded: by the largest dimension, or by the names of its parameters."""

import re

import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh
from jaxlocal.parallel import sharding

PARAMS = {"first": jnp.ones((12, 8)), "bias": jnp.ones(8), "second": jnp.ones((8, 4))}
GRAD_FN = jaxlocal.gradients(lambda params, batch, key: (batch @ params["first"]).mean())


def refused(sentence):
    return pytest.raises(ConfigurationError, match=re.escape(sentence))


def shapes_by(rule, mesh):
    """The shapes of a state whose workers are sharded by a rule on a mesh of a shape."""
    method = jaxlocal.diloco(GRAD_FN, optax.sgd(0.1, 0.9), period=4)
    layout = Layout(workers_per_hub=4)
    return RoundFn(method, layout, make_mesh(layout, shape=mesh), sharding=rule).shapes(PARAMS)


def test_fsdp_shards_the_largest_dimension_that_divides():
    rule = sharding.fsdp(4, least=0)
    shapes = {(3, 8, 16): 2, (8, 8): 0, (6, 4): 1, (5, 7): None, (): None, (12,): 0}
    for shape, place in shapes.items():
        assert tuple(rule("", shape)) == (() if place is None else (None,) * place + ("model",))
    assert sharding.fsdp(4, least=65)("", (8, 8)) == P()


def test_rules_by_name_shard_optimizer_states_and_memories_as_their_parameters():
    rule = sharding.by_name([("first", P(None, "model")), ("second", P("model")), ("", P())])
    state = shapes_by(rule, (1, 2, 4))
    wanted = {"first": [12, 2], "bias": [8], "second": [2, 4]}
    trace = state.opt_state[0].trace
    for tree, lead in ((state.params, [1, 2]), (trace, [1, 2]), (state.anchor, [])):
        for name, shape in wanted.items():
            assert list(tree[name].sharding.shard_shape(tree[name].shape)) == [*lead, *shape]
    outer = state.memory[1].single[0][0].trace
    assert outer["first"].sharding.spec == P(None, "model")


def test_rules_that_do_not_fit_are_refused():
    by_name = lambda pairs: shapes_by(sharding.by_name(pairs), (1, 1, 8))
    with refused("none of the patterns ['kernel'] is found in params/bias"):
        by_name([("kernel", P("model"))])
    with refused(
        f"params/first of shape (12, 8) cannot be sharded as {P('model')} over the 8 devices"
    ):
        by_name([("first", P("model")), ("", P())])
    for spec in (P(None, "model"), P("workers"), P("model", "model")):
        with refused(f"params/bias of shape (8,) cannot be sharded as {spec} over"):
            by_name([("bias", spec), ("", P())])
