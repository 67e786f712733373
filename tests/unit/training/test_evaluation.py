"""Evaluation of pools and sources, and re-estimated batch statistics of the average model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh
from jaxlocal.models import from_nnx
from jaxlocal.training import evaluation
from jaxlocal.training.evaluation import Evaluation, Reestimation

LAYOUT = Layout(2, 2, weights=[1, 2, 3, 4])


class Examples:
    """A source of examples, which counts the reads."""

    def __init__(self, values):
        self.values, self.reads = values, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, row):
        self.reads += 1
        return {"x": self.values[row]}


def metrics(params, model_state, batch):
    return {"value": batch["x"].sum(-1) * params}


@pytest.mark.optimized
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("chunk_bytes", "chunks"), [(1 << 20, 1), (400, 5)])
def test_a_source_gives_the_same_bits_as_a_pool(monkeypatch, devices, chunk_bytes, chunks):
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", chunk_bytes)
    values = np.random.default_rng(0).normal(size=(157, 3)).astype(np.float32)
    method = jaxlocal.local_sgd(jaxlocal.gradients(lambda w, b, key: w), optax.sgd(0.1))
    round_fn = RoundFn(method, LAYOUT, make_mesh(LAYOUT, jax.devices()[:devices]))
    state = round_fn.init(jnp.float32(2), jax.random.key(0))
    source, some = Examples(values), np.arange(0, 157, 2)
    for chosen in (None, some):
        pool = Evaluation(round_fn, metrics, {"x": values}, chosen, 8)(state)
        streamed = Evaluation(round_fn, metrics, examples=chosen, batch_size=8, source=source)
        assert streamed(state) == pool
        rows = values if chosen is None else values[chosen]
        np.testing.assert_allclose(pool["value"], 2 * rows.sum(-1).mean(), rtol=1e-5, atol=1e-6)
    assert len(list(streamed._chunks())) == -(-chunks // 2)
    with pytest.raises(ConfigurationError, match="at least 1 example, got 0"):
        Evaluation(round_fn, metrics, source=Examples(values[:0]))


class Normed(nnx.Module):
    def __init__(self, momentum, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
        self.count = nnx.Variable(jnp.int32(0))

    def __call__(self, inputs):
        self.count[...] += 1
        return self.norm(self.first(inputs))


def normed(momentum=0.9):
    model = from_nnx(lambda rngs: Normed(momentum, rngs))

    def loss(params, model_state, batch, key):
        outputs, model_state = model.apply(params, model_state, batch, key, True)
        return jnp.square(outputs - 1).mean(), (model_state, {})

    return model, jaxlocal.gradients(loss, stateful=True)


def trained(model, grad_fn, devices, **options):
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.05), period=4, **options)
    round_fn = RoundFn(method, LAYOUT, make_mesh(LAYOUT, jax.devices()[:devices]))
    params, model_state = model.init(jax.random.key(0))
    state = round_fn.init(params, jax.random.key(0), model_state)
    batches = np.random.default_rng(1).normal(3, 2, size=(4, 2, 2, 8, 3)).astype(np.float32)
    return round_fn, round_fn(state, batches)[0]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_reestimated_statistics_are_the_means_over_the_batches(devices, momentum):
    """Against plain numpy: mean and variance of each worker's batches under the average weights."""
    model, grad_fn = normed(momentum)
    round_fn, state = trained(model, grad_fn, devices)
    batches = np.random.default_rng(2).normal(-1, 3, size=(5, 2, 2, 8, 3)).astype(np.float32)
    apply = lambda params, model_state, batch: model.apply(params, model_state, batch, None, True)[
        1
    ]
    parts = ("params", "model_state", "opt_state")
    before = jax.tree.map(lambda x: np.asarray(x).copy(), [getattr(state, part) for part in parts])
    again = Reestimation(round_fn, apply, batches)(state)
    params, averaged = round_fn.mean(state)
    hidden = batches.astype(np.float64) @ np.asarray(params["first"]["kernel"], np.float64)
    hidden = hidden + np.asarray(params["first"]["bias"], np.float64)
    expected = {
        "mean": np.einsum("tdnf,dn->f", hidden.mean(3), LAYOUT.weight) / 5,
        "var": np.einsum("tdnf,dn->f", hidden.var(3), LAYOUT.weight) / 5,
    }
    for name, value in expected.items():
        got = np.asarray(again.model_state["norm"][name])
        np.testing.assert_allclose(got, np.broadcast_to(value, got.shape), rtol=1e-4, atol=1e-4)
        assert not np.allclose(got[0, 0], np.asarray(averaged["norm"][name]), rtol=0.1)
    assert (np.asarray(again.model_state["count"]) == 4).all()  # a counter is left alone
    after = [getattr(state, part) for part in parts]  # the state itself is unchanged
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_values_that_move_in_another_way_stay():
    """A maximum so far and a counter in float32 stay; a running mean is re-estimated."""
    method = jaxlocal.local_sgd(jaxlocal.gradients(lambda w, b, key: w), optax.sgd(0.1))
    round_fn = RoundFn(method, LAYOUT)
    start = {"largest": jnp.float32(2), "count": jnp.float32(7), "mean": jnp.float32(30)}
    state = round_fn.init(jnp.float32(2), jax.random.key(0), start)

    def apply(params, state, batch):
        largest = jnp.maximum(state["largest"], batch.max())
        mean = 0.9 * state["mean"] + 0.1 * batch.mean()
        return {"largest": largest, "count": state["count"] + 1, "mean": mean}

    batches = np.full((3, 2, 2, 4), 2.5, np.float32)
    again = Reestimation(round_fn, apply, batches)(state).model_state
    for name, value in {"largest": 2, "count": 7, "mean": 2.5}.items():
        np.testing.assert_allclose(np.asarray(again[name]), value, rtol=1e-5)
    half = round_fn.init(jnp.float32(2), jax.random.key(0), {"mean": jnp.bfloat16(1)})
    with pytest.raises(ConfigurationError, match="half precision"):
        Reestimation(round_fn, lambda params, state, batch: state, batches)(half)


def test_wrong_examples_of_an_evaluation_are_errors():
    method = jaxlocal.local_sgd(jaxlocal.gradients(lambda w, b, key: w), optax.sgd(0.1))
    round_fn, data = RoundFn(method, LAYOUT), {"x": np.ones((5, 3), np.float32)}
    for wrong in ([7, 8], [-1], np.array([True, False, True, False, True]), [0.5]):
        with pytest.raises(ConfigurationError, match="numbers from 0 to 4"):
            Evaluation(round_fn, metrics, data, np.asarray(wrong))
    with pytest.raises(ConfigurationError, match="not both"):
        Evaluation(round_fn, metrics, data, source=Examples(data["x"]))


def test_values_that_do_not_move_stay():
    method = jaxlocal.local_sgd(jaxlocal.gradients(lambda w, b, key: w), optax.sgd(0.1))
    round_fn = RoundFn(method, LAYOUT)
    state = round_fn.init(jnp.float32(2), jax.random.key(0), {"fixed": jnp.array([1.5, -2.0])})
    apply = lambda params, model_state, batch: model_state
    again = Reestimation(round_fn, apply, np.zeros((3, 2, 2, 4), np.float32))(state)
    fixed = np.asarray(again.model_state["fixed"])
    np.testing.assert_allclose(
        fixed, np.tile([1.5, -2.0], (2, 2, 1)), rtol=1e-6
    )  # a mean of equal values


@pytest.mark.parametrize("method", ["local_sgd", "data_parallel"])
def test_model_states_are_kept_or_averaged_and_their_bits_are_counted(method):
    model, grad_fn = normed()
    ends, sent = {}, {}
    for option in ("keep", "average"):
        built = getattr(jaxlocal, method)(grad_fn, optax.sgd(0.05), model_state=option)
        round_fn = RoundFn(built, Layout(1, 4))
        params, model_state = model.init(jax.random.key(0))
        state = round_fn.init(params, jax.random.key(0), model_state)
        batches = np.random.default_rng(1).normal(size=(1, 1, 4, 8, 3)).astype(np.float32)
        inner, outer = round_fn.stage_bits(state)
        sent[option] = inner.workers + outer.workers
        ends[option] = jax.tree.map(np.asarray, round_fn(state, batches)[0].model_state)
    kept, averaged = ends["keep"]["norm"]["mean"], ends["average"]["norm"]["mean"]
    assert np.ptp(kept, axis=1).max() > 1e-3 and np.ptp(averaged, axis=1).max() == 0
    np.testing.assert_allclose(averaged[0, 0], kept[0].mean(0), rtol=1e-5, atol=1e-7)
    assert sent["average"] - sent["keep"] == 32 * 8  # four means and four variances
    with pytest.raises(ConfigurationError, match="unknown model state option 'averag'"):
        getattr(jaxlocal, method)(grad_fn, optax.sgd(0.05), model_state="averag")


@functools.cache
def plain():
    method = jaxlocal.local_sgd(jaxlocal.gradients(lambda w, b, key: w), optax.sgd(0.1))
    round_fn = RoundFn(method, LAYOUT, make_mesh(LAYOUT, jax.devices()[:1]))
    return round_fn, round_fn.init(jnp.float32(2), jax.random.key(0), {"mean": jnp.zeros(3)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": 1}, r"of shape \[2\] here, and 'x' is int32\[\]"),
        (jnp.float32(1), "must be a dictionary by name, got float32"),
        (None, "must be a dictionary by name, got NoneType"),
        ({"x": jnp.ones(())}, r"of shape \[2\] here, and 'x' is float32\[\]"),
        ({"x": jnp.ones(1)}, r"of shape \[2\] here, and 'x' is float32\[1\]"),
        ({"x": jnp.ones((2, 2))}, r"of shape \[2\] here, and 'x' is float32\[2, 2\]"),
        ({"x": jnp.ones(2, complex)}, r"real numbers .*'x' is complex64\[2\]"),
        ({"x": jax.random.split(jax.random.key(0), 2)}, r"real numbers .*'x' is key<fry>\[2\]"),
        ({"x": {"y": jnp.ones(2)}}, "'x' is dict"),
    ],
    ids=str,
)
def test_metrics_that_are_not_one_number_of_each_example_are_refused(given, message):
    """The mean of a batch, for instance, would count its padding."""
    round_fn, state = plain()
    evaluation = Evaluation(round_fn, lambda *_: given, np.arange(7.0), batch_size=2)
    with pytest.raises(ConfigurationError, match=message):
        evaluation(state)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "2", None])
def test_the_batch_size_of_an_evaluation_is_an_integer(wrong):
    with pytest.raises(ConfigurationError, match=f"batch size .* at least 1, got {wrong!r}"):
        Evaluation(plain()[0], metrics, np.arange(7.0), batch_size=wrong)


def test_examples_of_different_numbers_are_refused():
    """A device would take the last one that is there for those that are not."""
    with pytest.raises(ConfigurationError, match=r"the same number of examples, got \[5, 7\]"):
        Evaluation(plain()[0], metrics, {"x": np.arange(7.0), "y": np.arange(5.0)})


def test_a_reestimated_model_state_of_another_form_is_refused():
    round_fn, state = plain()
    batches = np.ones((2, 2, 2, 4), np.float32)
    for after in ({"mean": jnp.zeros(1)}, {"other": jnp.zeros(3)}, {}, (jnp.ones(4), {})):
        with pytest.raises(ConfigurationError, match="state must be like the one before: "):
            Reestimation(round_fn, lambda *_, after=after: after, batches)(state)
    with pytest.raises(ConfigurationError, match="at least 1 batch, got 0"):
        Reestimation(round_fn, lambda params, model_state, batch: model_state, batches[:0])
