"""The matrix product equals that of JAX in values and derivatives, and its weight gradient is the
transpose of a product of rows."""

import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from exactly import assert_equal_functions, assert_same
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from plain_layers import digits

from jaxlocal.nn import dot_general, fast_layers, fast_layers_report
from jaxlocal.nn.dense import FEW, MANY, SOME, pays


def dense(lead):
    return (((len(lead),), (0,)), ((), ()))


def by(product, lead, **options):
    return lambda x, weights: product(x, weights, dense(lead), **options)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (MANY,)])
@pytest.mark.parametrize("outs", [1, 2, FEW, FEW + 1, SOME, SOME + 1])
def test_value_and_gradients_equal_lax(lead, outs):
    x, weights = digits((*lead, 7)), digits((7, outs), seed=1)
    assert_equal_functions(by(dot_general, lead), by(lax.dot_general, lead), x, weights)


@pytest.mark.parametrize(
    ("x", "weights", "dimensions"),
    [
        ((0, 4), (4, 3), (((1,), (0,)), ((), ()))),  # no row
        ((2, 0), (0, 3), (((1,), (0,)), ((), ()))),  # no input
        ((2, 4), (4, 0), (((1,), (0,)), ((), ()))),  # no output
        ((2, 4), (3, 4), (((1,), (1,)), ((), ()))),  # W transposed
        ((4, 2), (4, 3), (((0,), (0,)), ((), ()))),  # x transposed
        ((2, 4), (4, 3, 2), (((1,), (0,)), ((), ()))),  # outputs of two axes
        ((2, 3, 4), (2, 4, 3), (((2,), (1,)), ((0,), (0,)))),  # a batch of products
        ((4,), (4,), (((0,), (0,)), ((), ()))),
    ],
)
def test_other_products_equal_lax(x, weights, dimensions):
    ours, theirs = (
        partial(product, dimension_numbers=dimensions) for product in (dot_general, lax.dot_general)
    )
    assert_equal_functions(ours, theirs, digits(x), digits(weights, seed=1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16, jnp.int32])
@pytest.mark.parametrize("wanted", [None, jnp.float32, jnp.float64])
def test_dtypes_are_those_of_lax(dtype, wanted):
    with jax.enable_x64(True):
        x, weights = digits((5, 7), dtype), digits((7, 3), dtype, seed=1)
        functions = (
            by(product, (5,), precision=["highest"] * 2, preferred_element_type=wanted)
            for product in (dot_general, lax.dot_general)
        )
        if dtype == jnp.int32:
            assert_same(*(fn(x, weights) for fn in functions))
        else:
            assert_equal_functions(*functions, x, weights)


def test_derivatives_of_all_orders_in_both_modes_equal_lax():
    x, weights = digits((3, 2, 4)), digits((4, 3), seed=1)

    def derivatives(product):
        loss = lambda x, weights: (product(x, weights, dense((3, 2))) ** 3).sum()
        forward = jax.jvp(loss, (x, weights), (weights.sum() * x, x.sum() * weights))
        mixed = jax.jacfwd(jax.jacrev(loss, (0, 1)), (0, 1))(x, weights)
        twice = jax.jacrev(jax.jacrev(loss, 1), 1)(x, weights)
        return forward, mixed, twice, jax.grad(jax.checkpoint(loss), (0, 1))(x, weights)

    assert_same(*jax.jit(lambda: [derivatives(p) for p in (dot_general, lax.dot_general)])())


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 1)])
def test_vmap(axes):
    x, weights = digits((6, 6, 7)), digits((6, 6, 7), seed=1)
    x = x[:, 0] if axes[0] is None else x
    weights = weights[0].T if axes[1] is None else weights.swapaxes(-1, -2)
    lead = (6,)
    ours, theirs = (jax.vmap(by(p, lead), axes) for p in (dot_general, lax.dot_general))
    if axes == (1, 1):
        weights = weights.swapaxes(0, 1)
    assert_equal_functions(ours, theirs, x, weights)


@pytest.mark.parametrize("spec", [P("workers"), P()])
def test_shard_map_in_a_loop(spec):
    """The gradient of common weights is common, summed over the devices, as in lax."""
    mesh = Mesh(np.array(jax.devices()), ("workers",), axis_types=(AxisType.Auto,))
    devices = len(jax.devices())
    x, weights = digits((devices, 5, 7)), digits((devices if spec else 1, 7, 3), seed=1)

    def run(product):
        def per_device(x, weights):
            loss = lambda w: (product(x[0], w, dense((5,))) ** 2).sum()
            step = lambda w, _: (w - jax.grad(loss)(w), None)
            return lax.scan(step, weights[0], None, length=2)[0][None]

        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=(P("workers"), spec), out_specs=spec)
        return jax.jit(mapped)(x, weights)

    assert_same(run(dot_general), run(lax.dot_general))


def test_flax_layers_take_it():
    x = digits((4, 7))
    for dot in (dot_general, None):
        layer = nnx.Linear(7, 3, rngs=nnx.Rngs(0), **({"dot_general": dot} if dot else {}))
        linear = linen.Dense(3, **({"dot_general": dot} if dot else {}))
        params = linear.init(jax.random.key(0), x)
        found = "custom_jvp_call" in str(jax.make_jaxpr(linear.apply)(params, x))
        assert found == bool(dot)
        assert ("custom_jvp_call" in str(jax.make_jaxpr(layer)(x))) == bool(dot)


def test_batches_of_a_symbolic_size_are_exported():
    for outs in (FEW, SOME):
        shape = jax.export.symbolic_shape("batch, 3, 7")
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        weights = jax.ShapeDtypeStruct((7, outs), jnp.float32)
        exported = jax.export.export(jax.jit(by(dot_general, (0, 0))))(x, weights)
        given = digits((4, 3, 7)), digits((7, outs), seed=1)
        assert_same(exported.call(*given), by(lax.dot_general, (0, 0))(*given))


def test_rows_that_are_sharded_explicitly_are_left_as_they_are():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(digits((2, 4, 7)), P(None, "a", None))
        weights = digits((7, 3), seed=1)
        ours, theirs = (jax.jit(by(p, (0, 0)))(x, weights) for p in (dot_general, lax.dot_general))
    assert jax.typeof(ours) == jax.typeof(theirs)
    assert_same(ours, theirs)


def test_rows_of_several_dimensions_become_one():
    """XLA:CPU has no fast kernel for a weight gradient that contracts two dimensions."""
    x, weights = digits((4, 6, 5)), digits((5, SOME + 1), seed=1)
    loss = lambda product, w: product(x, w, dense((4, 6))).sum()

    def contracted(product):
        program = jax.make_jaxpr(jax.grad(partial(loss, product)))(weights)
        products = [e for e in program.eqns if e.primitive.name == "dot_general"]
        return [len(e.params["dimension_numbers"][0][0]) for e in products]

    assert contracted(dot_general) == [1, 1] and contracted(lax.dot_general) == [1, 2]


@pytest.mark.optimized
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends have the form of lax")
@pytest.mark.parametrize(("outs", "fast"), [(10, True), (FEW + 1, False)])
def test_the_weight_gradient_compiles_to_a_product_of_rows(outs, fast):
    x, weights = digits((20, 50)), digits((50, outs), seed=1)

    def program(product):
        loss = lambda w: (product(x, w, dense((20,))) ** 2).sum()
        train = lambda w: lax.fori_loop(0, 3, lambda _, w: w - jax.grad(loss)(w), w)
        return jax.jit(train).lower(weights).compile().as_text()

    gradient = rf"f32\[{outs},50\]\S* dot\("
    assert bool(re.search(gradient, program(dot_general))) == fast
    assert "conditional" not in program(dot_general)
    assert not re.search(gradient, program(lax.dot_general))


def test_fast_layers_replaces_dense_layers_at_all_depths():
    x, weights = digits((5, 7)), digits((7, 3), seed=1)

    def loss(x, weights):
        inside = jax.jit(lambda x: jax.nn.relu(x @ weights))
        return lax.scan(lambda c, _: (c + inside(x).sum(), None), 0.0, None, 2)[0] + (x @ x.T).sum()

    lines = ["dense layer [5, 7] by [7, 3]", "dense layer [5, 7] by [7, 5]"]
    assert fast_layers_report(jax.vmap(loss, (0, None)), x[None], weights).fast[0] == (
        "dense layer [1, 5, 7] by [7, 3]"
    )
    assert fast_layers_report(loss, x, weights) == (lines, [])
    assert fast_layers_report(fast_layers(loss), x, weights) == (lines, [])
    assert_equal_functions(fast_layers(loss), loss, x, weights)


def test_it_pays_for_few_outputs_or_many_rows():
    def of(rows, ins, outs, dtype=jnp.float32):
        shapes = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((rows, ins), (ins, outs)))
        return pays(*shapes, dense((rows,)))

    assert of(1, 784, 10) and of(1, 784, FEW) and of(MANY, 784, SOME)
    assert of(MANY, 512, 256) and not of(MANY, 511, 256) and not of(MANY - 1, 512, 256)
    assert not of(MANY, 784, 1) and not of(MANY - 1, 784, SOME) and not of(1024, 128, SOME + 1)
    assert of(8, 784, 10, jnp.bfloat16) and not of(MANY, 784, SOME, jnp.bfloat16)
    assert not of(8, 784, 10, jnp.float8_e4m3fn) and not of(8, 784, 10, jnp.int32)
