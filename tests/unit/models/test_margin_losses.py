"""The perceptron loss and the squared hinge, by hand, and the perceptron algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal.data import load
from jaxlocal.errors import ConfigurationError
from jaxlocal.models import from_functions
from jaxlocal.models.margin_losses import MARGIN_LOSSES, margin_loss, margin_metrics

MODEL = from_functions(lambda key: jnp.zeros(2), lambda w, x, *_: x @ w)
BATCH = {
    "inputs": jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 1.0], [2.0, 0.5]]),
    "targets": jnp.array([1, 0, 0, 1], jnp.int32),
}
W = jnp.array([0.5, 0.25])  # logits 1, 1.25, 0.25 and 1.125; margins 1, -1.25, -0.25 and 1.125


@pytest.mark.parametrize(
    "name, losses, slopes",
    [
        ("perceptron", [0, 1.25, 0.25, 0], [0, -1, -1, 0]),
        ("squared_hinge", [0, 2.25**2, 1.25**2, 0], [0, -2 * 2.25, -2 * 1.25, 0]),
    ],
)
def test_values_and_gradients_by_hand(name, losses, slopes):
    metrics = margin_metrics(MODEL, lambda x: x, name)(W, {}, BATCH)
    np.testing.assert_allclose(metrics["loss"], losses)
    assert metrics["accuracy"].tolist() == [True, False, False, True]
    loss = margin_loss(MODEL, lambda x: x, name)
    value, gradient = jax.value_and_grad(lambda w: loss(w, {}, BATCH, None)[0])(W)
    assert float(value) == pytest.approx(np.mean(losses))
    sides = np.array([1, -1, -1, 1])
    expected = (np.array(slopes) * sides) @ np.asarray(BATCH["inputs"]) / 4
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_it_is_the_perceptron_algorithm_from_zero_weights():
    """Rosenblatt: w <- w + y x on a mistake, where a logit of 0 is one; it makes finitely many."""
    data = load("perceptron", seed=1)
    train = {name: values[:200] for name, values in data.train().items()}
    model = from_functions(lambda key: jnp.zeros(32), lambda w, x, *_: x @ w)
    loss = margin_loss(model, lambda x: x, "perceptron")
    step = jax.jit(lambda w, x, y: w - jax.grad(lambda w: loss(w, {}, batch_of(x, y), None)[0])(w))
    batch_of = lambda x, y: {"inputs": x[None], "targets": y[None]}
    mine, expected, mistakes = jnp.zeros(32), np.zeros(32), 0
    for x, y in zip(train["inputs"], train["targets"], strict=True):
        mine, side = step(mine, x, y), 2 * int(y) - 1
        if side * (x.astype(float) @ expected) <= 0:
            expected, mistakes = expected + side * x.astype(float), mistakes + 1
    np.testing.assert_allclose(mine, expected, atol=1e-4)
    # Novikoff: at most (largest norm / margin)² mistakes.
    assert 5 < mistakes <= (np.linalg.norm(train["inputs"], axis=1).max() / 0.5) ** 2


def test_the_hyperplane_of_the_dataset_has_no_loss():
    data = load("perceptron")
    for name in MARGIN_LOSSES:
        model = from_functions(lambda key: jnp.zeros(32), lambda w, x, *_: x @ w)
        metrics = margin_metrics(model, data.normalize, name)
        far = 2.001 * jnp.asarray(data.normal)  # of the margin 1 on examples at the distance 1/2
        train = jax.tree.map(jnp.asarray, data.train())
        assert float(metrics(far, {}, train)["loss"].max()) == 0


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ConfigurationError, match="unknown loss 'hinge'; known: perceptron, squ"):
        margin_loss(MODEL, lambda x: x, "hinge")
    two = from_functions(lambda key: jnp.zeros(2), lambda w, x, *_: x[:, :2])
    with pytest.raises(ConfigurationError, match=r"one logit for each .* got \[4, 2\] for targ"):
        margin_loss(two, lambda x: x, "perceptron")(W, {}, BATCH, None)
    batch = {**BATCH, "targets": jnp.array([1, 0, 0, 2], jnp.int32)}
    assert np.isnan(margin_metrics(MODEL, lambda x: x, "perceptron")(W, {}, batch)["loss"][3])
