"""The transformer against loops over heads and places, and what it may know of a sequence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal.errors import ConfigurationError
from jaxlocal.models import build
from jaxlocal.models.supervised import training_loss
from jaxlocal.models.transformers import transformer

KEY = jax.random.key(0)
LENGTH, VOCABULARY, LAYERS, WIDTH, HEADS = 5, 11, 2, 8, 2
TOKENS = jax.random.randint(KEY, (2, LENGTH), 0, VOCABULARY)


@pytest.fixture(scope="module")
def model():
    return transformer((LENGTH,), VOCABULARY, LAYERS, WIDTH, HEADS)


def drawn(model):
    """Large parameters, so that attention is far from uniform, drawn by numpy."""
    random = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(model.init, KEY)
    return jax.tree.map(lambda leaf: jnp.float32(random.normal(size=leaf.shape)), shapes)


@pytest.fixture(scope="module")
def params(model):
    return drawn(model)


def logits_of(model, params, tokens):
    return np.asarray(jax.jit(lambda *args: model.apply(*args, None, True)[0])(params, {}, tokens))


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def norm(x, layer):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * layer["scale"] + layer["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention_by_hand(rows, layer):
    """Each place on its own, each head on its own, over the places up to it."""
    size = WIDTH // HEADS
    queries, keys, values = np.split(dense(np.stack(rows), layer["queries_keys_values"]), 3, axis=1)
    mixed = []
    for place in range(len(rows)):
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = keys[: place + 1, part] @ queries[place, part] / math.sqrt(size)
            shares = np.exp(scores - scores.max())
            heads.append(shares / shares.sum() @ values[: place + 1, part])
        mixed.append(dense(np.concatenate(heads), layer["out"]))
    return mixed


def transformer_by_hand(params, sequence):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = [params["tokens"][token] + params["places"][n] for n, token in enumerate(sequence)]
    for number in range(LAYERS):
        block = params["blocks"][str(number)]
        mixed = attention_by_hand([norm(row, block["norm1"]) for row in rows], block["attention"])
        rows = [row + more for row, more in zip(rows, mixed, strict=True)]
        hidden = [gelu(dense(norm(row, block["norm2"]), block["up"])) for row in rows]
        rows = [row + dense(h, block["down"]) for row, h in zip(rows, hidden, strict=True)]
    return np.stack([dense(norm(row, params["norm"]), params["logits"]) for row in rows])


def test_it_is_the_papers(model, params):
    expected = np.stack([transformer_by_hand(params, tokens) for tokens in np.asarray(TOKENS)])
    # float32, and shares that a large score can shift.
    np.testing.assert_allclose(logits_of(model, params, TOKENS), expected, rtol=1e-3, atol=1e-3)


def test_counts():
    params, model_state = jax.eval_shape(build("transformer", (128,), 97).init, KEY)
    width = 128
    dense = lambda ins, outs: ins * outs + outs
    block = dense(width, 3 * width) + dense(width, width) + 4 * width
    block += dense(width, 4 * width) + dense(4 * width, width)
    total = 97 * width + 128 * width + 4 * block + 2 * width + dense(width, 97)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total
    assert model_state == {}


def test_a_later_token_changes_no_earlier_logit(model, params):
    before = logits_of(model, params, TOKENS)
    for place in range(LENGTH):
        changed = TOKENS.at[:, place].set((TOKENS[:, place] + 1) % VOCABULARY)
        after = logits_of(model, params, changed)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (after[:, place:] != before[:, place:]).any(axis=(0, 2)).all()


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one(model, params):
    shorter = logits_of(model, params, TOKENS[:, :3])
    np.testing.assert_allclose(
        shorter, logits_of(model, params, TOKENS)[:, :3], rtol=1e-4, atol=1e-4
    )


def test_only_places_tell_the_order_of_what_one_layer_attends_to():
    model = transformer((LENGTH,), VOCABULARY, layers=1, width=WIDTH, heads=HEADS)
    params = drawn(model)
    mixed = TOKENS[:, jnp.array([2, 0, 3, 1, 4])]
    last = lambda params, tokens: logits_of(model, params, tokens)[:, -1]
    assert np.abs(last(params, mixed) - last(params, TOKENS)).max() > 0.01
    placeless = params | {"places": jnp.zeros_like(params["places"])}
    close = {"rtol": 1e-4, "atol": 1e-4}  # float32, summed in another order
    np.testing.assert_allclose(last(placeless, mixed), last(placeless, TOKENS), **close)


def test_it_starts_as_it_says():
    model = transformer((64,), 50, layers=2, width=64)
    params, _ = jax.jit(model.init)(KEY)
    block = params["blocks"]["1"]
    inner = (params["tokens"], params["places"], block["up"]["kernel"], params["logits"]["kernel"])
    ends = (block["down"]["kernel"], block["attention"]["out"]["kernel"])
    for leaves, deviation in ((inner, 0.02), (ends, 0.02 / 2)):
        for leaf in leaves:  # of 3200 draws or more: 1.3 %, four of these
            assert leaf.std() == pytest.approx(deviation, rel=0.05)
    assert not block["up"]["bias"].any()


def test_dropout_follows_the_key_rests_in_evaluation_and_is_off_by_default():
    sizes = {"layers": 1, "width": WIDTH, "heads": HEADS}
    model = transformer((LENGTH,), VOCABULARY, **sizes)
    dropping = transformer((LENGTH,), VOCABULARY, **sizes, dropout=0.5)
    params = drawn(model)

    def logits(model, key, train):
        return np.asarray(model.apply(params, {}, TOKENS, key, train)[0])

    assert (logits(dropping, KEY, True) != logits(dropping, jax.random.key(1), True)).any()
    at_rest = logits(model, None, False)
    np.testing.assert_array_equal(logits(dropping, KEY, False), at_rest)
    np.testing.assert_array_equal(logits(model, KEY, True), at_rest)


def test_workers_learn_alike_under_vmap_and_map():
    """A sequence that counts up is learnt; how a device runs its workers changes nothing."""
    firsts = np.random.default_rng(0).integers(0, VOCABULARY, (16, 1, 2, 8, 1))
    counting = ((firsts + np.arange(LENGTH + 1)) % VOCABULARY).astype(np.int32)
    batches = {"inputs": counting[..., :-1], "targets": counting[..., 1:]}
    model = transformer((LENGTH,), VOCABULARY, layers=1, width=16, heads=HEADS)
    grad_fn = jaxlocal.gradients(training_loss(model, lambda x: x, VOCABULARY), stateful=True)
    start = jax.tree.map(lambda leaf: 0.1 * leaf, drawn(model))
    losses = []
    for worker_map in ("vmap", "map"):
        method = jaxlocal.local_sgd(grad_fn, optax.adam(0.02), period=16, worker_map=worker_map)
        round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
        state, info = round_fn(round_fn.init(start, KEY), batches)
        losses.append(np.asarray(info.worker["loss"]))
    # Adam amplifies gradients that are noise about zero; the loss is what has to agree.
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert losses[0][-1].mean() < losses[0][0].mean() - 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"input_shape": (8, 8, 3)}, r"sequences of tokens \[length\]; .* shape \(8, 8, 3\)"),
        ({"outputs": 1}, "2 tokens or more apart, got 1"),
        ({"layers": 0}, "1 or more layers, got 0"),
        ({"heads": 0}, "1 or more heads, got 0"),
        ({"heads": 3}, "3 heads do not divide a width of 128"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes_are_named(arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        transformer(**{"input_shape": (8,), "outputs": 7, **arguments})
