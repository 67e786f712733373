"""Plain functions become a model, and functions that cannot be called are errors."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlocal.errors import ConfigurationError
from jaxlocal.models import from_functions

KEY = jax.random.key(0)
INPUTS = jnp.arange(6.0).reshape(2, 3)


def start(key):
    return (jnp.ones(3), jnp.zeros(()))  # parameters only: a pair without model state


def affine(params, inputs):
    weight, bias = params
    return inputs @ weight + bias


def test_two_functions_are_a_model_without_state():
    model = from_functions(start, affine)
    params, model_state = model.init(KEY)
    outputs, after = jax.jit(model.apply, static_argnames="train")(
        params, model_state, INPUTS, KEY, train=True
    )
    assert model_state == after == {}
    np.testing.assert_array_equal(outputs, INPUTS.sum(1))


def test_key_and_train_are_passed_to_functions_that_take_them():
    def noisy(params, inputs, *, key, train):
        return inputs + params * jax.random.normal(key, inputs.shape) if train else inputs

    model = from_functions(lambda key: jnp.ones(()), noisy)
    expected = INPUTS + jax.random.normal(KEY, INPUTS.shape)
    np.testing.assert_array_equal(model.apply(1.0, {}, INPUTS, KEY, True)[0], expected)
    np.testing.assert_array_equal(model.apply(1.0, {}, INPUTS, None, False)[0], INPUTS)


@pytest.mark.parametrize("keyword", ["key", "train"])
def test_a_function_may_take_one_of_them_only(keyword):
    scope = {}
    exec(f"def apply(params, inputs, {keyword}=None): return {keyword}", scope)
    model = from_functions(start, scope["apply"])
    assert model.apply(1.0, {}, INPUTS, "passed", "passed")[0] == "passed"


def test_model_state_is_passed_to_functions_that_take_it():
    def counting(params, inputs, model_state):
        return inputs * params, {"calls": model_state["calls"] + 1}

    model = from_functions(lambda key: (jnp.ones(()), {"calls": jnp.zeros((), int)}), counting)
    params, state = model.init(KEY)
    _, state = model.apply(params, state, INPUTS, None, True)
    assert state["calls"] == 1


def test_partial_and_jitted_functions_become_models():
    scaled = functools.partial(lambda scale, params, inputs: inputs * scale * params, 2.0)
    model = from_functions(lambda key: 1.0, jax.jit(scaled))
    np.testing.assert_array_equal(model.apply(1.0, {}, INPUTS, None, True)[0], 2 * INPUTS)


@pytest.mark.parametrize(
    ("init", "apply", "sentence"),
    [
        (lambda: 1, affine, r"cannot be called as init\(key\): too many positional"),
        (lambda key, shape: 1, affine, r"init\(key\): missing a required argument: 'shape'"),
        (start, lambda params: 1, r"apply\(params, inputs\), .* key, train, model_state: too many"),
        (start, lambda params, inputs, rng: 1, "missing a required argument: 'rng'"),
        (start, lambda params, model_state, inputs: 1, "multiple values for argument"),
        (start, "affine", "'affine' cannot be called as apply"),
    ],
)
def test_functions_that_do_not_fit_are_errors_when_the_model_is_made(init, apply, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        from_functions(init, apply)


Two = collections.namedtuple("Two", "weight bias")


@pytest.mark.parametrize("result", [Two(1.0, 2.0), [1.0, {}], (1.0, {}, 3), jnp.ones(2), {"a": 1}])
def test_with_model_state_both_functions_give_pairs(result):
    model = from_functions(lambda key: result, lambda params, inputs, model_state: result)
    for call in (lambda: model.init(KEY), lambda: model.apply(1.0, {}, INPUTS, None, True)):
        with pytest.raises(ConfigurationError, match="must give a tuple .*, model_state"):
            call()
