"""Losses and metrics of examples against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlocal
from jaxlocal import ConfigurationError
from jaxlocal.models import Model, evaluation_metrics, example_metrics, training_loss

RANDOM = np.random.default_rng(0)
EXAMPLES = 64
LOGITS = RANDOM.normal(scale=4, size=(EXAMPLES, 5)).astype(np.float32)
LABELS = RANDOM.integers(0, 5, EXAMPLES).astype(np.int32)
VALUES = RANDOM.normal(size=EXAMPLES).astype(np.float32)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 logarithms of sums against float64 ones


def cross_entropy(logits, labels):
    logits = logits.astype(np.float64)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]


def numpy_metrics(outputs, targets, classes):
    if classes == 0:
        return {"loss": 0.5 * (outputs.astype(np.float64) - targets) ** 2}
    if outputs.ndim == 1:  # the logit of class 1, that of class 0 being zero
        outputs = np.stack([np.zeros_like(outputs), outputs], axis=1)
    loss = cross_entropy(outputs, targets)
    return {"loss": loss, "accuracy": outputs.argmax(axis=1) == targets}


@pytest.mark.parametrize(
    ("outputs", "targets", "classes"),
    [
        (LOGITS, LABELS, 5),
        (LOGITS[:, :2], LABELS % 2, 2),
        (LOGITS[:, 0], LABELS % 2, 2),
        (LOGITS[:, 0], VALUES, 0),
    ],
    ids=["softmax", "softmax of two", "sigmoid", "regression"],
)
def test_metrics_of_examples_are_those_of_numpy(outputs, targets, classes):
    got = example_metrics(jnp.asarray(outputs), jnp.asarray(targets), classes)
    expected = numpy_metrics(outputs, targets, classes)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.shape == (EXAMPLES,)
        np.testing.assert_allclose(value, expected[name], **CLOSE)


def test_metrics_of_a_sequence_are_means_over_its_positions():
    logits = RANDOM.normal(size=(3, 7, 5)).astype(np.float32)
    targets = RANDOM.integers(0, 5, (3, 7)).astype(np.int32)
    got = example_metrics(jnp.asarray(logits), jnp.asarray(targets), 5)
    positions = [numpy_metrics(logits[:, at], targets[:, at], 5) for at in range(7)]
    assert got.keys() == {"loss", "accuracy"}
    for name, value in got.items():
        assert value.shape == (3,) and value.dtype == jnp.float32
        np.testing.assert_allclose(value, np.mean([p[name] for p in positions], axis=0), **CLOSE)


def test_large_logits_do_not_overflow():
    logits, targets = jnp.array([1e4, -1e4, -1e4]), jnp.array([1, 1, 0])
    np.testing.assert_array_equal(example_metrics(logits, targets, 2)["loss"], [0, 1e4, 0])
    both = jnp.stack([jnp.zeros(3), logits], axis=1)
    np.testing.assert_array_equal(example_metrics(both, targets, 2)["loss"], [0, 1e4, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_losses_of_half_precision_outputs_are_computed_in_float32(dtype):
    outputs = jnp.asarray(LOGITS).astype(dtype)
    got = example_metrics(outputs, jnp.asarray(LABELS), 5)["loss"]
    assert got.dtype == jnp.float32
    # The outputs are rounded; the loss of the rounded outputs is not.
    np.testing.assert_allclose(got, cross_entropy(np.asarray(outputs, np.float32), LABELS), **CLOSE)


def affine(seen):
    """Logits inputs @ params + model_state; it records the key and `train` of each call."""

    def apply(params, model_state, inputs, key, train):
        seen.append((key, train))
        return inputs @ params + model_state["shift"][None], {"shift": model_state["shift"] + 1}

    return Model(lambda key: (jnp.zeros((3, 5)), {"shift": jnp.zeros(5)}), apply)


def halve(inputs):
    return inputs.astype(jnp.float32) / 2


INPUTS = RANDOM.integers(0, 256, (EXAMPLES, 3)).astype(np.uint8)
WEIGHT = RANDOM.normal(scale=0.02, size=(3, 5)).astype(np.float32)
BATCH = {"inputs": jnp.asarray(INPUTS), "targets": jnp.asarray(LABELS)}
STATE = {"shift": jnp.arange(5.0)}
OUTPUTS = INPUTS / 2 @ WEIGHT.astype(np.float64) + np.arange(5)


def test_the_training_loss_is_the_mean_over_the_batch_and_carries_the_model_state():
    seen = []
    loss = training_loss(affine(seen), halve, 5)
    key = jax.random.key(0)
    value, (model_state, metrics) = loss(jnp.asarray(WEIGHT), STATE, BATCH, key)
    np.testing.assert_allclose(value, cross_entropy(OUTPUTS, LABELS).mean(), **CLOSE)
    np.testing.assert_array_equal(model_state["shift"], np.arange(5) + 1)
    assert metrics == {} and seen == [(key, True)]


def test_the_gradient_of_the_training_loss_is_that_of_softmax_regression():
    grad_fn = jaxlocal.gradients(training_loss(affine([]), halve, 5), stateful=True)
    grads, _, metrics = grad_fn(jnp.asarray(WEIGHT), STATE, BATCH, None)
    chances = np.exp(OUTPUTS) / np.exp(OUTPUTS).sum(axis=1, keepdims=True)
    expected = (INPUTS / 2).T @ (chances - np.eye(5)[LABELS]) / EXAMPLES
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-4)  # of inputs up to 127
    assert metrics.keys() == {"loss"}


def test_evaluation_metrics_are_those_of_the_model_in_evaluation():
    seen = []
    got = evaluation_metrics(affine(seen), halve, 5)(jnp.asarray(WEIGHT), STATE, BATCH)
    assert seen == [(None, False)]
    np.testing.assert_allclose(got["loss"], cross_entropy(OUTPUTS, LABELS), **CLOSE)
    np.testing.assert_array_equal(got["accuracy"], OUTPUTS.argmax(axis=1) == LABELS)


@pytest.mark.parametrize(
    ("outputs", "targets", "classes"),
    [
        ((4, 1), (4,), 2),
        ((4, 2), (4,), 0),
        ((4,), (4,), 10),
        ((4, 3), (4,), 10),
        ((4, 9), (4, 8), 9),
    ],
)
def test_outputs_that_do_not_fit_the_targets_are_errors(outputs, targets, classes):
    with pytest.raises(ConfigurationError, match=r"outputs of shape .* do not fit targets"):
        example_metrics(jnp.zeros(outputs), jnp.zeros(targets, jnp.int32), classes)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, np.int16])
@pytest.mark.parametrize("logits", [LOGITS, LOGITS[:, 0]], ids=["softmax", "sigmoid"])
def test_a_label_that_is_no_class_has_the_loss_nan_and_is_not_right(logits, dtype):
    classes = 2 if logits.ndim == 1 else 4  # there is one more logit than classes
    labels = np.zeros(EXAMPLES, dtype)
    wrong = np.array([classes, classes + 1, 100, -1 if np.iinfo(dtype).min else 200], dtype)
    labels[: len(wrong)] = wrong
    got = example_metrics(jnp.asarray(logits), jnp.asarray(labels), classes)
    assert np.isnan(got["loss"]).tolist() == [True] * 4 + [False] * (EXAMPLES - 4)
    assert not got["accuracy"][:4].any() and got["accuracy"][4:].any()


def test_labels_of_all_integer_types_and_truth_values_are_classes():
    logits = jnp.asarray(LOGITS)
    for dtype in (np.uint8, np.int8, np.uint32, bool):
        labels = (LABELS % 2).astype(dtype)
        got, expected = (
            example_metrics(logits, jnp.asarray(of), 5)["loss"] for of in (labels, LABELS % 2)
        )
        np.testing.assert_array_equal(got, expected)
    many = jnp.zeros((2, 300))
    assert np.isfinite(example_metrics(many, jnp.array([255, 0], jnp.uint8), 300)["loss"]).all()


def test_a_token_beyond_the_vocabulary_makes_the_loss_of_its_sequence_nan():
    targets = jnp.array([[0, 1, 2], [0, 5, 2]])
    loss = example_metrics(jnp.zeros((2, 3, 5)), targets, 5)["loss"]
    assert np.isnan(loss).tolist() == [False, True]


def test_truth_values_of_a_sequence_are_of_two_classes():
    logits = jnp.asarray(RANDOM.normal(size=(3, 7)).astype(np.float32))
    got = example_metrics(logits, jnp.ones((3, 7), int), 2)["loss"]
    np.testing.assert_allclose(got, np.log1p(np.exp(-np.asarray(logits))).mean(1), **CLOSE)


@pytest.mark.parametrize("classes", [1, -1, 2.0, None, True, "10"])
def test_a_number_of_classes_is_0_or_2_or_more(classes):
    sentence = "classes must be 0 for regression, or their number of 2 or more"
    for make in (training_loss, evaluation_metrics):
        with pytest.raises(ConfigurationError, match=sentence):
            make(affine([]), halve, classes)
    with pytest.raises(ConfigurationError, match=sentence):
        example_metrics(jnp.zeros(3), jnp.zeros(3), classes)


@pytest.mark.parametrize(
    ("outputs", "targets", "sentence"),
    [
        (jnp.zeros((4, 5)), jnp.zeros(4), "targets must be integers from 0 to 4, got float32"),
        (jnp.zeros((2, 5)), np.array([0, 2**40]), "targets from 0 to 1099511627776 do not fit in"),
        (jnp.zeros((4, 5)), np.array(list("abcd")), "integers from 0 to 4, got <U1"),
        (jnp.zeros((4, 5)), np.array([0, None, 1, 2]), "integers from 0 to 4, got object"),
        (jnp.zeros((4, 5)), jnp.zeros((4, 1), int), "do not fit targets of shape"),
        (jnp.zeros((4, 5)), [0, 1, 2, 3], "the targets of a loss must be one array, got list"),
        ((jnp.zeros((4, 5)), 0), jnp.zeros(4, int), "the outputs of a loss must be one array"),
        (jnp.zeros(5), jnp.zeros((), int), "do not fit targets of shape"),
    ],
)
def test_outputs_and_targets_of_another_kind_are_errors(outputs, targets, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        example_metrics(outputs, targets, 5)


@pytest.mark.parametrize("batch", [{"inputs": INPUTS}, {"x": INPUTS}, {}, INPUTS, (INPUTS, LABELS)])
def test_a_batch_has_inputs_and_targets(batch):
    loss, metrics = (make(affine([]), halve, 5) for make in (training_loss, evaluation_metrics))
    for call in (lambda: loss(WEIGHT, STATE, batch, None), lambda: metrics(WEIGHT, STATE, batch)):
        with pytest.raises(ConfigurationError, match='a dictionary of "inputs" and "targets", got'):
            call()
