"""A round that is one program has the bits of its steps and its end in programs of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn
from jaxlocal.compression import grbs
from jaxlocal.training.pieces import Piece, Pieces

grad_fn = jaxlocal.gradients(
    lambda w, batch, key: jnp.square(jnp.tanh(batch @ w) - jax.random.normal(key)).mean()
)
METHODS = {
    "local_sgd": lambda: jaxlocal.local_sgd(grad_fn, optax.adam(0.1), period=5),
    "diloco": lambda: jaxlocal.diloco(grad_fn, optax.adam(0.1), period=5),
    "cser": lambda: jaxlocal.cser(
        grad_fn, optax.sgd(0.1), gradient_compressor=grbs(4), reset_compressor=grbs(2), period=5
    ),
    "mll_sgd": lambda: jaxlocal.mll_sgd(
        grad_fn, optax.sgd(0.1), matrix=np.full((2, 2), 0.5), local_steps=3, hub_period=2
    ),
    "overlapped": lambda: jaxlocal.streaming_diloco(
        grad_fn, optax.sgd(0.1), period=10, fragments=1, delay_steps=2
    ),
}


@pytest.mark.optimized
@pytest.mark.parametrize("name", METHODS)
def test_a_whole_round_has_the_bits_of_its_parts(name):
    layout = Layout(2, 2, rates=[0.6, 1.0])
    round_fn = RoundFn(METHODS[name](), layout)
    steps, last = {"mll_sgd": (6, 0), "overlapped": (10, 2)}.get(name, (5, 0))
    state = lambda: round_fn.init(jnp.linspace(-1, 1, 64), jax.random.key(0))
    random = np.random.default_rng(0)
    rounds = [random.normal(size=(steps, *layout.shape, 3, 64)).astype("f") for _ in range(2)]

    def run(take):
        now, infos = state(), []
        for batches in rounds:
            now, info = take(now, batches)
            infos.append(info)
        return jax.tree.map(np.asarray, (now._replace(key=()), infos))

    def in_parts(now, batches):
        now, first = round_fn.local_steps(now, batches[: steps - last])
        now, end = round_fn.end_round(now, batches[steps - last :] if last else ())
        join = lambda *parts: np.concatenate([np.asarray(part) for part in parts])
        return now, jax.tree.map(join, first, end) if last else first

    assert [times for times, _ in round_fn.lower(state(), rounds[0])] == [1]
    jax.tree.map(np.testing.assert_array_equal, run(round_fn), run(in_parts))


def test_only_rounds_of_a_constant_length_are_whole():
    pieces = Pieces(METHODS["local_sgd"](), max_chunk=64)
    of = lambda steps, ends: [piece for piece, *_ in pieces.of((), steps, ends)]
    assert of(5, True) == [Piece(5, True)] and of(5, False) == [Piece(5, False)]
    assert of(6, True) == [Piece(4, False), Piece(1, False), Piece(1, False), Piece(0, True)]
    assert list(pieces.chunks(6)) == [4, 1, 1] and list(pieces.chunks(5)) == [5]
    few = Pieces(METHODS["local_sgd"](), max_chunk=4)
    assert [*few.chunks(5)] == [4, 1]  # a long round is cut, so that checkpoints are not rare
    apart = Pieces(METHODS["local_sgd"](), max_chunk=64, whole=False)
    assert [piece for piece, *_ in apart.of((), 5, True)][-1] == Piece(0, True)
    method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1), period=jaxlocal.periods.post_local(9, 5))
    assert [*Pieces(method, 64).chunks(5)] == [4, 1]


def test_each_worker_takes_all_its_steps_before_the_next_begins():
    layout = Layout(workers_per_hub=3)
    mesh = jaxlocal.make_mesh(layout, jax.devices()[:1])
    round_fn = RoundFn(METHODS["local_sgd"](), layout, mesh)
    state = round_fn.init(jnp.ones(4), jax.random.key(0))
    program = round_fn._programs.get(Piece(5, True), state)
    batches = np.ones((5, 1, 3, 2, 4), np.float32)
    traced = jax.make_jaxpr(program)(state, batches, round_fn.context)
    nested = list(loops(traced.jaxpr))
    assert (3,) in nested and (3, 5) in nested and (5,) not in nested


def loops(jaxpr, outside=()):
    """The lengths of the loops of a program, each after those around it."""
    for eqn in jaxpr.eqns:
        inside = outside
        if eqn.primitive.name == "scan":
            inside = (*outside, eqn.params["length"])
            yield inside
        for inner in core.jaxprs_in_params(eqn.params):
            yield from loops(inner, inside)


def test_a_round_without_steps_before_its_end_is_not_lowered():
    round_fn = RoundFn(METHODS["overlapped"](), Layout(2, 2))
    state = round_fn.init(jnp.ones(4), jax.random.key(0))
    with pytest.raises(ConfigurationError, match="H = 2 is too short"):
        round_fn.lower(state, np.ones((2, 2, 2, 3, 4), np.float32))
