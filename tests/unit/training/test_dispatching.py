"""When the steps of a run are dispatched: its rounds, and their pieces up to measurements."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, training
from jaxlocal.communication import mixing
from jaxlocal.stages.compose import repeat
from jaxlocal.stages.local_step import local_step
from jaxlocal.stages.sync import sync
from jaxlocal.types import Method, Period

SGD = optax.sgd(0.1)
grad_fn = jaxlocal.gradients(lambda w, batch, key: jnp.square(jnp.tanh(w) - batch).mean())


def in_turn(lengths: list[int]) -> Period:
    starts = dict(zip(itertools.accumulate([0, *lengths]), lengths, strict=False))
    return Period(lambda step, remaining: starts[step], f"{lengths}")


@settings(deadline=None)
@given(
    inner=st.integers(1, 4),
    times=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    ending=st.integers(0, 3),
    measure_every=st.integers(0, 60),
    max_chunk=st.integers(1, 64),
)
def test_dispatches_cover_every_step_once_and_are_cut_where_measurements_are_due(
    inner, times, ending, measure_every, max_chunk
):
    lengths, ending = [inner * (n + ending) for n in times], inner * ending
    total, ends = sum(lengths), list(itertools.accumulate(lengths))
    stage = repeat(local_step(grad_fn, optax.sgd(0.1)), inner)
    end = repeat(stage, ending // inner) if ending else sync(mixing.mean())
    method = Method(stage, end, optax.sgd(0.1), in_turn(lengths))
    round_fn = RoundFn(
        method, Layout(), jaxlocal.make_mesh(Layout(), jax.devices()[:1]), max_chunk=max_chunk
    )
    pieces = list(training.dispatches(round_fn, total, measure_every))

    stops = [piece.start + piece.steps for piece in pieces]
    assert [piece.start for piece in pieces] == [0, *stops[:-1]] and stops[-1] == total
    assert all(piece.steps % inner == 0 and piece.steps > 0 for piece in pieces)
    assert all(piece.steps <= max(inner, max_chunk, ending) for piece in pieces)
    assert all(piece.steps == ending for piece in pieces if ending and piece.ends_round)
    assert [stop for piece, stop in zip(pieces, stops, strict=True) if piece.ends_round] == ends
    for piece, stop in zip(pieces, stops, strict=True):
        number = next(n for n, end in enumerate(ends) if stop <= end)
        assert piece.round_length == lengths[number]
    # With hubs, a measurement waits for the first hub average from its step on.
    multiples = range(measure_every, total + 1, measure_every) if measure_every else ends
    wanted = {-(-multiple // inner) * inner for multiple in multiples} | {total}
    # During the steps of an outer stage, it waits for the end of the round.
    waiting = {step: end for end in ends for step in range(end - ending + 1, end)}
    wanted = {waiting.get(step, step) for step in wanted}
    assert {stop for piece, stop in zip(pieces, stops, strict=True) if piece.due} == wanted


def test_steps_that_do_not_divide_are_errors_with_the_nearest_numbers():
    method = jaxlocal.mll_sgd(
        grad_fn, optax.sgd(0.1), matrix=np.full((2, 2), 0.5), local_steps=4, hub_period=1
    )
    with pytest.raises(ConfigurationError, match="10 steps .* the 4 steps .* 8 or 12 would"):
        training.schedule(method, 10)
    with pytest.raises(ConfigurationError, match="3 steps .* the 4 steps .* 4 or 8 would"):
        training.schedule(method, 3)
    with pytest.raises(ConfigurationError, match="at least 1 step, got 0"):
        training.schedule(method, 0)


def test_a_last_round_that_is_too_short_for_its_outer_stage_joins_the_one_before():
    make = lambda delay: jaxlocal.streaming_diloco(
        grad_fn, SGD, period=4, outer_optimizer=None, fragments=1, delay_steps=delay
    )
    assert list(training.schedule(make(1), 10)) == [4, 4, 2]
    assert list(training.schedule(make(2), 10)) == [4, 6]
    assert list(training.schedule(make(2), 6)) == [6]
    assert list(training.schedule(make(2), 3)) == [3]
    with pytest.raises(ConfigurationError, match="H = 2 is too short.*last τ = 2"):
        next(training.schedule(make(2), 2))
    with pytest.raises(ConfigurationError, match="H = 4 is too short.*last τ = 4"):
        next(training.schedule(make(4), 10))
