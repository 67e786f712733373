"""Label smoothing and mixup of the training loss against float64 loops."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import ConfigurationError
from jaxlocal.models import Model, evaluation_metrics, training_loss

RANDOM = np.random.default_rng(0)
EXAMPLES, FEATURES, LOGITS = 12, 3, 5
INPUTS = RANDOM.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
WEIGHT = RANDOM.normal(size=(FEATURES, LOGITS)).astype(np.float32)
LABELS = RANDOM.integers(0, 4, EXAMPLES).astype(np.int32)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 logarithms of sums against float64 ones
KEY = jax.random.key(3)


def linear(one_logit=False, seen=None):
    """Logits inputs @ params, of which the first alone with one logit."""

    def apply(params, model_state, inputs, key, train):
        if seen is not None:
            seen.append(inputs)
        outputs = inputs @ params
        return outputs[..., 0] if one_logit else outputs, model_state

    return Model(lambda key: (jnp.zeros((FEATURES, LOGITS)), {}), apply)


def loss_of(classes, one_logit=False, seen=None, **options):
    loss = training_loss(linear(one_logit, seen), lambda inputs: inputs, classes, **options)

    def value(inputs=INPUTS, labels=LABELS, key=KEY):
        batch = {"inputs": jnp.asarray(inputs), "targets": jnp.asarray(labels)}
        return loss(jnp.asarray(WEIGHT), {}, batch, key)[0]

    return value


def expected_loss(inputs, chances, one_logit=False):
    """Cross-entropy to the chances of classes, [n, classes], by one example after another."""
    total = 0.0
    for x, chance in zip(inputs.astype(np.float64), chances, strict=True):
        logits = x @ WEIGHT.astype(np.float64)
        if one_logit:
            logits = np.array([0.0, logits[0]])
        log_sum = np.log(np.exp(logits).sum())
        total += sum(q * (log_sum - logits[c]) for c, q in enumerate(chance))
    return total / len(inputs)


def chances_of(labels, classes, smoothing=0.0):
    chances = np.full((len(labels), classes), smoothing / classes)
    for row, label in zip(chances, labels, strict=True):
        row[label] += 1 - smoothing
    return chances


@pytest.mark.parametrize(
    ("classes", "one_logit"), [(5, False), (4, False), (2, False), (2, True)]
)  # of 4 and 2 classes there are more logits than classes
def test_label_smoothing_gives_every_class_its_part(classes, one_logit):
    labels = LABELS % classes
    got = loss_of(classes, one_logit, label_smoothing=0.4)(labels=labels)
    expected = expected_loss(INPUTS, chances_of(labels, classes, 0.4), one_logit)
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert abs(expected - expected_loss(INPUTS, chances_of(labels, classes), one_logit)) > 0.01


def test_label_smoothing_of_sequences_is_the_mean_over_positions():
    got = loss_of(5, label_smoothing=0.2)(INPUTS.reshape(4, 3, -1), LABELS.reshape(4, 3))
    np.testing.assert_allclose(got, expected_loss(INPUTS, chances_of(LABELS, 5, 0.2)), **CLOSE)


def test_a_label_that_is_no_class_stays_nan_when_it_is_smoothed():
    assert np.isnan(loss_of(5, label_smoothing=0.1)(labels=np.full(EXAMPLES, 5)))


@pytest.mark.parametrize(("classes", "one_logit"), [(5, False), (2, True)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_mixes_inputs_and_the_chances_of_classes_alike(classes, one_logit, smoothing):
    labels, seen = LABELS % classes, []
    got = loss_of(classes, one_logit, seen, mixup=0.4, label_smoothing=smoothing)(labels=labels)
    (mixed,) = seen
    share = (mixed[0] - INPUTS[-1])[0] / (INPUTS[0] - INPUTS[-1])[0]
    assert 0.01 < share < 0.99
    expected, chances = [], []
    of_labels = chances_of(labels, classes, smoothing)
    for n in range(EXAMPLES):
        expected.append(share * INPUTS[n] + (1 - share) * INPUTS[n - 1])
        chances.append(share * of_labels[n] + (1 - share) * of_labels[n - 1])
    np.testing.assert_allclose(mixed, expected, **CLOSE)
    np.testing.assert_allclose(got, expected_loss(np.array(expected), chances, one_logit), **CLOSE)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_share_of_mixup_has_the_moments_of_beta(alpha):
    pair = np.array([[1.0, 0, 0], [0.0, 0, 0]], np.float32)

    def share(key):
        seen = []
        loss_of(5, seen=seen, mixup=alpha)(pair, LABELS[:2], key)
        return seen[0][0, 0]

    shares = np.asarray(jax.vmap(share)(jax.random.split(KEY, 4000)), np.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    # Four standard errors of a mean, and of a variance of values in [0, 1].
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(variance / 4000)
    assert abs(shares.var() - variance) < 4 * 0.25 / np.sqrt(4000)


def test_every_worker_and_step_has_its_own_share():
    loss = training_loss(linear(), lambda inputs: inputs, 5, mixup=0.4)
    method = jaxlocal.local_sgd(jaxlocal.gradients(loss, stateful=True), optax.sgd(0.0), period=2)
    round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    grid = lambda x: jnp.broadcast_to(jnp.asarray(x), (2, 1, 2, *x.shape))
    batches = {"inputs": grid(INPUTS), "targets": grid(LABELS)}
    losses = []
    for seed in (0, 0, 1):
        state = round_fn.init(jnp.asarray(WEIGHT), jax.random.key(seed))
        losses.append(np.asarray(round_fn(state, batches)[1].worker["loss"]).ravel())
    assert len({*losses[0], *losses[2]}) == 8
    np.testing.assert_array_equal(losses[0], losses[1])


def test_without_them_the_loss_and_the_key_of_the_model_are_what_they_were():
    keys = []

    def apply(params, model_state, inputs, key, train):
        keys.append(key)
        return inputs @ params, model_state

    model = Model(lambda key: ((), {}), apply)
    batch = {"inputs": jnp.asarray(INPUTS), "targets": jnp.asarray(LABELS)}
    value = training_loss(model, lambda x: x, 5)(jnp.asarray(WEIGHT), {}, batch, KEY)[0]
    assert keys == [KEY]
    np.testing.assert_allclose(value, expected_loss(INPUTS, chances_of(LABELS, 5)), **CLOSE)
    metrics = evaluation_metrics(model, lambda x: x, 5)(jnp.asarray(WEIGHT), {}, batch)
    np.testing.assert_allclose(metrics["loss"].mean(), value, **CLOSE)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in [0, 1), got -0.1"),
        ({"mixup": -1.0}, "mixup must be a number α ≥ 0, got -1.0"),
        ({"mixup": float("nan")}, "mixup must be a number α ≥ 0, got nan"),
        ({"mixup": "0.2"}, "mixup must be a number α ≥ 0, got '0.2'"),
    ],
)
def test_options_out_of_their_range_are_refused(options, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        training_loss(linear(), lambda x: x, 5, **options)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"mixup": 0.2}])
def test_regressions_are_refused(options):
    with pytest.raises(ConfigurationError, match="classes=0 is a regression"):
        training_loss(linear(), lambda x: x, 0, **options)


@pytest.mark.parametrize(
    ("inputs", "key", "sentence"),
    [
        (np.ones((4, FEATURES), np.int32), KEY, "which tokens are not, got int32[4, 3]"),
        (INPUTS[:1], KEY, "mixes the examples of a batch, which has 1"),
        (INPUTS[:4], None, "draws from the key of a loss, and got None"),
    ],
)
def test_batches_that_mixup_cannot_mix_are_refused(inputs, key, sentence):
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        loss_of(5, mixup=0.2)(inputs, LABELS[: len(inputs)], key)
