"""The vision transformer against loops over patches and heads, and its number of parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import plain_networks as plain
import pytest
from jax.extend import core

from jaxlocal.errors import ConfigurationError
from jaxlocal.models import build, in_precision
from jaxlocal.models.vision_transformers import positions, vision_transformer

KEY = jax.random.key(0)
PATCH, LAYERS, WIDTH, HEADS = 2, 2, 8, 2
SHAPE = (4, 6, 3)


@pytest.fixture(scope="module")
def model():
    return vision_transformer(SHAPE, 5, PATCH, LAYERS, WIDTH, HEADS)


@pytest.fixture(scope="module")
def params(model):
    return plain.drawn(plain.shapes_of(model)[0])


@pytest.fixture(scope="module")
def logits_of(model):
    return jax.jit(lambda params, images: model.apply(params, {}, images, None, True)[0])


def norm(x, layer):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * layer["scale"] + layer["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def position(row, column):
    """The position of one patch, entry by entry, from the formula."""
    quarter = WIDTH // 4
    waves = [10_000 ** (-i / (quarter - 1)) for i in range(quarter)]
    entries = [f(at * wave) for at in (column, row) for f in (math.sin, math.cos) for wave in waves]
    return np.array(entries)


def attention_by_hand(rows, layer):
    """One patch and one head at a time, over all patches."""
    size = WIDTH // HEADS
    queries, keys, values = np.split(
        plain.dense(np.stack(rows), layer["queries_keys_values"]), 3, axis=1
    )
    mixed = []
    for query in queries:
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            shares = np.exp(keys[:, part] @ query[part] / math.sqrt(size))
            heads.append(shares / shares.sum() @ values[:, part])
        mixed.append(plain.dense(np.concatenate(heads), layer["out"]))
    return mixed


def by_hand(params, image):
    params, image = plain.in_float64(params), plain.in_float64(image)
    rows = []
    for row in range(image.shape[0] // PATCH):
        for column in range(image.shape[1] // PATCH):
            top, left = row * PATCH, column * PATCH
            pixels = image[top : top + PATCH, left : left + PATCH].ravel()
            token = plain.dense(norm(pixels, params["norm_of_patches"]), params["embed"])
            rows.append(norm(token, params["norm_of_embeddings"]) + position(row, column))
    for number in range(LAYERS):
        block = params["blocks"][str(number)]
        mixed = attention_by_hand([norm(row, block["norm1"]) for row in rows], block["attention"])
        rows = [row + more for row, more in zip(rows, mixed, strict=True)]
        hidden = [gelu(plain.dense(norm(row, block["norm2"]), block["up"])) for row in rows]
        rows = [row + plain.dense(h, block["down"]) for row, h in zip(rows, hidden, strict=True)]
    return plain.dense(np.mean([norm(row, params["norm"]) for row in rows], 0), params["logits"])


def test_it_is_that_of_the_paper(logits_of, params):
    images = plain.images(3, *SHAPE)
    expected = np.stack([by_hand(params, image) for image in images])
    np.testing.assert_allclose(logits_of(params, images), expected, rtol=1e-3, atol=1e-4)


def test_each_patch_attends_to_all_and_knows_its_place(logits_of, params):
    """Both the order of the patches and that of the pixels in a patch change the logits."""
    images = plain.images(3, *SHAPE)
    before = np.asarray(logits_of(params, images))
    for axis in (1, 2):
        assert np.abs(logits_of(params, np.flip(images, axis)) - before).max() > 0.01


def test_positions_of_all_patches():
    by_loops = [position(row, column) for row in range(3) for column in range(5)]
    np.testing.assert_allclose(positions(3, 5, WIDTH), by_loops, rtol=1e-12, atol=1e-15)
    assert len(np.unique(positions(14, 14, 768), axis=0)) == 196


def transformer_count(layers, width, pixels, outputs):
    dense = lambda ins, outs: ins * outs + outs
    block = 4 * width * width + dense(width, 4 * width) + dense(4 * width, width) + 4 * width
    patches = 2 * pixels + dense(pixels, width) + 2 * width
    return patches + layers * block + 2 * width + dense(width, outputs)


@pytest.mark.parametrize(
    ("name", "shape", "outputs", "sizes"),
    [
        ("vit_b16", (224, 224, 3), 1000, (12, 768, 768)),
        ("small_vit", (32, 32, 3), 10, (4, 64, 48)),
        ("tiny_vit", (32, 32, 3), 10, (4, 64, 192)),
    ],
)
def test_number_of_parameters(name, shape, outputs, sizes):
    params, model_state = plain.shapes_of(build(name, shape, outputs))
    assert plain.count(params) == transformer_count(*sizes, outputs)
    assert model_state == {}
    if name == "vit_b16":
        assert plain.count(params) == 86_381_800


def test_parameters_of_beyer_et_al():
    """With biases in attention, and without norms around the embedding."""
    biases, norms = 12 * 4 * 768, 2 * 2 * 768
    assert 86_381_800 + biases - norms == 86_415_592


def test_initial_weights_have_the_documented_deviations():
    params, _ = jax.jit(vision_transformer((8, 8, 3), 5, 8, 1, 64, 4).init)(KEY)
    block = params["blocks"]["0"]
    for kernel, variance in (
        (block["attention"]["queries_keys_values"]["kernel"], 2 / (64 + 64)),
        (block["attention"]["out"]["kernel"], 2 / (64 + 64)),
        (block["up"]["kernel"], 2 / (64 + 256)),
        (block["down"]["kernel"], 2 / (64 + 256)),
        (params["embed"]["kernel"], 1 / 192),
    ):  # four standard errors of 4096 draws or more
        assert kernel.std() == pytest.approx(math.sqrt(variance), rel=0.05)
    assert not params["logits"]["kernel"].any() and not block["up"]["bias"].any()
    assert set(block["attention"]["out"]) == {"kernel"}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_half_precision_reaches_all_layers():
    model = in_precision(vision_transformer((4, 4, 3), 5, 2, 1, 8, 2), "bfloat16")
    params, _ = plain.shapes_of(model)
    images = jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32)
    program = jax.make_jaxpr(lambda *args: model.apply(*args, None, True)[0])(params, {}, images)
    products = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "dot_general"]
    assert {eqn.outvars[0].aval.dtype.name for eqn in products} == {"bfloat16"}
    assert len(products) == 8  # embedding, four of attention, two of the perceptron, logits


@pytest.mark.slow
def test_two_steps_of_workers_agree_under_vmap_and_map():
    model = build("small_vit", (8, 8, 3), 3)
    (start, by_vmap), (_, by_map) = (
        plain.two_steps(model, (8, 8, 3), 3, worker_map) for worker_map in ("vmap", "map")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        by_vmap.params,
        by_map.params,
    )
    kernel = lambda params: params["blocks"]["0"]["attention"]["out"]["kernel"]
    assert np.abs(kernel(by_map.params)[0, 0] - kernel(start)).max() > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"input_shape": (64,)}, r"vision_transformer needs images .* shape \(64,\)"),
        ({"patch": 5}, "patches of 5 x 5 do not divide images of 32 x 48"),
        ({"patch": 0}, "patches of 0 x 0 do not divide images of 32 x 48"),
        ({"input_shape": (8, 8, 3)}, "patches of 16 x 16 do not divide images of 8 x 8"),
        ({"heads": 5}, "5 heads do not divide a width of 768"),
        ({"layers": 0}, "1 or more layers, got 0"),
        ({"width": 18, "heads": 3}, "a multiple of 4, from 8 on, got 18"),
        ({"width": 4, "heads": 1}, "a multiple of 4, from 8 on, got 4"),
    ],
)
def test_mistakes_are_errors(arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        vision_transformer(**{"input_shape": (32, 48, 3), "outputs": 5, **arguments})
