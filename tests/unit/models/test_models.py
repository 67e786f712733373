"""Each model is that of its paper: shapes, initial weights, forward pass; and clear errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxlocal.errors import ConfigurationError
from jaxlocal.models import MODELS, build, outputs_for
from jaxlocal.models.cnn import mll_cnn
from jaxlocal.models.resnet import Block, resnet18, small_resnet

KEY = jax.random.key(0)
CIFAR = (32, 32, 3)
LARGE = ("resnet18_imagenet", "resnet50", "resnet101", "resnet152", "wide_resnet_40", "vit")
ONE_OUTPUT = [name for name in MODELS if not name.startswith(LARGE) and "transformer" not in name]
BATCH_NORM = ("batch_norm", "wide_resnet_16_4")
CLASSIFIERS = [name for name in ONE_OUTPUT if name != "linear"]


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@functools.cache
def built(name, outputs):
    """A model for CIFAR images, and the shapes of its variables."""
    model = build(name, CIFAR, outputs)
    return model, jax.eval_shape(model.init, KEY)


def drawn(model):
    """Parameters of the model's shapes, drawn by NumPy, since JAX's draws take long to compile."""
    random = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(model.init, KEY)
    return jax.tree.map(lambda leaf: jnp.float32(random.normal(size=leaf.shape) * 0.1), shapes)


def outputs_of(model, params, inputs):
    return jax.jit(lambda *args: model.apply(*args, None, True)[0])(params, {}, inputs)


@pytest.mark.parametrize(
    ("name", "outputs"), [(name, 1) for name in ONE_OUTPUT] + [(name, 10) for name in CLASSIFIERS]
)
def test_every_model_has_the_shapes_of_its_docstring(name, outputs):
    model, (params, model_state) = built(name, outputs)
    inputs = jax.ShapeDtypeStruct((4, *CIFAR), jnp.float32)
    for train in (True, False):
        values, after = jax.eval_shape(
            lambda *args, train=train: model.apply(*args, train), params, model_state, inputs, KEY
        )
        assert values.shape == ((4,) if outputs == 1 else (4, outputs))
        assert after == model_state
    assert bool(model_state) == name.endswith(BATCH_NORM)
    leaves = jax.tree.leaves((params, model_state))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["logistic", "linear", "mlp"])
def test_models_for_any_input_take_vectors(name):
    model = build(name, (7,), 1)
    assert outputs_of(model, drawn(model), jnp.ones((3, 7))).shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("resnet18_layer", (8, 8, 3), 10), "did you mean 'resnet18_layer_norm'"),
        (("mll_cn", (8, 8, 3), 10), "did you mean 'mll_cnn'"),
        (("mll_cnn", (784,), 10), r"images \[height, width, channels\].* shape \(784,\)"),
        (("resnet18_group_norm", (28, 28), 10), r"images .* shape \(28, 28\)"),
        (("mll_cnn", (3, 8, 1), 10), "4 x 4 or more; these have 3 x 8"),
        (("mlp", (8,), 0), "1 output or more, got 0"),
        (("linear", (8,), 3), "1 output, got 3"),
    ],
)
def test_mistakes_are_errors(arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        build(*arguments)


def test_mistakes_in_a_norm_are_errors():
    with pytest.raises(ConfigurationError, match="did you mean 'layer'"):
        resnet18((8, 8, 3), 10, norm="layers")
    for build_one in (resnet18, small_resnet):
        with pytest.raises(ConfigurationError, match="32 groups do not divide a width of 8"):
            build_one((8, 8, 3), 10, norm="group", width=8)


def test_two_classes_take_one_logit():
    assert [outputs_for(classes) for classes in (2, 3, 10)] == [1, 3, 10]


@pytest.mark.parametrize(("name", "leaves"), [("logistic", 2), ("linear", 1)])
def test_linear_models_start_at_zero(name, leaves):
    params, _ = build(name, (4, 4, 1), 1).init(KEY)
    assert len(jax.tree.leaves(params)) == leaves
    assert not any(leaf.any() for leaf in jax.tree.leaves(params))


def test_logistic_is_affine_in_the_flattened_input():
    model = build("logistic", (2, 3, 1), 4)
    kernel = jnp.arange(24.0).reshape(6, 4)
    params = {"map": {"kernel": kernel, "bias": jnp.ones(4)}}
    inputs = jax.random.normal(KEY, (5, 2, 3, 1))
    values = outputs_of(model, params, inputs)
    np.testing.assert_allclose(values, inputs.reshape(5, 6) @ kernel + 1, rtol=1e-6)


def test_mlp_has_two_hidden_layers_of_128():
    params, _ = jax.eval_shape(build("mlp", (20,), 5).init, KEY)
    assert count(params) == (20 * 128 + 128) + (128 * 128 + 128) + (128 * 5 + 5)


def convolve(image, kernel, stride, pad):
    pads = ((pad, pad), (pad, pad))
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (stride,) * 2, pads, dimension_numbers=layout)


def dense(inputs, layer):
    return inputs @ layer["kernel"] + layer["bias"][None]


def wide(channels):
    """Values of the channels, for images."""
    return channels[None, None, None]


@pytest.mark.parametrize("shape", [(28, 28, 1), (7, 5, 3), (4, 4, 1)])
def test_mll_cnn_is_that_of_the_paper(shape):
    """Against the layers of the paper, written out in JAX and Flax."""
    inputs = jax.random.normal(KEY, (2, *shape))
    model = mll_cnn(shape, 62)
    params = drawn(model)
    hidden = inputs
    for name in ("first", "second"):
        hidden = convolve(hidden, params[name]["kernel"], 1, 2) + wide(params[name]["bias"])
        hidden = nnx.max_pool(nnx.relu(hidden), (2, 2), (2, 2))
    hidden = nnx.relu(dense(hidden.reshape(2, -1), params["hidden"]))
    expected = dense(hidden, params["logits"])
    np.testing.assert_allclose(outputs_of(model, params, inputs), expected, rtol=1e-4, atol=1e-4)


def test_number_of_parameters_of_mll_cnn_on_emnist():
    params, _ = jax.eval_shape(build("mll_cnn", (28, 28, 1), 62).init, KEY)
    convolutions = (25 * 1 * 10 + 10) + (25 * 10 * 20 + 20)
    assert count(params) == convolutions + (7 * 7 * 20 * 100 + 100) + (100 * 62 + 62)


def resnet_count(widths, blocks, channels, outputs):
    """Parameters of convolutions without bias, and two numbers for each channel of a norm."""
    conv = lambda side, ins, outs: side * side * ins * outs + 2 * outs
    total, ins = conv(3, channels, widths[0]), widths[0]
    for outs in widths:
        total += conv(3, ins, outs) + (2 * blocks - 1) * conv(3, outs, outs)
        total += conv(1, ins, outs) if ins != outs else 0
        ins = outs
    return total + ins * outputs + outputs


def test_number_of_parameters_of_resnets_on_cifar10():
    for norm in ("layer", "group", "batch"):
        _, (params, _) = built(f"resnet18_{norm}_norm", 10)
        assert count(params) == resnet_count((64, 128, 256, 512), 2, 3, 10) == 11_173_962
    for norm in ("layer", "batch"):
        _, (params, _) = built(f"small_resnet_{norm}_norm", 10)
        assert count(params) == resnet_count((16, 32, 64), 1, 3, 10)


def group_norm(groups):
    """Mean and variance of one example over height, width and the channels of a group."""

    def norm(images, layer, _):
        batch, height, width, channels = images.shape
        split = images.reshape(batch, height, width, groups, channels // groups)
        centred = split - split.mean((1, 2, 4), keepdims=True)
        deviation = jnp.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
        normed = (centred / deviation).reshape(images.shape)
        return normed * wide(layer["scale"]) + wide(layer["bias"])

    return norm


def batch_norm(train):
    """Mean and variance of a channel over the batch, or the running ones."""

    def norm(images, layer, running):
        mean, var = running["mean"], running["var"]
        if train:
            mean, var = images.mean((0, 1, 2)), images.var((0, 1, 2))
        normed = (images - wide(mean)) / wide(jnp.sqrt(var + 1e-5))
        return normed * wide(layer["scale"]) + wide(layer["bias"])

    return norm


def resnet_by_hand(norm, params, state, images):
    def normed(images, tree, running, name):
        return norm(images, tree[name], running.get(name))

    images = convolve(images, params["stem"]["kernel"], 1, 1)
    images = nnx.relu(normed(images, params, state, "norm"))
    for number in range(len(params["blocks"])):
        block = params["blocks"][str(number)]
        running = state.get("blocks", {}).get(str(number), {})
        stride = 2 if "conv_around" in block else 1
        inner = convolve(images, block["conv1"]["kernel"], stride, 1)
        inner = nnx.relu(normed(inner, block, running, "norm1"))
        inner = normed(convolve(inner, block["conv2"]["kernel"], 1, 1), block, running, "norm2")
        if stride == 2:
            images = convolve(images, block["conv_around"]["kernel"], stride, 0)
            images = normed(images, block, running, "norm_around")
        images = nnx.relu(inner + images)
    return dense(images.mean((1, 2)), params["logits"])


@pytest.mark.parametrize(
    ("model", "norm", "train"),
    [
        (resnet18((9, 8, 3), 10, "layer", width=4), group_norm(1), True),
        (small_resnet((9, 8, 3), 10, "group", width=32), group_norm(32), True),
        (small_resnet((9, 8, 3), 10, "batch", width=4), batch_norm(True), True),
        (small_resnet((9, 8, 3), 10, "batch", width=4), batch_norm(False), False),
    ],
    ids=["layer", "group", "batch", "batch in evaluation"],
)
def test_resnets_are_those_of_the_papers(model, norm, train):
    inputs = jax.random.normal(KEY, (2, 9, 8, 3))
    params = drawn(model)
    shapes = jax.eval_shape(model.init, KEY)[1]
    state = jax.tree.map(lambda leaf: jnp.linspace(0.5, 2, leaf.size, dtype=leaf.dtype), shapes)
    values, expected = jax.jit(  # together, since what they share is compiled once
        lambda params, state, inputs: (
            model.apply(params, state, inputs, None, train)[0],
            resnet_by_hand(norm, params, state, inputs),
        )
    )(params, state, inputs)
    # Up to 18 layers in float32, and variances of as few as 8 numbers.
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)


def test_batch_statistics_are_nine_parts_old_and_one_part_new():
    inputs = jax.random.normal(KEY, (4, 8, 8, 3))
    model = small_resnet((8, 8, 3), 10, "batch", width=4)
    params = drawn(model)
    state = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), jax.eval_shape(model.init, KEY)[1])
    for train, share in ((True, 0.1), (False, 0.0)):
        after = jax.jit(lambda train=train: model.apply(params, state, inputs, None, train)[1])()
        stem = np.asarray(convolve(inputs, params["stem"]["kernel"], 1, 1), np.float64)
        for name, new in (("mean", stem.mean((0, 1, 2))), ("var", stem.var((0, 1, 2)))):
            expected = (1 - share) * 2.0 + share * new
            np.testing.assert_allclose(after["norm"][name], expected, rtol=1e-5)


def test_resnet18_has_the_initial_weights_of_he():
    block = Block(64, 32, 1, "layer", nnx.Rngs(0))
    kernel = block.conv1.kernel[...]
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)  # of 18432 draws: 0.5 %
    assert (block.norm1.scale[...] == 1).all() and (block.norm1.bias[...] == 0).all()


def test_training_in_a_scan_lowers_the_loss():
    model = mll_cnn((8, 8, 3), 2)
    inputs, labels = jax.random.normal(KEY, (8, 8, 8, 3)), jnp.arange(8) % 2

    def loss(params):
        logits, _ = model.apply(params, {}, inputs, KEY, True)
        return -jax.nn.log_softmax(logits)[jnp.arange(8), labels].mean()

    def step(params, _):
        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), value

    _, losses = jax.jit(lambda params: lax.scan(step, params, length=40))(drawn(model))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 2
