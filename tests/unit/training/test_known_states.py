"""Which states a round function takes: none that was donated, and none of another one."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh, training
from jaxlocal.training import Evaluation, Reestimation
from jaxlocal.training.checkpoints import Checkpoints, export

LAYOUT = Layout(workers_per_hub=2)
PARAMS = {"w": jnp.ones(3), "b": jnp.zeros(())}
grad_fn = jaxlocal.gradients(lambda p, batch, key: jnp.square(p["w"].sum() + p["b"] - batch).sum())


def round_fn_of(method="local_sgd", layout=LAYOUT, devices=1, optimizer=None, **options):
    options = {"period": 2} | options
    method = getattr(jaxlocal, method)(grad_fn, optimizer or optax.sgd(0.1), **options)
    return RoundFn(method, layout, make_mesh(layout, jax.devices()[:devices]))


def start(round_fn, params=None, model_state=None):
    return round_fn.init(PARAMS if params is None else params, jax.random.key(0), model_state)


def refused(message):
    return pytest.raises(ConfigurationError, match=message)


ONES = np.ones((2, 1, 2), np.float32)
USES = {
    "a round": lambda f, s: f(s, ONES),
    "a round of a length": lambda f, s: f(s, ONES, length=2),
    "steps": lambda f, s: f.local_steps(s, ONES),
    "an end": lambda f, s: f.end_round(s),
    "the mean": lambda f, s: f.mean(s),
    "the distance": lambda f, s: f.consensus_distance(s),
    "an evaluation": lambda f, s: Evaluation(f, lambda p, m, batch: {"x": batch}, np.ones(4))(s),
    "statistics": lambda f, s: Reestimation(f, lambda p, m, batch: m, ONES)(s),
    "a run": lambda f, s: next(training.run(f, s, lambda start, steps: ONES, 2)),
}


@pytest.fixture(scope="module")
def used():
    """A round function on two devices, a state that it was given, and the next one."""
    round_fn = round_fn_of(devices=2)
    state = start(round_fn)
    return round_fn, state, round_fn(state, ONES)[0]


@pytest.mark.parametrize("use", USES)
def test_a_donated_state_is_refused_wherever_it_is_used(used, use):
    round_fn, state, after = used
    with refused("given to the round function before, which donates it: use the state that it ret"):
        USES[use](round_fn, state)
    with refused("which donates it"):  # one leaf is enough
        USES[use](round_fn, after._replace(params={**after.params, "w": state.params["w"]}))


def test_a_donated_state_is_neither_saved_nor_exported(used, tmp_path):
    _, state, after = used
    with Checkpoints(tmp_path / "saved") as checkpoints:
        for donated in (state, after._replace(params=state.params)):
            with refused("which donates it"):
                checkpoints.save(donated)
        assert not checkpoints.steps
    with refused("which donates it"):
        export(tmp_path / "export", state.params, {})
    assert not (tmp_path / "export").exists()


def test_one_array_in_two_leaves_is_refused_with_both_names(used):
    """JAX ends the process where it is donated twice on two devices."""
    round_fn, _, state = used
    params = state.params
    shared = state._replace(params={**params, "w": params["b"]})
    for use in ("a round", "steps", "an end", "a run"):
        with refused("^params/b and params/w of this state are one array, which .* by jax.numpy.c"):
            USES[use](round_fn, shared)
    adam = round_fn_of(optimizer=optax.adam(0.1), devices=2)
    state = start(adam)
    moments = state.opt_state[0]
    reset = lambda nu: state._replace(opt_state=(moments._replace(nu=nu), *state.opt_state[1:]))
    with refused("opt_state/0/mu/b and opt_state/0/nu/b of this state are one array"):
        adam(reset(moments.mu), ONES)
    adam(reset(jax.tree.map(jnp.copy, moments.mu)), ONES)


ENDS_THE_PROCESS = """
import jax, jax.numpy as jnp, jaxlocal, optax
jax.config.update("jax_num_cpu_devices", 2)
grad_fn = jaxlocal.gradients(lambda w, batch, key: (w * batch).sum())
method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1))
round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
state = round_fn.init(jnp.ones(3), jax.random.key(0))
for _ in range(2):
    round_fn(state, jnp.ones((1, 1, 2, 3)))
"""


@pytest.mark.slow
def test_a_donated_state_on_two_devices_is_an_error_and_no_crash():
    done = subprocess.run(
        [sys.executable, "-c", ENDS_THE_PROCESS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "ConfigurationError: this state was given" in done.stderr


def test_an_end_that_takes_no_steps_is_given_none(used):
    round_fn, _, state = used
    with refused("takes 0 steps, got batches of 2"):
        round_fn.end_round(state, ONES)


def test_a_refused_round_leaves_the_state_as_it_is():
    round_fn = round_fn_of()
    state = start(round_fn)
    for wrong in (np.ones((3, 1, 2)), np.ones((2, 1, 3))):
        with pytest.raises(ConfigurationError):
            round_fn(state, wrong)
    round_fn.check(state)


def test_states_of_other_methods_are_refused_with_the_first_leaf_that_differs():
    local, diloco = round_fn_of(), round_fn_of("diloco")
    adam = round_fn_of(optimizer=optax.adam(0.1))
    like = "this state must be like one of this method: "
    with refused(like + r"anchor/b is float32\[\] there, and nothing here"):
        diloco(start(local), ONES)
    with refused(like + r"anchor/b is nothing there, and float32\[\] here"):
        local(start(diloco), ONES)
    with refused(like + r"opt_state/0/count is int32\[1, 2\] there, and nothing here"):
        adam(start(local), ONES)
    fragments = round_fn_of("streaming_diloco", period=4, delay_steps=1)
    with refused(like + r"memory/outer/\S+ is \w+\[\] there, and"):
        fragments(start(diloco), ONES)
    other = round_fn_of("diloco", outer_optimizer=optax.sgd(0.1))
    for one, state in [(diloco, start(other)), (other, start(diloco))]:
        with refused(like + "memory/outer/"):
            one(state, ONES)


def test_states_of_other_layouts_are_refused_with_both_shapes():
    four = round_fn_of(layout=Layout(workers_per_hub=4))
    state = start(four)
    message = r"params/b of this state has shape \(1, 4\), and 1 hubs of 2 workers need \(1, 2\)"
    for use in USES.values():
        with refused(message):
            use(round_fn_of(), state)


def test_states_on_other_devices_are_refused_with_both_and_can_be_moved():
    one, two = round_fn_of(), round_fn_of(devices=2)
    state = start(one)
    for use in USES.values():
        with refused("lies on .*0, and the mesh of this round function has .*0, .*1; move it by"):
            use(two, state)
    moved = jax.device_put(state, jax.tree.map(lambda x: x.sharding, two.shapes(PARAMS)))
    state, _ = two(moved, ONES)
    assert int(state.step) == 2


def test_what_is_no_state_is_refused():
    round_fn = round_fn_of()
    state = start(round_fn)
    for wrong in (PARAMS, None, (state, None)):
        with refused(f"takes the TrainState that its init makes, got {type(wrong).__name__}"):
            round_fn(wrong, ONES)
    keys = jax.random.split(state.key)
    for change, message in [
        ({"step": jnp.zeros(())}, r"step is int32\[\] there, and float32\[\] here"),
        ({"step": jnp.zeros(1, jnp.int32)}, r"step is int32\[\] there, and int32\[1\] here"),
        ({"key": keys}, r"key is key<fry>\[\] there, and key<fry>\[2\] here"),
        ({"key": jax.random.key_data(state.key)}, r"key is key<fry>\[\] there, and uint32\[2\]"),
        ({"params": {}}, "a model needs parameters"),
    ]:
        with refused(message):
            round_fn(state._replace(**change), ONES)
    other_kind, _ = round_fn(round_fn.init(PARAMS, jax.random.key(0, impl="rbg")), ONES)
    assert int(other_kind.step) == 2


def test_a_number_in_place_of_a_stacked_leaf_is_refused_with_both_shapes():
    round_fn = round_fn_of(optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    state = start(round_fn)
    rates = {"learning_rate": 0.5}
    changed = state._replace(opt_state=state.opt_state._replace(hyperparams=rates))
    with refused(
        r"opt_state/hyperparams/learning_rate is float32\[1, 2\] there, and float32\[\] h"
    ):
        round_fn(changed, ONES)
    stacked = {"learning_rate": jnp.full((1, 2), 0.5)}
    state = state._replace(opt_state=state.opt_state._replace(hyperparams=stacked))
    state, _ = round_fn(state, ONES)
    np.testing.assert_array_equal(state.opt_state.hyperparams["learning_rate"], 0.5)


def test_a_state_of_the_same_form_is_taken_from_wherever_it_comes():
    """From a round function of another period, another size of the model, or numpy arrays."""
    round_fn = round_fn_of()
    state, _ = round_fn(start(round_fn_of(period=5)), ONES)
    state, _ = round_fn(start(round_fn, {"w": jnp.ones(5), "b": jnp.zeros(())}), ONES)
    hosted = state._replace(params=jax.tree.map(np.asarray, state.params), step=2)
    hosted, _ = round_fn(hosted, ONES)
    assert int(hosted.step) == 4


def test_parts_of_a_model_are_checked_before_a_state_is_made():
    round_fn = round_fn_of()
    for nothing in ({}, None, {"layers": []}):
        with refused("a model needs parameters, got no array in params = "):
            round_fn.init(nothing, jax.random.key(0))
        with refused("a model needs parameters"):
            round_fn.shapes(nothing)
    with refused("the model state is a key; the arguments are params, key and model_state"):
        round_fn.init(PARAMS, {"mean": jnp.zeros(())}, jax.random.key(0))


def test_a_forgotten_model_state_is_asked_for():
    def loss(params, model_state, batch, key):
        return params * batch, ({"mean": model_state["mean"] + batch}, {})

    method = jaxlocal.local_sgd(jaxlocal.gradients(loss, stateful=True), optax.sgd(0.1))
    for given, known in [(None, "is empty"), ({"var": jnp.zeros(())}, "has var")]:
        round_fn = RoundFn(method, LAYOUT, make_mesh(LAYOUT, jax.devices()[:1]))
        state = round_fn.init(jnp.ones(()), jax.random.key(0), given)
        with refused(f"looks up 'mean', .* the model state, an argument of init, {known}"):
            round_fn(state, ONES[:1])
