"""Steps that send nothing: a worker takes all of them in turn, with the bits of step after step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn
from jaxlocal.stages.compose import AnySteps, repeat
from jaxlocal.stages.local_step import local_step
from jaxlocal.types import Method

LAYOUT = Layout(2, 4, rates=[0.5, 1, 0.7, 1])


def loss(params, batch, key):
    noise = jax.random.normal(key, ())
    return jnp.square(jnp.tanh(batch @ params["w"] + params["b"]) - 0.5 + 0.1 * noise).mean()


def trained(stage, steps, layout=LAYOUT):
    optimizer = optax.adam(0.1)
    sync = jaxlocal.local_sgd(jaxlocal.gradients(loss), optimizer, period=steps).outer
    apply = lambda *arguments: sync.apply(*arguments)  # a row for every worker, whatever the steps
    end = sync._replace(apply=apply)
    method = Method(stage, end, optimizer, jaxlocal.periods.constant(steps))
    round_fn = RoundFn(method, layout)
    params = {"w": jnp.linspace(-1, 1, 5), "b": jnp.zeros(())}
    state = round_fn.init(params, jax.random.key(3))
    random = np.random.default_rng(0)
    infos = []
    for _ in range(2):
        batches = random.normal(size=(steps, *layout.shape, 6, 5)).astype(np.float32)
        state, info = round_fn(state, batches)
        infos.append(info)
    return jax.tree.map(np.asarray, (state._replace(key=()), infos))


@pytest.mark.optimized
@pytest.mark.parametrize("mode", ["map", "vmap", "blocks:2"])
@pytest.mark.parametrize("rates", [LAYOUT.rates, 1.0])
def test_the_order_of_the_loops_changes_no_bit(mode, rates):
    layout = Layout(2, 4, rates=rates)
    stage = local_step(jaxlocal.gradients(loss), optax.adam(0.1), worker_map=mode)
    assert isinstance(stage.apply, AnySteps)
    in_order = stage._replace(apply=lambda *arguments: stage.apply(*arguments))
    assert not isinstance(in_order.apply, AnySteps)
    outermost, stepwise = trained(stage, 6, layout), trained(in_order, 6, layout)
    jax.tree.map(np.testing.assert_array_equal, outermost, stepwise)


def test_a_wrapped_stage_is_applied_once_for_each_step():
    stage, calls = local_step(jaxlocal.gradients(loss), optax.adam(0.1)), []

    def counted(state, memory, batches, context):
        calls.append(jax.tree.leaves(batches)[0].shape[0])
        return stage.apply(state, memory, batches, context)

    trained(repeat(stage._replace(apply=counted), 3), 6)
    assert set(calls) == {1}
