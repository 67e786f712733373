"""Arrays of NNX modules are constants of the model, and what is no function is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from stacked_layers import Stacked

import jaxlocal
from jaxlocal.errors import ConfigurationError
from jaxlocal.models import from_nnx

KEY = jax.random.key(0)
INPUTS = jax.random.normal(jax.random.key(1), (8, 4))


class Masked(nnx.Module):
    """A linear map and a mask."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.mask = jnp.tril(jnp.ones((4, 4)))

    def __call__(self, inputs):
        return self.linear(inputs) @ self.mask


class Calls(nnx.Variable):
    """A kind of variable of one's own."""


class Everything(nnx.Module):
    """Arrays wherever a module may keep them; variables of all kinds."""

    def __init__(self, rngs):
        self.masked = Masked(rngs)
        self.table = np.arange(4, dtype=np.float32)
        self.positions = jnp.arange(4)[::-1]
        self.where = jnp.array([True, False, True, True])
        self.list = nnx.List([jnp.eye(4), nnx.Linear(4, 4, rngs=rngs)])
        self.dict = nnx.Dict(scale=jnp.float32(0.5), numbers=nnx.data((jnp.ones(4),)))
        self.normed = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
        self.lora = nnx.LoRA(4, 2, 4, base_module=self.list[1], rngs=rngs)
        self.noise = jax.random.key(3)
        self.drawn = jax.random.normal(rngs.params(), (4,))
        self.tied = nnx.Linear(4, 4, rngs=rngs)
        self.tied.kernel = self.masked.linear.kernel
        self.calls = Calls(jnp.zeros((), jnp.int32))
        self.rngs = rngs

    def __call__(self, inputs):
        self.calls[...] += 1
        hidden = self.normed(self.masked(inputs) @ self.list[0])[..., self.positions]
        hidden = jnp.where(self.where[None], hidden, 0.0) * self.dict["scale"]
        bias = self.table + self.drawn + jax.random.normal(self.noise, (4,))
        bias += self.dict["numbers"][0]
        return self.tied(self.lora(hidden)) + bias[None]


@pytest.fixture(scope="module")
def everything():
    """A model, and its variables, which are made first inside of a transformation."""
    model = from_nnx(Everything)
    return model, jax.jit(model.init)(KEY)


def test_arrays_are_constants_and_those_that_are_drawn_are_model_state(everything):
    _, (params, model_state) = everything
    assert set(model_state) == {"drawn", "calls"}
    np.testing.assert_array_equal(model_state["drawn"], Everything(nnx.Rngs(KEY)).drawn)
    assert "tied" in params and set(params["tied"]) == {"bias"}  # the kernel is there once


def test_outputs_are_those_of_the_module(everything):
    model, variables = everything
    outputs, after = model.apply(*variables, INPUTS, None, False)
    module = Everything(nnx.Rngs(KEY))
    module.eval()
    np.testing.assert_allclose(outputs, module(INPUTS), rtol=1e-5, atol=1e-6)  # float32
    assert after["calls"] == 1
    np.testing.assert_array_equal(after["drawn"], variables[1]["drawn"])


def test_workers_train_with_the_same_arrays(everything):
    model, (params, model_state) = everything

    def loss(params, model_state, batch, key):
        outputs, model_state = model.apply(params, model_state, batch, key, True)
        return (outputs**2).mean(), (model_state, {})

    grad_fn = jaxlocal.gradients(loss, stateful=True)
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1), period=2)
    round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    batches = jax.random.normal(KEY, (2, 1, 2, 8, 4))
    state, info = round_fn(round_fn.init(params, KEY, model_state), batches)
    assert np.isfinite(info.worker["loss"]).all()
    assert state.model_state["calls"].ravel().tolist() == [2, 2]
    for drawn in np.asarray(state.model_state["drawn"]).reshape(2, 4):
        np.testing.assert_array_equal(drawn, model_state["drawn"])


def test_layers_of_a_scan_may_hold_arrays():
    scanned = functools.partial(Stacked, lambda rngs: Masked(rngs))
    model = from_nnx(scanned)
    params, model_state = model.init(KEY)
    outputs, _ = model.apply(params, model_state, INPUTS, None, False)
    assert model_state == {}
    np.testing.assert_allclose(outputs, scanned(nnx.Rngs(KEY))(INPUTS), rtol=1e-5, atol=1e-5)


def test_a_recurrent_module_is_evaluated_without_a_key():
    model = from_nnx(lambda rngs: nnx.RNN(nnx.GRUCell(4, 3, rngs=rngs), rngs=rngs))
    evaluated = lambda key: model.apply(*model.init(key), INPUTS[None], None, False)[0]
    assert jax.eval_shape(evaluated, KEY).shape == (1, 8, 3)


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
@pytest.mark.parametrize("over", [lambda fn: fn, jax.jit, jax.eval_shape])
def test_a_call_may_pass_arrays_through_transformations_of_flax(transform, over):
    class Passed(nnx.Module):
        def __init__(self, rngs):
            self.masked = Masked(rngs)

        def __call__(self, inputs):
            return transform(lambda module, inputs: module(inputs))(self.masked, inputs)

    model = from_nnx(Passed)
    if over is jax.eval_shape:
        assert jax.eval_shape(lambda key: model.apply(*model.init(key), INPUTS, key, True), KEY)
        return
    outputs, _ = over(lambda key: model.apply(*model.init(key), INPUTS, None, False))(KEY)
    module = Masked(nnx.Rngs(KEY))
    np.testing.assert_allclose(outputs, module(INPUTS), rtol=1e-5, atol=1e-6)


class Sum(nnx.Module):
    """A module whose call does what `effect` does."""

    def __init__(self, effect):
        self.effect, self.calls, self.last = effect, 0, jnp.zeros(())

    def __call__(self, inputs):
        self.effect(self, inputs)
        return inputs.sum(-1) + self.last


def count(module, inputs):
    module.calls += 1


def keep(module, inputs):
    module.last = inputs.sum()


def sow(module, inputs):
    module.sow(Calls, "sums", inputs.sum())


@pytest.mark.parametrize("effect, name", [(count, "calls"), (keep, "last")])
def test_a_call_that_changes_what_is_no_variable_is_an_error(effect, name):
    model = from_nnx(lambda rngs: Sum(effect))
    with pytest.raises(ConfigurationError, match=f"changes its attribute {name}, .* nnx.Variable"):
        model.apply({}, {}, INPUTS, None, False)
    with pytest.raises(ConfigurationError, match=f"changes its attribute {name}"):
        jax.eval_shape(lambda inputs: model.apply({}, {}, inputs, None, False), INPUTS)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_values_sown_into_a_variable_of_ones_own_are_not_model_state():
    model = from_nnx(lambda rngs: Sum(sow))
    assert model.init(KEY)[1] == {} == model.apply({}, {}, INPUTS, None, False)[1]


class Hidden(nnx.Module):
    def __init__(self, rngs):
        mask = jnp.tril(jnp.ones((4, 4)))
        self.masked = lambda inputs: inputs @ mask

    def __call__(self, inputs):
        return self.masked(inputs)


def test_an_array_that_a_function_of_the_module_hides_is_an_error():
    with pytest.raises(ConfigurationError, match="the function masked of the module holds an arr"):
        from_nnx(Hidden).apply({}, {}, INPUTS, None, False)


def test_an_array_that_is_another_one_each_time_is_an_error():
    random = np.random.default_rng(0)

    class Random(nnx.Module):
        def __init__(self, rngs):
            self.shift = random.normal(size=4)

        def __call__(self, inputs):
            return inputs + self.shift

    with pytest.raises(ConfigurationError, match="array shift of the module differs each time"):
        from_nnx(Random).init(KEY)


class Keyed(nnx.Module):
    def __init__(self, rngs):
        self.noise = rngs.params()

    def __call__(self, inputs):
        return inputs + jax.random.normal(self.noise, inputs.shape)


def test_a_key_that_is_drawn_is_an_error_since_workers_would_not_share_it():
    with pytest.raises(ConfigurationError, match="keeps the random key noise that it draws"):
        from_nnx(Keyed).init(KEY)


def test_what_is_drawn_in_training_needs_a_key():
    model = from_nnx(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    with pytest.raises(ConfigurationError, match="draws from its random stream .* given no key"):
        model.apply({}, {}, INPUTS, None, True)


@pytest.mark.parametrize(
    "made, sentence",
    [
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "and got a Linear that is built already"),
        (nnx.Linear, "the first argument of Linear is 'in_features': give it lambda rngs: Linear"),
        (nnx.Dropout, "the first argument of Dropout is 'rate'"),
        (linen.Dense(2), "Dense is a Flax Linen module: make a model of it by from_linen"),
        (linen.Dense, "Dense is a Flax Linen module"),
        (None, "None cannot be called as make_module"),
        (lambda: None, r"cannot be called as make_module\(rngs\): too many positional"),
    ],
)
def test_what_makes_no_module_is_an_error_when_the_model_is_made(made, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        from_nnx(made)


@pytest.mark.parametrize("made", ["module", jnp.ones(3), linen.Dense(2), nnx.Rngs(0)])
def test_what_is_no_module_is_an_error_when_it_is_built(made):
    with pytest.raises(ConfigurationError, match="must give an NNX module|is a Flax Linen module"):
        from_nnx(lambda rngs: made).init(KEY)


def test_parameters_of_another_model_are_an_error():
    model = from_nnx(Masked)
    with pytest.raises(ConfigurationError, match=r"the module has linear\.bias, which it is not"):
        model.apply({"linear": {}}, {}, INPUTS, None, False)
