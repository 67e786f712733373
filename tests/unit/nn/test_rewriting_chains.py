"""A convolution with its bias, relu and pooling becomes one layer where that is the same function.

Images and weights are small whole numbers, so sums are exact and most windows have equal entries.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from plain_layers import LAYOUT, assert_fast, assert_same, convolve, digits, moved

import jaxlocal
from jaxlocal.nn import fast_layers, fast_layers_report, pooled

IMAGES = digits((2, 4, 6, 1))
PARAMS = {"kernel": digits((3, 3, 1, 2), seed=1), "bias": digits((2,), seed=2)}
CHAIN = "convolution [2, 4, 6, 1] by [3, 3, 1, 2] with its relu and pooling"


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, images):
        for outs in (2, 3):
            hidden = linen.relu(linen.Conv(outs, (5, 5))(images))
            images = linen.max_pool(hidden, (2, 2), (2, 2))
        return images


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 2, (5, 5), rngs=rngs)
        self.second = nnx.Conv(2, 3, (5, 5), rngs=rngs)

    def __call__(self, images):
        for layer in (self.first, self.second):
            images = nnx.max_pool(nnx.relu(layer(images)), (2, 2), (2, 2), "SAME")
        return images


def in_linen():
    net = LinenNet()
    return jax.eval_shape(net.init, jax.random.key(0), IMAGES), net.apply


def in_nnx():
    graph, params = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    return params, lambda params, images: nnx.merge(graph, params)(images)


def in_lax():
    def net(params, images):
        for kernel, bias in params:
            hidden = lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT
            )
            hidden = jax.nn.relu(hidden + bias[None, None, None])
            window = (1, 2, 2, 1)
            images = lax.reduce_window(hidden, -jnp.inf, lax.max, window, window, "VALID")
        return images

    return [(jnp.ones((5, 5, ins, outs)), jnp.ones(outs)) for ins, outs in ((1, 2), (2, 3))], net


@pytest.mark.parametrize("spelling", [in_linen, in_nnx, in_lax])
def test_both_layers_of_a_small_network_are_one_each(spelling):
    params, net = spelling()
    params = jax.tree.map(lambda leaf: digits(leaf.shape, seed=leaf.size), params)
    images = digits((2, 8, 12, 1))
    loss = lambda params, images: net(params, images).sum()
    assert fast_layers_report(loss, params, images) == (
        [
            "convolution [2, 8, 12, 1] by [5, 5, 1, 2] with its relu and pooling",
            "convolution [2, 4, 6, 2] by [5, 5, 2, 3] with its relu and pooling",
        ],
        [],
    )
    assert_fast(loss, params, images)


def pool(x):
    return nnx.max_pool(x, (2, 2), (2, 2))


def chain(params, images, relu=jax.nn.relu, pool=pool, **options):
    return pool(relu(convolve(images, params["kernel"], **options) + wide(params["bias"])))


def wide(bias):
    return bias[None, None, None]


def half(params, images):
    params, images = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, images))
    return chain(params, images).astype(jnp.float32)


CHAINS = {
    "relu after the pooling": lambda p, x: nnx.relu(chain(p, x, relu=lambda x: x)),
    "no bias": lambda p, x: pool(nnx.relu(convolve(x, p["kernel"]))) + wide(p["bias"]),
    "a bias spread before": lambda p, x: pool(
        nnx.relu(lax.broadcast_in_dim(p["bias"], (2, 4, 6, 2), (3,)) + convolve(x, p["kernel"]))
    ),
    "half precision": half,
    "in scan, remat, cond and jit": lambda p, x: lax.scan(
        lambda total, x: (
            lax.cond(x.sum() > -99, jax.checkpoint(jax.jit(chain)), lambda p, x: total, p, x),
            None,
        ),
        jnp.zeros((2, 2, 3, 2)),
        jnp.stack([x, -x]),
    )[0],
    "a bias made after the convolution, and used again": lambda p, x: (
        lambda y: (lambda b: pool(nnx.relu(y + b)) * b)(jnp.tanh(p["bias"] * 99)[None, None, None])
    )(convolve(x, p["kernel"])),
}


@pytest.mark.parametrize("fn", CHAINS.values(), ids=CHAINS)
def test_a_chain_is_one_layer(fn):
    loss = lambda params, images: fn(params, images).sum()
    assert fast_layers_report(loss, PARAMS, IMAGES) == ([CHAIN], [])
    assert_fast(loss, PARAMS, IMAGES, layers=1)


@settings(max_examples=5)
@example(layout=("CNWH", "OIHW", "NCWH"), sides=(2, 4), taps=(2, 1))
@given(
    layout=st.tuples(*(st.permutations(letters) for letters in ("NCHW", "OIHW", "NCHW"))),
    sides=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    taps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_any_layout_sides_and_taps(layout, sides, taps):
    layout = tuple("".join(letters) for letters in layout)
    images = digits(moved((2, 2, *sides), layout[0], "NCHW"))
    kernel = digits(moved((3, 2, *taps), layout[1], "OIHW"), seed=1)
    bias = jnp.ones(moved((1, 3, 1, 1), layout[2], "NCHW"))
    window = moved((1, 1, 2, 2), layout[2], "NCHW")

    def loss(params, images):
        hidden = jax.nn.relu(convolve(images, params[0], layout=layout) + params[1])
        return lax.reduce_window(hidden, -jnp.inf, lax.max, window, window, "VALID").sum()

    fast = fast_layers_report(loss, (kernel, bias), images).fast
    down_first = [spec.index("H") < spec.index("W") for spec in layout[1:]]
    same_order = down_first[0] == down_first[1]  # so the same one of equal entries is the first
    assert fast[0].endswith("relu and pooling") == same_order
    assert_fast(loss, (kernel, bias), images, layers=1 if same_order else 2)


def read_twice(params, images):
    hidden = jax.nn.relu(convolve(images, params["kernel"]) + wide(params["bias"]))
    return pool(hidden).sum() + hidden.sum()


def returned(params, images):
    convolved = convolve(images, params["kernel"])
    return pool(jax.nn.relu(convolved + wide(params["bias"]))), convolved


@jax.custom_jvp
def relu(x):
    return jnp.maximum(x, 0)


relu.defjvp(lambda primals, tangents: (relu(*primals), 3 * tangents[0]))

BROKEN = {
    "summed before": lambda p, x: convolve(x, p["kernel"]).sum((1, 2)) + p["bias"][None],
    "read twice": read_twice,
    "returned": returned,
    "added to itself": lambda p, x: pool(nnx.relu((lambda y: y + y)(convolve(x, p["kernel"])))),
    "a number": lambda p, x: pool(nnx.relu(convolve(x, p["kernel"]) + p["bias"].sum())),
    "a bias along the width": lambda p, x: pool(
        nnx.relu(convolve(x, p["kernel"]) + jnp.ones((1, 1, 6, 1)))
    ),
    # The derivative of a plain maximum at zero is 1/2.
    "maximum": partial(chain, relu=lambda x: jnp.maximum(x, 0)),
    "relu of the user": partial(chain, relu=relu),
    "no relu": partial(chain, relu=lambda x: x),
    "relu twice": partial(chain, relu=lambda x: nnx.relu(nnx.relu(x))),
    "strides": partial(chain, strides=(2, 1), pool=lambda x: linen.max_pool(x, (2, 2), (2, 2))),
    "padding": partial(chain, padding=((1, 1), (2, 0))),
    "dilation": partial(chain, rhs_dilation=(1, 2)),
    "window": partial(chain, pool=lambda x: nnx.max_pool(x, (2, 3), (2, 3))),
    "precision": partial(chain, precision="highest"),
}


def test_other_chains_stay_separate_layers():
    """One program of all of them is compiled once."""
    fns = [jax.jit(fn) for fn in BROKEN.values()]
    total = lambda params, images: [
        sum(leaf.sum() for leaf in jax.tree.leaves(fn(params, images))) for fn in fns
    ]
    fast = fast_layers_report(total, PARAMS, IMAGES).fast
    assert sum(line.startswith("convolution") for line in fast) == len(BROKEN)
    assert not any("relu" in line for line in fast)
    with_gradients = lambda fn: lambda *args: (fn(*args), jax.jacrev(fn)(*args))
    assert_same(
        *jax.jit(lambda *a: [with_gradients(f)(*a) for f in (fast_layers(total), total)])(
            PARAMS, IMAGES
        )
    )


def test_with_many_channels_the_layers_stay_separate():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    shapes = lambda ins, outs: (
        {"kernel": shape(3, 3, ins, outs), "bias": shape(outs)},
        shape(2, 4, 6, ins),
    )
    most = pooled.MOST_IN, pooled.MOST_OUT
    for ins, outs, lines in ((*most, 1), (most[0] + 1, most[1], 2), (most[0], most[1] + 1, 2)):
        assert len(fast_layers_report(chain, *shapes(ins, outs)).fast) == lines


def test_chains_in_a_round():
    def after_a_round(loss):
        grad_fn = jaxlocal.gradients(lambda params, batch, key: loss(params, batch).sum())
        method = jaxlocal.local_sgd(grad_fn, optax.sgd(2.0**-8), period=2)
        round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
        state, info = round_fn(
            round_fn.init(PARAMS, jax.random.key(0)), digits((2, 1, 2, *IMAGES.shape))
        )
        return state.params, info.worker["loss"]

    same = partial(np.testing.assert_allclose, rtol=1e-5)  # the updates are not whole numbers
    jax.tree.map(same, after_a_round(fast_layers(chain)), after_a_round(chain))
