"""Residual networks against NumPy: numbers of parameters, outputs, statistics, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_networks as plain
import pytest

from jaxlocal.errors import ConfigurationError
from jaxlocal.models import build
from jaxlocal.models.imagenet_resnets import BLOCKS, imagenet_resnet
from jaxlocal.models.residual import (
    Bottleneck,
    PreactivatedBottleneck,
    Shape,
    residual_network,
)
from jaxlocal.models.wide_resnets import wide_resnet

TINY = Shape(Bottleneck, 4, [(16, 1), (32, 1)], large_images=True)
TINY_V2 = Shape(PreactivatedBottleneck, 4, [(16, 1), (32, 1)], preactivated=True, large_images=True)


@functools.cache
def sizes(name, shape, outputs):
    """Numbers of parameters and of running statistics of a model."""
    return tuple(map(plain.count, plain.shapes_of(build(name, shape, outputs))))


def wide_count(depth, k, classes):
    """Parameters of a wide ResNet, and the channels of its norms."""
    total, channels, ins = 3 * 3 * 3 * 16, 0, 16
    for outs in (16 * k, 32 * k, 64 * k):
        for number in range((depth - 4) // 6):
            total += 9 * ins * outs + 9 * outs * outs
            channels += ins + outs
            total += ins * outs if number == 0 and ins != outs else 0
            ins = outs
    channels += ins
    return total + 2 * channels + ins * classes + classes, channels


@pytest.mark.parametrize(
    ("depth", "k", "classes", "millions"), [(40, 8, 100, 35.8), (40, 8, 10, 35.7), (16, 4, 10, 2.7)]
)
def test_number_of_parameters_of_wide_resnets(depth, k, classes, millions):
    """The paper has 35.7 million for WRN-40-8 with 10 classes, and 2.7 million for WRN-16-4."""
    total, channels = wide_count(depth, k, classes)
    assert sizes(f"wide_resnet_{depth}_{k}", (32, 32, 3), classes) == (total, 2 * channels)
    assert round(total / 1e6, 1) == millions


def bottleneck_count(depth, preactivated, outputs=1000):
    """Parameters of a ResNet for ImageNet with bottlenecks, and the channels of its norms."""
    total, channels, ins = 7 * 7 * 3 * 64, 64, 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        inner = 64 * 2**stage
        for number in range(blocks):
            total += ins * inner + 9 * inner * inner + inner * 4 * inner
            channels += 2 * inner + (ins if preactivated else 4 * inner)
            if number == 0:
                total += ins * 4 * inner
                channels += 0 if preactivated else 4 * inner
            ins = 4 * inner
    channels += ins if preactivated else 0
    return total + 2 * channels + ins * outputs + outputs, channels


@pytest.mark.parametrize(
    ("name", "known"),
    [
        # PyTorch's table of pretrained models.
        ("resnet50", 25_557_032),
        pytest.param("resnet101", 44_549_160, marks=pytest.mark.slow),
        pytest.param("resnet152", 60_192_808, marks=pytest.mark.slow),
        # MXNet counts 25,595,060 with the running statistics, and with the norm of the input: four
        # numbers for each of three channels.
        ("resnet50_v2", 25_595_060 - 12 - 45_568),
    ],
)
def test_number_of_parameters_of_imagenet_resnets(name, known):
    total, channels = bottleneck_count(int(name[6:].removesuffix("_v2")), name.endswith("_v2"))
    assert sizes(name, (224, 224, 3), 1000) == (total, 2 * channels)
    assert total == known


def test_number_of_parameters_of_resnet18_for_imagenet():
    """It differs from ResNet-18 for small images, with 11,173,962, in two layers."""
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    assert sizes("resnet18_imagenet", (224, 224, 3), 1000)[0] == 11_689_512
    assert 11_173_962 + stem + 513 * (1000 - 10) == 11_689_512


def by_hand(params, state, x, train, strides, large):
    """Logits and running statistics of a residual network; strides of all blocks are given."""
    params, state, x = map(plain.in_float64, (params, state, x))
    preactivated, after = "last_norm" in params, {}

    def at(tree, path):
        return functools.reduce(lambda branch, name: branch[name], path, tree)

    def norm(x, *path):
        layer, running = at(params, path), at(state, path)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        after[path] = [0.9 * running["mean"] + 0.1 * mean, 0.9 * running["var"] + 0.1 * var]
        if not train:
            mean, var = running["mean"], running["var"]
        return (x - mean) / np.sqrt(var + 1e-5) * layer["scale"] + layer["bias"]

    def conv(x, stride, *path):
        return plain.convolve(x, at(params, path)["kernel"], stride)

    def block(x, stride, *path):
        here = at(params, path)
        steps = (1, stride, 1) if "conv3" in here else (stride, 1)
        inner, around = x, x
        for n, step in enumerate(steps, 1):
            if preactivated:
                inner = plain.relu(norm(inner, *path, f"norm{n}"))
            if n == 1 and "conv_around" in here:
                around = conv(inner, stride, *path, "conv_around")
            inner = conv(inner, step, *path, f"conv{n}")
            if not preactivated:
                inner = norm(inner, *path, f"norm{n}")
                inner = plain.relu(inner) if n < len(steps) else inner
        if "norm_around" in here:
            around = norm(around, *path, "norm_around")
        return inner + around if preactivated else plain.relu(inner + around)

    x = conv(x, 2 if large else 1, "stem")
    if "norm" in params:
        x = plain.relu(norm(x, "norm"))
    if large:
        x = plain.max_pool(x, 3, 2, 1)
    for number, stride in enumerate(strides):
        x = block(x, stride, "blocks", str(number))
    if preactivated:
        x = plain.relu(norm(x, "last_norm"))
    return plain.dense(x.mean((1, 2)), params["logits"]), after


def check_against_numpy(model, shape, train, strides, large):
    params, state = map(plain.drawn, plain.shapes_of(model))
    inputs = plain.images(3, *shape)
    values, after = jax.jit(lambda *args: model.apply(*args, None, train))(params, state, inputs)
    expected, running = by_hand(params, state, inputs, train, strides, large)
    # Of up to 50 layers in float32, with variances of as few as 12 numbers.
    np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3)
    if not train:
        jax.tree.map(np.testing.assert_array_equal, after, state)
        return
    for path, (mean, var) in running.items():
        layer = functools.reduce(lambda branch, name: branch[name], path, after)
        np.testing.assert_allclose(layer["mean"], mean, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(layer["var"], var, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("preactivated", [False, True])
def test_bottlenecks_and_the_stem_for_large_images_are_those_of_the_papers(preactivated):
    block = PreactivatedBottleneck if preactivated else Bottleneck
    shape = Shape(block, 4, [(16, 2), (32, 1)], preactivated, large_images=True)
    model = residual_network("tiny", (17, 22, 3), 5, shape, "batch")
    check_against_numpy(model, (17, 22, 3), True, (1, 1, 2), large=True)


@pytest.mark.parametrize("train", [True, False])
def test_wide_resnets_are_those_of_the_paper(train):
    model = wide_resnet((9, 8, 3), 5, depth=10, widening=2)
    check_against_numpy(model, (9, 8, 3), train, (1, 2, 2), large=False)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "preactivated"), [(18, False), (50, False), (50, True)])
def test_resnets_for_imagenet_are_those_of_the_papers(depth, preactivated):
    model = imagenet_resnet((70, 65, 3), 5, depth, preactivated, width=4)
    strides = [
        2 if s and not n else 1 for s, blocks in enumerate(BLOCKS[depth]) for n in range(blocks)
    ]
    check_against_numpy(model, (70, 65, 3), True, strides, large=True)


@pytest.mark.parametrize("shape", [(1, 1, 3), (33, 47, 1)])
def test_images_of_any_size(shape):
    for model in (imagenet_resnet(shape, 7, 18, width=4), wide_resnet(shape, 7, 10, 1)):
        params, state = plain.shapes_of(model)
        inputs = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        outputs, after = jax.eval_shape(
            lambda *args, model=model: model.apply(*args, None, True), params, state, inputs
        )
        assert outputs.shape == (2, 7)
        assert after == state


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_norms_of_one_example_keep_no_state(norm):
    assert plain.shapes_of(imagenet_resnet((8, 8, 3), 7, 18, norm=norm))[1] == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda shape: wide_resnet(shape, 3, 10, 1),
        lambda shape: residual_network("v1", shape, 3, TINY, "batch"),
        lambda shape: residual_network(
            "v2",
            shape,
            3,
            Shape(PreactivatedBottleneck, 4, [(16, 1), (32, 1)], True, True),
            "batch",
        ),
    ],
    ids=["wide", "v1", "v2"],
)
def test_two_steps_of_workers_agree_under_vmap_and_map(make):
    shape = (16, 16, 3)
    model = make(shape)
    (start, by_vmap), (_, by_map) = (
        plain.two_steps(model, shape, 3, worker_map) for worker_map in ("vmap", "map")
    )
    for name in ("params", "model_state"):
        first, second = getattr(by_vmap, name), getattr(by_map, name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), first, second
        )
    moved = jax.tree.map(lambda new, old: np.abs(new[0, 0] - old).max(), by_map.params, start)
    assert min(jax.tree.leaves(moved)) > 0
    scales = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(start) if "scale" in str(path)
    ]
    assert scales and all((scale == 1).all() for scale in scales)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: imagenet_resnet((8, 8, 3), 5, 34), "a depth of 18, 50, 101 or 152, got 34"),
        (lambda: imagenet_resnet((8, 8), 5), r"imagenet_resnet needs images .* shape \(8, 8\)"),
        (lambda: imagenet_resnet((8, 8, 3), 5, norm="batches"), "did you mean 'batch'"),
        (
            lambda: imagenet_resnet((8, 8, 3), 5, norm="group", width=8),
            "32 groups do not divide a width of 8 channels",
        ),
        (lambda: wide_resnet((8, 8, 3), 5, 41), r"depth of 6 n \+ 4, such as 16, 28 or 40, got 41"),
        (lambda: wide_resnet((8, 8, 3), 5, 4), r"depth of 6 n \+ 4, .* got 4"),
        (lambda: wide_resnet((8, 8, 3), 5, 16, 0), "widening of wide_resnet .* at least 1, got 0"),
        (lambda: wide_resnet((784,), 5), r"wide_resnet needs images .* shape \(784,\)"),
        (lambda: wide_resnet((8, 8, 3), 5, norm="group"), "32 groups do not divide .* 16 channels"),
    ],
)
def test_mistakes_are_errors(make, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        make()
