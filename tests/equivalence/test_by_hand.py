"""Small runs whose numbers are derived on paper, and the two phases of post-local SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh

TWO = Layout(1, 2)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def squared_errors(params, batch, key):
    predictions = batch["inputs"] @ params["kernel"] + params["bias"]
    return jnp.mean((predictions - batch["labels"]) ** 2)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2)])
def test_diloco(mesh):
    """Two workers, mean squared error, SGD(0.1), H = 3, outer SGD(1, 0.9, Nesterov).

    A linear model from kernel (k, l) = (2, 1), bias b = 1. The gradient of ½(e_1² + e_2²) by k, l
    and b is the error of input (1, 0), that of input (0, 1), and their sum.

    Worker 1 has errors (l + b − 1, k + b − 2) = (1, 1). A step takes 0.1 of an error off k and l
    each and 0.2 off b, and leaves 1 − 0.3 of it: errors 1, .7, .49, losses 1, .49, .2401. Three
    steps take .1 (1 + .7 + .49) = .219 off k and l, and .438 off b.

    Worker 2 has errors (k + b − 2, l + b − 3) = (1, −1), whose sum is zero. A step takes 0.1 off k,
    adds 0.1 to l, and leaves 1 − 0.1 of an error: errors 1, .9, .81, losses 1, .81, .6561. Three
    steps take .1 (1 + .9 + .81) = .271 off k and add it to l.

    The mean losses are 1, .65, .4481. The anchor minus the mean of the models is
    d = (.219 + .271, .219 − .271, .438) / 2 = (.245, −.026, .219). The first Nesterov step moves
    the anchor by −(1 + 0.9) d = (−.4655, +.0494, −.4161), to (1.5345, 1.0494, .5839).

    There the errors are (.6333, .1184) and (.1184, −1.3667); the mean of their squares is .574244.
    """
    inputs = np.array([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    labels = np.array([[1.0, 2.0], [2.0, 3.0]])
    repeated = lambda x: np.broadcast_to(x, (4, 1, *x.shape))  # four steps, one hub
    batches = jax.tree.map(repeated, {"inputs": inputs, "labels": labels})
    method = jaxlocal.diloco(
        jaxlocal.gradients(squared_errors),
        optax.sgd(0.1),
        period=3,
        outer_optimizer=optax.sgd(1.0, momentum=0.9, nesterov=True),
    )
    round_fn = RoundFn(method, TWO, make_mesh(TWO, shape=mesh), max_chunk=1)
    start = {"kernel": np.array([2.0, 1.0]), "bias": np.array(1.0)}
    state = round_fn.init(start, jax.random.key(0))
    state, first = round_fn(state, problems.steps_of(batches, 0, 3))
    kernels, biases = np.asarray(state.params["kernel"]), np.asarray(state.params["bias"])
    _, second = round_fn.local_steps(state, problems.steps_of(batches, 3, 4))

    losses = np.concatenate([first.worker["loss"], second.worker["loss"]])
    np.testing.assert_allclose(losses[:3, 0, 0], [1, 0.49, 0.2401], rtol=1e-12)
    np.testing.assert_allclose(losses[:3, 0, 1], [1, 0.81, 0.6561], rtol=1e-12)
    np.testing.assert_allclose(losses[:3].mean(axis=(1, 2)), [1, 0.65, 0.4481], rtol=1e-12)
    np.testing.assert_allclose(kernels, [[[1.5345, 1.0494]] * 2], rtol=1e-12)
    np.testing.assert_allclose(biases, [[0.5839] * 2], rtol=1e-12)
    np.testing.assert_allclose(losses[3].mean(), 0.574244, atol=5e-7)  # six printed digits


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2)])
@pytest.mark.parametrize(
    ("delay_steps", "mixing_factor", "expected"),
    [
        (0, 0.0, (-59.0, -53.0)),
        (0, 0.5, (-40.25, -38.0)),
        (1, 0.0, (-47.0, -45.0)),
        (1, 0.5, (-35.75, -35.0)),
    ],
)
def test_streaming_diloco(delay_steps, mixing_factor, expected, mesh):
    """Two workers, two numbers from 1, gradient 2, SGD(1), outer SGD(2), H = 6, P = 2, 15 steps.

    A step takes 2 off each number x. A synchronisation moves its anchor y, from 1, by −2 (y − x) of
    τ steps ago, and x to α x + (1 − α) y. The first number is synchronised after steps 3, 9 and 15,
    the second after steps 6 and 12.

    τ = 0, α = 0, where x becomes y. The first: x = −5, y = 1 − 2·6 = −11; six steps on x = −23,
    y = −11 − 2·12 = −35; x = −47, y = −35 − 2·12 = −59. The second: x = −11, y = 1 − 2·12 = −23;
    x = −35, y = −23 − 2·12 = −47; three steps more −53.

    τ = 0, α = ½. The first: x = −5, y = −11, x ← −8; x = −20, y = −11 − 2·9 = −29, x ← −24.5;
    x = −36.5, y = −29 − 2·7.5 = −44, x ← −40.25. The second: x = −11, y = −23, x ← −17; x = −29,
    y = −23 − 2·6 = −35, x ← −32; −38.

    τ = 1, α = 0, with the x of one step before. The first: −3, y = 1 − 2·4 = −7; −17,
    y = −7 − 2·10 = −27; −37, y = −27 − 2·10 = −47. The second: −9, y = 1 − 2·10 = −19; −29,
    y = −19 − 2·10 = −39; −45.

    τ = 1, α = ½. The first: −3, y = −7, x ← (−5 − 7)/2 = −6; −16, y = −7 − 2·9 = −25,
    x ← (−18 − 25)/2 = −21.5; −31.5, y = −25 − 2·6.5 = −38, x ← (−33.5 − 38)/2 = −35.75. The second:
    −9, y = −19, x ← (−11 − 19)/2 = −15; −25, y = −19 − 2·6 = −31, x ← (−27 − 31)/2 = −29; −35.
    """
    method = jaxlocal.streaming_diloco(
        jaxlocal.gradients(lambda p, batch, key: 2 * (p["first"] + p["second"])),
        optax.sgd(1.0),
        period=6,
        outer_optimizer=optax.sgd(2.0),
        fragments=2,
        delay_steps=delay_steps,
        mixing_factor=mixing_factor,
    )
    round_fn = RoundFn(method, TWO, make_mesh(TWO, shape=mesh), max_chunk=1)
    state = round_fn.init({"first": 1.0, "second": 1.0}, jax.random.key(0))
    for _ in range(5):
        state, _ = round_fn(state, np.zeros((3, 1, 2)))
    assert int(state.step) == 15
    # All numbers are multiples of a quarter.
    np.testing.assert_array_equal(state.params["first"], [[expected[0]] * 2])
    np.testing.assert_array_equal(state.params["second"], [[expected[1]] * 2])


SWITCH, STEPS = 4, 8
FOUR = Layout(1, 4, weights=[1, 2, 3, 4])
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adam": optax.adam(0.05),
}


def in_rounds(method, batches, lengths, state=None):
    """The state after rounds of these lengths."""
    round_fn = problems.on_one_device(method, FOUR, max_chunk=1)
    state = round_fn.init(problems.START, jax.random.key(0)) if state is None else state
    for length in lengths:
        step = int(state.step)
        part = problems.steps_of(batches, step, step + length)
        state, _ = round_fn(state, part, length=length)
    return state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_phase_of_post_local_sgd_is_data_parallel_for_sgd_and_not_for_adam(name):
    """x − η Σ a_i g_i is the mean of x − η g_i, and the mean of momenta is the momentum of the mean
    gradient. The first step of Adam is the sign of the gradient; a mean of signs is no sign."""
    batches, optimizer = problems.make_batches(FOUR, SWITCH), OPTIMIZERS[name]
    method = jaxlocal.post_local_sgd(problems.grad_fn, optimizer, switch_step=SWITCH, local_steps=2)
    phase = problems.vectors(in_rounds(method, batches, [1] * SWITCH).params)
    parallel = jaxlocal.data_parallel(problems.grad_fn, optimizer)
    expected = problems.vectors(in_rounds(parallel, batches, [1] * SWITCH).params)
    if name == "adam":
        assert np.abs(phase - expected).max() > 0.01
    else:
        np.testing.assert_allclose(phase, expected, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_local_sgd_continues_from_the_state_of_data_parallel(name):
    """Post-local SGD as PyTorch has it: averaged gradients until the switch, then averaged models;
    every worker keeps the optimizer state that it has at the switch."""
    batches, optimizer = problems.make_batches(FOUR, STEPS), OPTIMIZERS[name]
    parallel = jaxlocal.data_parallel(problems.grad_fn, optimizer)
    local = jaxlocal.local_sgd(problems.grad_fn, optimizer, period=2)
    state = in_rounds(parallel, batches, [1] * SWITCH)
    state = in_rounds(local, batches, [2, 2], state)

    gradient, share = problems.numpy_gradient(batches), FOUR.weight[0]
    models = [np.append(problems.START["weight"], problems.START["bias"])] * 4
    states = [optimizer.init(model) for model in models]
    for step in range(STEPS):
        gradients = [gradient(i, models[i], step) for i in range(4)]
        if step < SWITCH:
            gradients = [share @ gradients] * 4
        for i in range(4):
            update, states[i] = optimizer.update(gradients[i], states[i], models[i])
            models[i] = models[i] + np.asarray(update)
        if step >= SWITCH and step % 2:
            models = [share @ models] * 4
    np.testing.assert_allclose(problems.vectors(state.params), models, rtol=1e-9, atol=1e-11)
