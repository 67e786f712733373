"""A rewritten function equals the plain one in value and gradients, in all transformations."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from plain_layers import (
    IMAGES,
    KERNEL,
    LAYOUT,
    assert_fast,
    assert_same,
    convolve,
    digits,
    layers,
    left_plain,
    loss,
    moved,
)

import jaxlocal
from jaxlocal.nn import conv_general_dilated, fast_layers, fast_layers_report


def in_scan(loss):
    def repeated(kernel, images):
        step = lambda kernel, image: (kernel * 2 + 1, loss(kernel, image[None]))
        return lax.scan(step, kernel, images)[1].sum()

    return repeated


def in_while(loss):
    """The loss outside of a while loop has gradients; reverse mode does not enter the loop."""

    def counted(kernel, images):
        fixed = lax.stop_gradient(kernel)
        more = lambda carry: (carry[0] < 2) & (loss(fixed, images) > -1)
        step = lambda carry: (carry[0] + 1, carry[1] + loss(fixed, images))
        total = lax.while_loop(more, step, (jnp.int32(0), jnp.float32(0)))[1]
        return loss(kernel, images) + lax.stop_gradient(total)

    return counted


def in_cond(loss):
    twice = lambda *args: 2 * loss(*args)
    return lambda kernel, images: lax.cond(images.sum() > 0, loss, twice, kernel, images)


def in_switch(loss):
    branches = [loss, lambda kernel, images: images.sum(), lambda *args: -loss(*args)]
    return lambda kernel, images: lax.switch(2, branches, kernel, images)


def in_vmap(loss):
    return lambda kernel, images: jax.vmap(loss, (None, 0))(kernel, images[:, None]).sum()


WRAPPINGS = {
    "plain": lambda loss: loss,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat with a policy": partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "scan": in_scan,
    "while": in_while,
    "cond": in_cond,
    "switch": in_switch,
    "vmap": in_vmap,
    "all at once": lambda loss: jax.jit(in_cond(jax.checkpoint(in_scan(jax.jit(loss))))),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrappings(wrap):
    assert_fast(wrap(loss), KERNEL, IMAGES)


@settings(max_examples=8)
@given(
    data=st.data(),
    layout=st.tuples(*(st.permutations(letters) for letters in ("NCHW", "OIHW", "NCHW"))),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.sampled_from(["SAME", "VALID", ((1, 0), (2, 1)), ((0, 3), (-1, 1))]),
)
def test_convolutions_of_any_layout(data, layout, strides, padding):
    layout = tuple("".join(letters) for letters in layout)
    batch, ins, outs, high, wide = (data.draw(st.integers(1, 3)) for _ in range(5))
    images = digits(moved((batch, ins, high + 3, wide + 4), layout[0], "NCHW"))
    kernel = digits(moved((outs, ins, high, wide), layout[1], "OIHW"), seed=1)
    options = {"layout": layout, "strides": strides, "padding": padding}
    square = lambda images, kernel: (convolve(images, kernel, **options) ** 2).sum()
    assert_fast(square, images, kernel, layers=1)


@pytest.mark.parametrize(
    "window", [(1, 2, 2, 1), (1, 1, 2, 3), (2, 1, 1, 2), (1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 1, 1)]
)
def test_poolings_along_any_axes(window):
    def loss(images):
        return (lax.reduce_window(images, -jnp.inf, lax.max, window, window, "VALID") ** 2).sum()

    assert_fast(loss, IMAGES, argnums=0, layers=1)


def test_reverse_mode_twice():
    def sum_of_squares(loss):
        return lambda *args: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(*args))

    ours, theirs = (jax.grad(sum_of_squares(fn), (0, 1)) for fn in (fast_layers(loss), loss))
    assert_same(*jax.jit(lambda *args: (ours(*args), theirs(*args)))(KERNEL, IMAGES))


def test_forward_mode_is_an_error():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(fast_layers(loss), (KERNEL, IMAGES), (KERNEL, IMAGES))


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_vmap_outside(axes):
    args = (digits((3, *KERNEL.shape), seed=1), digits((3, *IMAGES.shape)))
    args = [x if axis == 0 else x[0] for x, axis in zip(args, axes, strict=True)]
    ours, theirs = (jax.vmap(jax.grad(fn, (0, 1)), axes) for fn in (fast_layers(loss), loss))
    assert_same(*jax.jit(lambda *args: (ours(*args), theirs(*args)))(*args))
    assert not left_plain(ours, *args)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_dtypes(dtype):
    """Gradients of a sum of the outputs, which bfloat16 represents exactly."""
    with jax.enable_x64(True):
        linear = lambda kernel, images: layers(kernel, images).astype(jnp.float32).sum()
        assert_fast(linear, KERNEL.astype(dtype), IMAGES.astype(dtype))


def test_precision_and_result_type_are_passed_on():
    def wide(kernel, images):
        options = {"precision": "highest", "preferred_element_type": jnp.float32}
        return convolve(images, kernel, **options)

    kernel, images = KERNEL.astype(jnp.bfloat16), IMAGES.astype(jnp.bfloat16)
    program = str(jax.make_jaxpr(fast_layers(wide))(kernel, images))
    assert fast_layers(wide)(kernel, images).dtype == jnp.float32
    assert "HIGHEST" in program and "preferred_element_type=float32" in program


def test_linen_with_keys_keywords_and_aux():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, images, training):
            hidden = linen.remat(linen.Conv)(2, (3, 3), strides=2)(images)
            hidden = linen.max_pool(linen.relu(hidden), (2, 2), (2, 2))
            hidden = linen.Dropout(0.5, deterministic=not training)(hidden)
            return linen.Dense(3)(hidden.reshape(len(images), -1))

    net = Net()
    variables = jax.eval_shape(partial(net.init, training=False), jax.random.key(0), IMAGES)
    variables = jax.tree.map(lambda leaf: digits(leaf.shape), variables)

    def loss(variables, images, key, *, training, name=None):
        out = net.apply(variables, images, training, rngs={"dropout": key})
        return (out**2).sum(), {"out": out, "key": key, "name": name, "whole": 3}

    key, static = jax.random.key(1), {"training": True, "name": "net"}

    def value_and_gradients(loss, variables):
        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(
            variables, IMAGES, key, **static
        )
        assert (aux.pop("name"), aux.pop("whole")) == ("net", 3)
        return (value, aux.pop("out"), gradients), aux["key"]

    run = lambda v: (value_and_gradients(fast_layers(loss), v), value_and_gradients(loss, v))
    (ours, our_key), (theirs, _) = jax.jit(run)(variables)
    assert_same(ours, theirs)
    assert our_key == key


def test_nnx_module_split_outside_and_merged_inside():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 2, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, images):
            return nnx.max_pool(self.norm(self.conv(images)), (2, 2), (2, 2))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, rest, images):
        net = nnx.merge(graph, params, rest, copy=True)
        value = (net(images) ** 2).mean()
        return value, nnx.state(net, nnx.BatchStat)

    both = [jax.value_and_grad(fn, has_aux=True) for fn in (fast_layers(loss), loss)]
    ours, theirs = jax.jit(lambda *args: [fn(*args) for fn in both])(params, rest, IMAGES)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)
    assert not left_plain(both[0], params, rest, IMAGES)


def test_values_that_are_not_arrays_are_passed_on_unchanged():
    def fn(images, *, flag, scale, table):
        assert flag is True and type(scale) is int and type(table) is np.ndarray
        return images * scale, [None, "name", scale, table]

    images, rest = fast_layers(fn)(IMAGES, flag=True, scale=2, table=np.arange(3))
    assert_same(images, IMAGES * 2)
    assert rest[:3] == [None, "name", 2] and type(rest[3]) is np.ndarray


def test_arrays_of_a_closure_have_gradients():
    def outer(wrap):
        return lambda kernel: wrap(lambda images: loss(kernel, images))(IMAGES)

    ours, theirs = (jax.grad(outer(wrap)) for wrap in (fast_layers, lambda fn: fn))
    assert_same(jax.jit(ours)(KERNEL), jax.jit(theirs)(KERNEL))
    assert not left_plain(ours, KERNEL)


def test_without_layers_the_program_is_unchanged():
    def fn(x):
        return jax.nn.relu(lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0]) + 1.0

    x = jnp.float32(0.5)
    ours, theirs = (jax.value_and_grad(f) for f in (fast_layers(fn), fn))
    assert str(jax.make_jaxpr(ours)(x)) == str(jax.make_jaxpr(theirs)(x))
    assert fast_layers_report(fn, x) == ([], [])


@pytest.mark.optimized
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the program of another backend has jax.lax's gradients"
)
def test_it_compiles_to_the_same_convolutions_as_the_fast_layer():
    def program(convolve, wrap=lambda loss: loss):
        def loss(kernel):
            return (convolve(IMAGES, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT) ** 2).sum()

        step = lambda _, kernel: kernel - jax.grad(wrap(loss))(kernel)
        compiled = jax.jit(lambda kernel: lax.fori_loop(0, 3, step, kernel)).lower(KERNEL).compile()
        return sorted(re.findall(r"dim_labels=(\w+->\w+)", compiled.as_text()))

    plain, ours = lax.conv_general_dilated, conv_general_dilated
    assert program(plain, fast_layers) == program(ours) != program(plain)


@pytest.mark.parametrize("specs", [(P("workers"), P()), (P(), P("workers"))])
def test_inside_shard_map(specs):
    """Values that vary over the devices meet common values, with `check_vma`."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("workers",), axis_types=(AxisType.Auto,))
    args = [digits((2, *x.shape), seed=i) for i, x in enumerate((KERNEL, IMAGES))]

    def gradients(loss):
        def per_device(kernels, images):
            of_device = jax.grad(loss, (0, 1))(kernels[0], images[0])
            return jax.tree.map(lambda gradient: gradient[None], of_device)

        return jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True)

    wrapped = in_cond(jax.checkpoint(in_scan(loss)))
    ours, theirs = (gradients(fn) for fn in (fast_layers(wrapped), wrapped))
    assert_same(*jax.jit(lambda *args: (ours(*args), theirs(*args)))(*args))


@pytest.mark.parametrize("worker_map", ["map", "vmap"])
def test_a_round_of_local_sgd(worker_map):
    layout = jaxlocal.Layout(workers_per_hub=4)
    batches = digits((2, 1, 4, *IMAGES.shape))

    def after_a_round(loss):
        grad_fn = jaxlocal.gradients(lambda params, batch, key: loss(params, batch))
        method = jaxlocal.local_sgd(grad_fn, optax.sgd(2.0**-8), period=2, worker_map=worker_map)
        round_fn = jaxlocal.RoundFn(method, layout)
        state, info = round_fn(round_fn.init(KERNEL, jax.random.key(0)), batches)
        return state.params, info.worker["loss"]

    for ours, theirs in zip(after_a_round(fast_layers(loss)), after_a_round(loss), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
