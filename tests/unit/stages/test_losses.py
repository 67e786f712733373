"""What a loss, a gradient function and a metric may be, and the sentence where one is not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn
from jaxlocal.stages.gradient import accumulate, gradients

PARAMS = {"w": jnp.ones(3)}
BATCH = jnp.ones(3)


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


NO_SCALAR = (
    "a loss must return a real floating-point number of shape [], such as the mean over its "
    "examples, got "
)
WRONG_LOSSES = {
    "a pair": (lambda w: (w.sum(), {}), "a loss must return a scalar, got a tuple of 2; with "),
    "a vector": (lambda w: w, NO_SCALAR + "float32[3]"),
    "a vector of one": (lambda w: w[:1], NO_SCALAR + "float32[1]"),
    "nothing": (lambda w: None, NO_SCALAR + "NoneType"),
    "an integer": (lambda w: w.sum().astype(int), NO_SCALAR + "int32[]"),
    "a truth value": (lambda w: w.sum() > 0, NO_SCALAR + "bool[]"),
    "a complex number": (lambda w: w.sum().astype(complex), NO_SCALAR + "complex64[]"),
    "text": (lambda w: "loss", NO_SCALAR + "str"),
    "a dictionary": (lambda w: {"loss": w.sum()}, NO_SCALAR + "dict"),
}


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("kind", WRONG_LOSSES)
def test_a_loss_that_is_no_scalar_is_refused(kind, stateful):
    value, message = WRONG_LOSSES[kind]
    if stateful:
        loss = lambda params, model_state, batch, key: (value(params["w"]), (model_state, {}))
    else:
        loss = lambda params, batch, key: value(params["w"])
    with refused(message):
        gradients(loss, stateful)(PARAMS, {}, BATCH, None)


@pytest.mark.parametrize(
    "returned",
    [
        lambda value: value,
        lambda value: (value, {}),
        lambda value: (value, {}, {}),
        lambda value: None,
    ],
)
def test_a_stateful_loss_that_returns_another_form_is_refused(returned):
    loss = lambda params, model_state, batch, key: returned(params["w"].sum())
    with refused("a loss with stateful=True must return (scalar, (model_state, metrics)), got"):
        gradients(loss, stateful=True)(PARAMS, {}, BATCH, None)


OURS = "under which jaxlocal itself reports"
WRONG_METRICS = {
    "loss": ({"loss": 0.0}, f"a metric may not be called 'loss', {OURS}"),
    "active": ({"active": 0.0}, f"a metric may not be called 'active', {OURS}"),
    "nested": ({"top": {"1": 0.5}}, "real numbers of shape [], and 'top' is dict"),
    "a vector": ({"norms": jnp.ones(2)}, "real numbers of shape [], and 'norms' is float32[2]"),
    "a list": ({"norms": [1.0, 2.0]}, "real numbers of shape [], and 'norms' is list"),
    "text": ({"name": "mlp"}, "real numbers of shape [], and 'name' is str"),
    "nothing": ({"accuracy": None}, "real numbers of shape [], and 'accuracy' is NoneType"),
    "complex": ({"z": 1j}, "real numbers of shape [], and 'z' is complex64[]"),
    "a key": ({"key": jax.random.key(0)}, "real numbers of shape [], and 'key' is key<fry>[]"),
    "no name": ({0: 0.5}, "real numbers of shape [], and 0 is float32[]"),
    "no dictionary": (0.5, "metrics must be a dictionary of scalars by name, got float32[]"),
}


@pytest.mark.parametrize("kind", WRONG_METRICS)
def test_a_metric_that_is_no_scalar_or_has_a_name_of_the_library_is_refused(kind):
    metrics, message = WRONG_METRICS[kind]
    loss = lambda params, model_state, batch, key: (params["w"].sum(), (model_state, metrics))
    with refused(message):
        gradients(loss, stateful=True)(PARAMS, {}, BATCH, None)


def test_scalars_of_all_real_types_are_metrics():
    metrics = {"a": 1, "b": True, "c": 0.5, "d": np.float64(1), "e": jnp.bfloat16(2)}
    loss = lambda params, model_state, batch, key: (params["w"].sum(), (model_state, metrics))
    assert set(gradients(loss, stateful=True)(PARAMS, {}, BATCH, None)[2]) == {"loss", *metrics}


def grad_fn(grads=None, metrics=None, returned=None):
    """An own gradient function, whose gradients or metrics are replaced."""

    def fn(params, model_state, batch, key):
        own = {"w": jnp.ones(3)} if grads is None else grads
        reported = {"loss": jnp.ones(())} if metrics is None else metrics
        return (own, model_state, reported) if returned is None else returned

    return fn


LIKE = "the gradients must be like the parameters: "
INTEGERS = np.ones(3, int)
WRONG_GRADIENTS = {
    "shape [1]": (grad_fn({"w": jnp.ones(1)}), LIKE + "w is float32[3] there, and float32[1] here"),
    "a scalar": (grad_fn({"w": 1.0}), LIKE + "w is float32[3] there, and float32[] here"),
    "integers": (
        grad_fn({"w": INTEGERS}),
        LIKE + "w is float32[3] there, and int32[3] here",
    ),
    "complex": (
        grad_fn({"w": jnp.ones(3, complex)}),
        LIKE + "w is float32[3] there, and complex64[3] here",
    ),
    "missing": (grad_fn({}), LIKE + "w is float32[3] there, and nothing here"),
    "too many": (
        grad_fn({"w": jnp.ones(3), "v": 1.0}),
        LIKE + "v is nothing there, and float32[] here",
    ),
    "active": (grad_fn(metrics={"active": 0.5}), "a metric may not be called 'active'"),
    "loss": (grad_fn(metrics={"loss": jnp.ones(2)}), "and 'loss' is float32[2]"),
    "a pair": (grad_fn(returned=({}, {})), "grad_fn must return (gradients, model_state, metrics)"),
}
METHODS = {
    "local_sgd": lambda fn: jaxlocal.local_sgd(fn, optax.sgd(0.1)),
    "data_parallel": lambda fn: jaxlocal.data_parallel(fn, optax.sgd(0.1)),
    "csea": lambda fn: jaxlocal.csea(fn, optax.sgd(0.1), reset_compressor="grbs:2"),
}


def lower(method, model_state=None):
    round_fn = RoundFn(method, Layout(1, 2))
    batches = jax.ShapeDtypeStruct((1, 1, 2, 3), jnp.float32)
    return round_fn.lower(round_fn.shapes(PARAMS, model_state), batches)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", WRONG_GRADIENTS)
def test_gradients_that_are_not_like_the_parameters_are_refused(kind, method):
    wrong, message = WRONG_GRADIENTS[kind]
    with refused(message):
        lower(METHODS[method](wrong))


def test_gradients_of_another_precision_are_taken():
    lower(METHODS["local_sgd"](grad_fn({"w": jnp.ones(3, jnp.bfloat16)})))


WRONG_STATES = {
    "shape": ({"mean": jnp.ones(3)}, "mean is float32[2] there, and float32[3] here"),
    "dtype": (
        {"mean": np.float16([0, 0])},
        "mean is float32[2] there, and float16[2] here",
    ),
    "missing": ({}, "mean is float32[2] there, and nothing here"),
    "nothing": (None, "mean is float32[2] there, and nothing here"),
    "text": ({"mean": "text"}, "mean is float32[2] there, and str here"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", WRONG_STATES)
def test_a_model_state_that_changes_its_form_is_refused(kind, method):
    wrong, message = WRONG_STATES[kind]
    loss = lambda params, model_state, batch, key: (params["w"] @ batch, (wrong, {}))
    with refused(f"the model state after a step must be like the one before: {message}"):
        lower(METHODS[method](gradients(loss, stateful=True)), {"mean": jnp.zeros(2)})


def test_micro_batches_refuse_what_the_whole_batch_does():
    loss = lambda params, model_state, batch, key: (params["w"].sum(), (model_state, {"a": {}}))
    with refused("real numbers of shape [], and 'a' is dict"):
        accumulate(gradients(loss, stateful=True), 3)(PARAMS, {}, BATCH, jax.random.key(0))
