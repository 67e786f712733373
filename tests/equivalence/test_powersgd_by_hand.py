"""PowerSGD with error feedback equals six lines of float64 NumPy, on several workers."""

import jax
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh
from jaxlocal.compression import powersgd

STEPS, WORKERS, SHAPE, RANK, RATE = 40, 4, (9, 7), 2, 0.1


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def powersgd_by_hand(gradients, model, right):
    """Algorithms 1 and 2 of Vogels et al., arXiv 1905.13727, with plain SGD: the models
    [steps, n, m], and the workers' errors [workers, n, m] at the end.

    gradients [steps, workers, n, m] do not depend on the model; `right` [m, rank] is the first Q.
    """
    models, errors = [], np.zeros(gradients.shape[1:])
    for gradient in gradients:
        moved = errors - RATE * gradient
        left = np.linalg.qr(np.mean(moved @ right, axis=0))[0]
        rights = np.swapaxes(moved, 1, 2) @ left
        right = np.mean(rights, axis=0)
        errors = moved - left @ np.swapaxes(rights, 1, 2)
        models.append(model := model + left @ right.T)
    return np.stack(models), errors


def test_ef_sgd_with_powersgd_equals_its_loop():
    """40 steps on different gradients for every worker, two workers on each of two devices."""
    random = np.random.default_rng(0)
    start = random.normal(size=SHAPE)
    # Columns that halve keep directions apart: between singular values that cross, a change of
    # 1e-15 in the gradients changes the models by up to 1e-10.
    gradients = random.normal(size=(STEPS, WORKERS, *SHAPE)) * 0.5 ** np.arange(SHAPE[1])
    loss = lambda params, batch, key: (params["w"] * batch).sum()  # its gradient is the batch
    method = jaxlocal.ef_sgd(jaxlocal.gradients(loss), optax.sgd(RATE), compressor=powersgd(RANK))
    layout = Layout(1, WORKERS)
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=(1, 2)))
    state, models = round_fn.init({"w": start}, jax.random.key(0)), []
    for gradient in gradients:
        state, _ = round_fn(state, gradient[None, None])  # [steps, hubs, workers, n, m]
        models.append(np.asarray(state.params["w"]))

    (first_right,) = powersgd(RANK).init({"w": start})[0].values
    expected, errors = powersgd_by_hand(gradients, start, np.asarray(first_right))
    # Float64 rounds at 1e-16, of numbers of size one.
    for worker in range(WORKERS):
        np.testing.assert_allclose(np.stack(models)[:, 0, worker], expected, rtol=0, atol=1e-12)
    assert np.abs(expected[-1] - start).max() > 0.3
    # Conservation: what was sent and what is left are all that the workers computed.
    total = expected[-1] - start + errors.mean(axis=0)
    np.testing.assert_allclose(total, -RATE * gradients.sum(axis=0).mean(axis=0), atol=1e-12)
