"""CifarNet against NumPy: outputs, dropout, number of parameters, initial weights, workers."""

import jax
import numpy as np
import plain_networks as plain
import pytest

from jaxlocal.errors import ConfigurationError
from jaxlocal.models import build
from jaxlocal.models.cnn import cifarnet

KEY = jax.random.key(0)


def local_response_norm(x):
    """Channel by channel, from the equation."""
    normed = np.empty_like(x)
    for channel in range(x.shape[-1]):
        near = x[..., max(0, channel - 4) : channel + 5]
        scale = 1 + 0.001 / 9 * (near**2).sum(-1)
        normed[..., channel] = x[..., channel] / scale**0.75
    return normed


def by_hand(params, x):
    params, x = plain.in_float64(params), plain.in_float64(x)
    convolved = lambda x, layer: plain.relu(plain.convolve(x, layer["kernel"]) + layer["bias"])
    x = local_response_norm(plain.max_pool(convolved(x, params["first"]), 2, 2))
    x = plain.max_pool(local_response_norm(convolved(x, params["second"])), 2, 2)
    x = plain.relu(plain.dense(x.reshape(len(x), -1), params["hidden"]))
    x = plain.relu(plain.dense(x, params["last_hidden"]))
    return plain.dense(x, params["logits"])


@pytest.mark.parametrize("shape", [(12, 8, 3), (7, 5, 1)])
def test_it_is_that_of_tensorflow(shape):
    model = cifarnet(shape, 10)
    params = plain.drawn(plain.shapes_of(model)[0])
    # Large activations, so that the local response normalisation matters.
    inputs = 20 * plain.images(2, *shape)
    values = jax.jit(lambda *args: model.apply(*args, None, False)[0])(params, {}, inputs)
    expected = by_hand(params, inputs)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_number_of_parameters():
    params, model_state = plain.shapes_of(build("cifarnet", (32, 32, 3), 10))
    convolutions = (25 * 3 * 64 + 64) + (25 * 64 * 64 + 64)
    hidden = (8 * 8 * 64 * 384 + 384) + (384 * 192 + 192)
    assert plain.count(params) == convolutions + hidden + (192 * 10 + 10) == 1_756_426
    assert model_state == {}


@pytest.mark.slow
def test_dropout_depends_on_the_key_and_initial_weights_are_those_of_the_docstring():
    model = cifarnet((16, 16, 3), 10)
    params, _ = jax.jit(model.init)(KEY)
    cut = 0.8796  # the deviation of a standard normal number between -2 and 2
    for name, deviation in (("second", 0.05), ("hidden", 0.04), ("logits", 1 / 192)):
        kernel = params[name]["kernel"]
        assert kernel.std() == pytest.approx(cut * deviation, rel=0.06)  # of 1,920 draws: 1.6 %
        assert np.abs(kernel).max() <= 2 * deviation
    for name, bias in (("first", 0), ("hidden", 0.1), ("last_hidden", 0.1), ("logits", 0)):
        np.testing.assert_array_equal(params[name]["bias"], np.float32(bias))
    apply = jax.jit(lambda key: model.apply(params, {}, plain.images(2, 16, 16, 3), key, True)[0])
    first, again, other = map(apply, (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != other).any()


@pytest.mark.slow
def test_two_steps_of_workers_agree_under_vmap_and_map():
    model = cifarnet((8, 8, 3), 3)
    (start, by_vmap), (_, by_map) = (
        plain.two_steps(model, (8, 8, 3), 3, worker_map) for worker_map in ("vmap", "map")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        by_vmap.params,
        by_map.params,
    )
    moved = jax.tree.map(lambda new, old: np.abs(new[0, 0] - old).max(), by_map.params, start)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [((784,), r"cifarnet needs images .* shape \(784,\)"), ((8, 3, 3), "4 x 4 or more; .* 8 x 3")],
)
def test_mistakes_are_errors(shape, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        cifarnet(shape, 10)
