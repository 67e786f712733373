"""Mixed precision: the arithmetic is in half precision, and parameters stay in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxlocal
from jaxlocal.errors import ConfigurationError
from jaxlocal.models import build, from_functions, from_linen, from_nnx, in_precision
from jaxlocal.models.layers import BatchNorm
from jaxlocal.models.resnet import small_resnet
from jaxlocal.models.supervised import training_loss
from jaxlocal.models.transformers import transformer
from jaxlocal.nn import conv_general_dilated

KEY = jax.random.key(0)
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def equations(jaxpr):
    """All equations of a jaxpr, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def types(jaxpr, *primitives):
    """The dtypes of the operands of these primitives, and the number of the primitives."""
    chosen = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in primitives]
    return {str(v.aval.dtype) for e in chosen for v in e.invars}, len(chosen)


def training_step(model, inputs, classes=4):
    """The jaxpr and the shapes of one gradient of the training loss."""
    targets = jax.ShapeDtypeStruct(inputs.shape[: 2 if inputs.ndim == 2 else 1], jnp.int32)
    grad_fn = jaxlocal.gradients(training_loss(model, lambda x: x, classes), stateful=True)
    params, model_state = jax.eval_shape(model.init, KEY)
    batch = {"inputs": inputs, "targets": targets}
    return jax.make_jaxpr(grad_fn, return_shape=True)(params, model_state, batch, KEY)


MODELS = {
    "mll_cnn": (lambda: build("mll_cnn", (8, 8, 3), 4), IMAGES),
    "layer norm": (lambda: small_resnet((8, 8, 3), 4, "layer"), IMAGES),
    "batch norm": (lambda: small_resnet((8, 8, 3), 4, "batch"), IMAGES),
    "transformer": (lambda: transformer((6,), 4, 2, 8, 2, dropout=0.1), TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_products_are_in_half_precision_and_results_in_float32(name):
    make, inputs = MODELS[name]
    products = ("dot_general", "conv_general_dilated")
    jaxpr, (grads, model_state, metrics) = training_step(in_precision(make(), "bfloat16"), inputs)
    full, _ = training_step(make(), inputs)
    assert types(jaxpr, *products)[0] == {"bfloat16"}
    assert types(full, *products) == ({"float32"}, types(jaxpr, *products)[1])
    for leaf in jax.tree.leaves((grads, model_state, metrics)):
        assert leaf.dtype == jnp.float32
    # Norms, attention and losses sum in float32.
    found, count = types(jaxpr, "rsqrt", "exp", "log")
    assert found == {"float32"} and count


def test_outputs_are_those_of_the_model_up_to_the_rounding():
    weight, inputs = jax.random.normal(KEY, (5, 3)), jax.random.normal(KEY, (64, 5))
    model = from_functions(lambda key: weight, lambda params, inputs: inputs @ params)
    half, _ = in_precision(model, jnp.bfloat16).apply(weight, {}, inputs, None, True)
    assert half.dtype == jnp.float32 and (half != inputs @ weight).any()
    # Two factors and a sum are each rounded to eight bits; half of the last bit is 2^-9.
    np.testing.assert_array_less(
        np.abs(half - inputs @ weight), 2**-7 * (abs(inputs) @ abs(weight))
    )


def test_the_convolution_and_its_gradients_run_in_bfloat16():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.bfloat16)
    image, kernel, cotangent = draw(2, 6, 6, 3), draw(3, 3, 3, 4), draw(2, 6, 6, 4)

    def results(dtype):
        convolve = lambda *args: conv_general_dilated(
            *args, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        outputs, pull = jax.vjp(convolve, image.astype(dtype), kernel.astype(dtype))
        return outputs, *pull(cotangent.astype(dtype))

    for half, full in zip(
        *map(jax.jit(results, static_argnums=0), (jnp.bfloat16, jnp.float32)), strict=True
    ):
        assert half.dtype == jnp.bfloat16
        error = jnp.linalg.norm(half.astype(jnp.float32) - full)
        assert error < 2**-8 * jnp.linalg.norm(full)  # one rounding, of exact products


class Normed(nnx.Module):
    """A user's module, in which embedding and batch norm give float32 unless `dtype` is set."""

    def __init__(self, dtype, rngs):
        self.embed = nnx.Embed(7, 4, dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, dtype=dtype, rngs=rngs)
        self.logits = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        return self.logits(self.norm(self.embed(tokens)))


def test_layers_that_give_float32_follow_their_dtype():
    for dtype, expected in ((jnp.bfloat16, {"bfloat16"}), (None, {"float32"})):
        model = in_precision(from_nnx(lambda rngs, dtype=dtype: Normed(dtype, rngs)), jnp.bfloat16)
        inputs = jax.ShapeDtypeStruct((8, 3), jnp.int32)
        jaxpr, (_, model_state, _) = training_step(model, inputs, 3)
        assert types(jaxpr, "dot_general")[0] == expected
        assert {leaf.dtype for leaf in jax.tree.leaves(model_state)} == {jnp.dtype("float32")}


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, inputs, train):
        return linen.BatchNorm(use_running_average=not train, momentum=0.9)(inputs)


@pytest.mark.parametrize(
    "model",
    [
        from_nnx(lambda rngs: nnx.BatchNorm(1, momentum=0.9, dtype=jnp.bfloat16, rngs=rngs)),
        from_linen(LinenNormed(), jnp.zeros((1, 1))),
    ],
    ids=["nnx", "linen"],
)
def test_batch_statistics_move_in_float32(model):
    # bfloat16 represents the inputs, but not the mean: its numbers above 1 are 1/128 apart.
    inputs, old = jnp.array([[0.0], [1.0], [1.0], [3.0]]), 1.001
    params, state = model.init(KEY)
    state = jax.tree.map(lambda leaf: jnp.full_like(leaf, old), state)
    after = in_precision(model, jnp.bfloat16).apply(params, state, inputs, KEY, True)[1]
    (mean, var), expected = jax.tree.leaves(after), (1.25, np.var([0, 1, 1, 3]))
    for value, new in zip((mean, var), expected, strict=True):
        np.testing.assert_allclose(value, [0.9 * old + 0.1 * new], rtol=1e-6)


def test_only_floating_point_numbers_are_cast():
    seen = []

    def apply(params, inputs, model_state):
        seen.append(jax.tree.map(lambda leaf: str(leaf.dtype), (params, inputs, model_state)))
        state = {"last": inputs["x"].sum(), "calls": model_state["calls"] + 1}
        return {"logits": inputs["x"] @ params["w"], "label": inputs["tokens"]}, state

    params = {"w": jnp.ones(2), "table": jnp.arange(3)}
    state = {"last": jnp.zeros(()), "calls": jnp.zeros((), jnp.int32)}
    inputs = {"x": jnp.ones((4, 2)), "tokens": jnp.arange(4)}
    model = in_precision(from_functions(lambda key: (params, state), apply), "float16")
    outputs, after = model.apply(params, state, inputs, None, True)
    expected_inputs = {"x": "float16", "tokens": "int32"}
    expected_params = {"w": "float16", "table": "int32"}
    assert seen == [(expected_params, expected_inputs, {"last": "float32", "calls": "int32"})]
    assert outputs["logits"].dtype == jnp.float32 and outputs["label"].dtype == jnp.int32
    assert {name: str(leaf.dtype) for name, leaf in after.items()} == seen[0][2]


@pytest.mark.parametrize("dtype", ["int8", "bfloat61"])
def test_a_dtype_that_is_not_floating_point_is_an_error(dtype):
    with pytest.raises(ConfigurationError, match=f"in a floating-point dtype .* not {dtype}"):
        in_precision(build("mlp", (5,), 3), dtype)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.norm = BatchNorm(8, rngs=rngs)
        self.logits = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, inputs):
        return self.logits(nnx.relu(self.norm(self.hidden(inputs))))


def test_workers_train_in_half_precision():
    model = in_precision(from_nnx(Small), jnp.bfloat16)
    grad_fn = jaxlocal.gradients(training_loss(model, lambda x: x, 2), stateful=True)
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.2), period=16)
    round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    params, model_state = jax.jit(model.init)(KEY)
    state = round_fn.init(params, KEY, model_state)
    inputs = np.random.default_rng(0).normal(size=(16, 1, 2, 8, 3)).astype(np.float32)
    batches = {"inputs": inputs, "targets": (inputs.sum(-1) > 0).astype(np.int32)}
    state, before = round_fn(state, batches)
    state, after = round_fn(state, batches)
    assert after.worker["loss"].mean() < 0.8 * before.worker["loss"].mean()
    for leaf in jax.tree.leaves((state.params, state.model_state)):
        assert leaf.dtype == jnp.float32
