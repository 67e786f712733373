"""The transformer against loops over heads and positions, and what its logits depend on."""

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
    """One position and one head at a time, over the positions up to it."""
    size = WIDTH // HEADS
    queries, keys, values = np.split(dense(np.stack(rows), layer["queries_keys_values"]), 3, axis=1)
    mixed = []
    for position in range(len(rows)):
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            scores = keys[: position + 1, part] @ queries[position, part] / math.sqrt(size)
            shares = np.exp(scores - scores.max())
            heads.append(shares / shares.sum() @ values[: position + 1, part])
        mixed.append(dense(np.concatenate(heads), layer["out"]))
    return mixed


def transformer_by_hand(params, sequence):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = [params["tokens"][token] + params["positions"][n] for n, token in enumerate(sequence)]
    for number in range(LAYERS):
        block = params["blocks"][str(number)]
        mixed = attention_by_hand([norm(row, block["norm1"]) for row in rows], block["attention"])
        rows = [row + more for row, more in zip(rows, mixed, strict=True)]
        hidden = [gelu(dense(norm(row, block["norm2"]), block["up"])) for row in rows]
        rows = [row + dense(h, block["down"]) for row, h in zip(rows, hidden, strict=True)]
    return np.stack([dense(norm(row, params["norm"]), params["logits"]) for row in rows])


def test_it_is_that_of_the_paper(model, params):
    expected = np.stack([transformer_by_hand(params, tokens) for tokens in np.asarray(TOKENS)])
    # In float32; a large score can shift the weights of the softmax.
    np.testing.assert_allclose(logits_of(model, params, TOKENS), expected, rtol=1e-3, atol=1e-3)


def test_number_of_parameters():
    params, model_state = jax.eval_shape(build("transformer", (128,), 97).init, KEY)
    width = 128
    dense = lambda ins, outs: ins * outs + outs
    block = dense(width, 3 * width) + dense(width, width) + 4 * width
    block += dense(width, 4 * width) + dense(4 * width, width)
    total = 97 * width + 128 * width + 4 * block + 2 * width + dense(width, 97)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total
    assert model_state == {}


def test_a_later_token_does_not_change_earlier_logits(model, params):
    logits = jax.jit(lambda tokens: model.apply(params, {}, tokens, None, True)[0])
    before = np.asarray(logits(TOKENS))
    for position in range(LENGTH):
        changed = TOKENS.at[:, position].set((TOKENS[:, position] + 1) % VOCABULARY)
        after = np.asarray(logits(changed))
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).any(axis=(0, 2)).all()


def test_logits_of_a_shorter_sequence_are_the_first_of_a_longer_one(model, params):
    shorter = logits_of(model, params, TOKENS[:, :3])
    np.testing.assert_allclose(
        shorter, logits_of(model, params, TOKENS)[:, :3], rtol=1e-4, atol=1e-4
    )


def test_attention_depends_on_the_order_only_by_the_positions():
    model = transformer((LENGTH,), VOCABULARY, layers=1, width=WIDTH, heads=HEADS)
    params = drawn(model)
    mixed = TOKENS[:, jnp.array([2, 0, 3, 1, 4])]
    last = lambda params, tokens: logits_of(model, params, tokens)[:, -1]
    assert np.abs(last(params, mixed) - last(params, TOKENS)).max() > 0.01
    without_positions = params | {"positions": jnp.zeros_like(params["positions"])}
    close = {"rtol": 1e-4, "atol": 1e-4}  # float32, summed in another order
    np.testing.assert_allclose(
        last(without_positions, mixed), last(without_positions, TOKENS), **close
    )


def test_initial_weights_have_the_documented_deviations():
    model = transformer((64,), 50, layers=2, width=64)
    params, _ = jax.jit(model.init)(KEY)
    block = params["blocks"]["1"]
    inner = (
        params["tokens"],
        params["positions"],
        block["up"]["kernel"],
        params["logits"]["kernel"],
    )
    ends = (block["down"]["kernel"], block["attention"]["out"]["kernel"])
    for leaves, deviation in ((inner, 0.02), (ends, 0.02 / 2)):
        for leaf in leaves:  # four standard errors of 3200 draws or more, 1.3 % each
            assert leaf.std() == pytest.approx(deviation, rel=0.05)
    assert not block["up"]["bias"].any()


def test_dropout_depends_on_the_key_and_is_off_in_evaluation_and_by_default():
    sizes = {"layers": 1, "width": WIDTH, "heads": HEADS}
    model = transformer((LENGTH,), VOCABULARY, **sizes)
    dropping = transformer((LENGTH,), VOCABULARY, **sizes, dropout=0.5)
    params = drawn(model)

    apply = {model: jax.jit(model.apply, static_argnums=4) for model in (model, dropping)}

    def logits(model, key, train):
        return np.asarray(apply[model](params, {}, TOKENS, key, train)[0])

    assert (logits(dropping, KEY, True) != logits(dropping, jax.random.key(1), True)).any()
    in_evaluation = logits(model, None, False)
    np.testing.assert_array_equal(logits(dropping, KEY, False), in_evaluation)
    np.testing.assert_array_equal(logits(model, KEY, True), in_evaluation)


@pytest.mark.slow
def test_workers_learn_alike_under_vmap_and_map():
    """Workers learn to count up, and vmap and map give the same losses."""
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
    # Adam amplifies gradients that are noise around zero, so only the losses have to agree.
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert losses[0][-1].mean() < losses[0][0].mean() - 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"input_shape": (8, 8, 3)}, r"sequences of tokens \[length\]; .* shape \(8, 8, 3\)"),
        ({"outputs": 1}, "vocabulary of 2 tokens or more, got 1"),
        ({"layers": 0}, "1 or more layers, got 0"),
        ({"heads": 0}, "1 or more heads, got 0"),
        ({"heads": 3}, "3 heads do not divide a width of 128"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes_are_errors(arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        transformer(**{"input_shape": (8,), "outputs": 7, **arguments})
