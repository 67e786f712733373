"""Models that lie on other devices than the mesh, and callers who work on another mesh."""

import functools

import jax
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh
from jaxlocal.training import Evaluation

LAYOUT = Layout(1, 4)
BATCHES = problems.make_batches(LAYOUT, 2)
DEVICES = np.array(jax.devices()[:8])


def refused(message):
    return pytest.raises(ConfigurationError, match=message)


@functools.cache
def round_fn():
    method = jaxlocal.local_sgd(problems.grad_fn, optax.sgd(0.1), period=2)
    return RoundFn(method, LAYOUT, make_mesh(LAYOUT, shape=(1, 2)))


def run(params, key, batches=BATCHES):
    """The average model and the consensus distance after a round."""
    state, _ = round_fn()(round_fn().init(params, key), batches)
    mean, distance = round_fn().mean(state)[0], round_fn().consensus_distance(state)
    return {**jax.tree.map(np.asarray, mean), "distance": np.asarray(distance)}


@pytest.fixture(scope="module")
def expected():
    return run(problems.START, jax.random.key(0))


PLACES = {
    "another device": DEVICES[7],
    "a device of the mesh": DEVICES[0],
    "another mesh": NamedSharding(Mesh(DEVICES, ("x",)), P()),
    "the same devices in another order": NamedSharding(Mesh(DEVICES[1::-1], ("x",)), P()),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["params", "key", "batches"])
def test_what_is_committed_elsewhere_is_moved(expected, what, place):
    given = {"params": problems.START, "key": jax.random.key(0), "batches": BATCHES}
    given[what] = jax.device_put(given[what], PLACES[place])
    jax.tree.map(np.testing.assert_array_equal, run(**given), expected)
    assert not any(x.is_deleted() for x in jax.tree.leaves(given) if isinstance(x, jax.Array))


MESHES = {
    "explicit": Mesh(DEVICES, ("x",), axis_types=(AxisType.Explicit,)),
    "of the same axes": Mesh(DEVICES[::-1].reshape(1, 8), ("hubs", "workers")),
    "one device": Mesh(DEVICES[5:6], ("model",)),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_round_runs_on_its_own_mesh_in_the_context_of_another(expected, mesh):
    with jax.set_mesh(MESHES[mesh]):
        params = jax.tree.map(jax.numpy.asarray, problems.START)  # on the devices of that mesh
        jax.tree.map(np.testing.assert_array_equal, run(params, jax.random.key(0)), expected)
        shapes = round_fn().shapes(problems.START)
        assert shapes.params["weight"].sharding.mesh == round_fn().mesh
        assert round_fn().lower(shapes, BATCHES)
        metrics = lambda params, model_state, batch: {"mean": batch}
        evaluation = Evaluation(round_fn(), metrics, np.arange(3.0))
        assert evaluation(round_fn().init(params, jax.random.key(0))) == {"mean": 1.0}


def test_inside_jit_the_mesh_that_is_set_is_that_of_the_round():
    state = round_fn().init(problems.START, jax.random.key(0))
    step = jax.jit(lambda state: round_fn()(state, BATCHES)[0])
    with (
        jax.set_mesh(MESHES["explicit"]),
        refused(r"of jax.set_mesh, .*'x', .* its own is .*'workers', 2"),
    ):
        step.eval_shape(state)
    with jax.set_mesh(round_fn().mesh):
        assert step.eval_shape(state).step.shape == ()


def test_a_mesh_of_jax_has_automatic_axes_in_a_round(expected):
    given = jax.make_mesh((1, 2), ("hubs", "workers"), devices=DEVICES[:2])
    assert given.axis_types == (AxisType.Explicit,) * 2
    own = RoundFn(round_fn().method, LAYOUT, given)
    state, _ = own(own.init(problems.START, jax.random.key(0)), BATCHES)
    assert own.mesh == round_fn().mesh
    jax.tree.map(np.testing.assert_array_equal, own.mean(state)[0]["bias"], expected["bias"])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("cpu", "made by jaxlocal.make_mesh or jax.make_mesh, got str"),
        (MESHES["explicit"], "has the axes hubs, workers and perhaps model, got x"),
        (Mesh(DEVICES.reshape(1, 2, 4), ("hubs", "workers", "x")), "got hubs, workers, x"),
        (MESHES["of the same axes"], "4 workers do not divide over 8 devices of .* 'workers'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with refused(message):
        RoundFn(round_fn().method, LAYOUT, mesh)
