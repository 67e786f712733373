"""Rules of the period: their rounds make up a run, floors are exact, schedules are in float64."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_periods
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlocal import ConfigurationError, periods
from jaxlocal.periods import lengths, rates


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


ANY = st.one_of(
    st.integers(1, 50).map(periods.constant),
    st.builds(periods.post_local, st.integers(0, 60), st.integers(1, 20)),
    st.integers(0, 60).map(periods.swap),
    st.builds(
        periods.power,
        st.floats(1e-6, 1),
        coefficient=st.floats(0, 2),
        base=st.integers(1, 20),
        exponent=st.sampled_from([1, 2, 3]),
        warmup_steps=st.integers(0, 20),
    ),
)


@given(ANY, st.integers(1, 200))
@settings(deadline=None)
def test_rounds_make_up_the_run_and_none_is_empty(period, total):
    rounds = list(lengths(period, total))
    assert sum(rounds) == total
    assert all(isinstance(steps, int) and steps >= 1 for steps in rounds)


@pytest.mark.parametrize("exponent", [1, 2, 3])
@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.integers(1, 8))
@settings(deadline=None)
def test_the_floor_is_exact(exponent, coefficient, rate, base):
    ratio = Fraction(coefficient / rate)
    expected = max(base, int(ratio**exponent))
    period = periods.power(rate, coefficient=coefficient, base=base, exponent=exponent)
    got = period.length(0, 10**18)
    # Powers of up to 1e12 have 1e-4 as their last digit in float64: next to a whole number either
    # neighbour is right.
    assert got == expected or abs(ratio**exponent - max(got, expected)) < Fraction(1, 1000)


def test_a_period_is_at_least_the_base_and_at_most_what_remains():
    rule = periods.qsr(0.1, coefficient=0.5, base=4)
    assert rule.length(0, 1000) == 25
    assert rule.length(0, 25) == 25 and rule.length(0, 24) == 24 and rule.length(0, 1) == 1
    assert periods.qsr(0.1, coefficient=0.5, base=26).length(0, 1000) == 26
    assert periods.qsr(0.1, coefficient=0.5, base=26).length(0, 3) == 3


def test_rules_are_the_powers_of_their_names():
    rules = {"linear": periods.linear, "quadratic": periods.qsr, "cubic": periods.cubic}
    for (name, rule), expected in zip(rules.items(), (4, 16, 64), strict=True):
        period = rule(0.25, coefficient=1.0, base=1)
        assert period.length(0, 1000) == expected
        assert name in period.description


def test_a_rate_of_zero_lasts_to_the_end_unless_the_coefficient_is_zero_too():
    assert periods.qsr(0.0, coefficient=0.1, base=4).length(7, 93) == 93
    assert periods.qsr(0.0, coefficient=0.0, base=4).length(7, 93) == 4
    assert (
        periods.cubic(1e-300, coefficient=0.1, base=4).length(7, 93) == 93
    )  # its cube is more than a float holds


def test_in_a_warm_up_a_rule_takes_the_peak():
    schedule = optax.warmup_cosine_decay_schedule(1e-6, 0.1, 10, 100)
    for known in ({}, {"warmup_steps": 10}):
        rule = periods.qsr(schedule, coefficient=0.35, base=1, **known)
        assert [rule.length(step, 1000) for step in range(11)] == [12] * 11  # ⌊3.5²⌋
        assert rule.length(60, 1000) > 12


def test_h_in_the_warm_up_can_be_given():
    schedule = optax.warmup_cosine_decay_schedule(1e-6, 0.1, 10, 100)
    rule = periods.qsr(schedule, coefficient=0.35, base=1, warmup_steps=10, warmup_period=4)
    assert list(lengths(rule, 40))[:4] == [4, 4, 4, 12]  # the third starts within the warm-up
    assert rule.length(9, 3) == 3 and "4 in the warm-up" in rule.description
    for options, sentence in [
        ({"warmup_steps": 0}, "needs the length of the warm-up, got 0 steps"),
        ({"warmup_period": 0}, "H in the warm-up must be an integer of at least 1 step, got 0"),
        ({"base": 3, "multiple": 3}, "H = 4 in the warm-up is not a multiple of 3 steps"),
    ]:
        given = {"base": 1, "warmup_steps": 10, "warmup_period": 4, **options}
        with refused(sentence):
            periods.qsr(schedule, coefficient=0.35, **given)


def test_a_warm_up_that_ends_above_the_rate_after_it():
    # As in "cosine_step", whose powers of two begin below the peak.
    schedule = lambda step: jnp.where(step < 10, 0.08 * step / 10, 0.05)
    rule = periods.qsr(schedule, coefficient=0.1, base=1, warmup_steps=10)
    assert [rule.length(step, 1000) for step in (0, 5, 9, 10, 11)] == [4] * 5
    seen = periods.qsr(schedule, coefficient=0.1, base=1)  # its peak is 0.072
    assert [seen.length(step, 1000) for step in (0, 5, 9, 10)] == [1, 1, 1, 4]


@pytest.mark.parametrize(
    ("schedule", "peak_steps"),
    [
        (optax.warmup_cosine_decay_schedule(0.0, 3e-3, 16, 128), range(17)),
        (optax.warmup_constant_schedule(0.0, 3e-3, 16), range(128)),
        (optax.linear_onecycle_schedule(128, 3e-3), range(38)),
        (optax.linear_schedule(0.0, 3e-3, 6000), range(6000)),
        # Nothing for 16 steps, and then all at once.
        (lambda step: jnp.where(step < 16, 0.0, 3e-3), range(16, 128)),
    ],
)
def test_a_warm_up_from_0_is_not_one_long_round(schedule, peak_steps):
    rule = periods.qsr(schedule, coefficient=6e-3, base=2)
    assert {rule.length(step, 10**6) for step in peak_steps} == {4}
    assert rule.length(0, 10**6) in (4, 16)


def test_a_round_ends_before_the_rate_restarts():
    cycle = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 5, "decay_steps": 40}
    schedule = optax.sgdr_schedule([cycle] * 3)
    rule = periods.qsr(schedule, coefficient=0.2, base=2)
    rounds = list(lengths(rule, 120))
    assert rounds == [4, 4, 4, 4, 6, 14, 4] * 3  # of 40 steps in each cycle


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=40),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3)]),
    st.floats(0, 2),
)
@settings(deadline=None, max_examples=30)
def test_rises_against_the_reference(values, exponent, base, coefficient):
    base, multiple = base
    table = jnp.asarray(np.repeat(values, 2))
    exact = np.asarray(table, np.float64)
    at = lambda step: float(exact[min(step, len(exact) - 1)])
    expected = reference_periods.guarded(
        at, 100, coefficient, base, exponent, multiple, known=len(exact)
    )
    rule = periods.power(
        lambda step: table[step],
        coefficient=coefficient,
        base=base,
        exponent=exponent,
        multiple=multiple,
    )
    assert list(lengths(rule, 100)) == expected


def test_peaks_are_found_across_the_blocks_of_a_schedule():
    slow = rates(optax.warmup_cosine_decay_schedule(0.0, 1.0, 10_000, 30_000))
    assert [slow.peak(step) for step in (0, 4095, 4096, 9999, 10_000)] == [1.0] * 5
    assert slow.peak(10_001) == slow(10_001) < 1
    assert slow.first_above(0.5, 20_500, 30_000) is None
    again = rates(lambda step: jnp.where(step == 12_288, 1.0, 0.5 / (1 + step)))
    assert again.first_above(0.5, 1, 10**6) == 12_287  # from which on it rises to step 12,288
    assert again.peak(12_287) == 1.0 and again.peak(12_286) == again(12_286)


def test_on_hubs_a_period_is_a_multiple_of_the_steps_between_hub_averages():
    rule = periods.qsr(lambda step: 0.5 / (1 + step), coefficient=1.0, base=8, multiple=4)
    rounds = list(lengths(rule, 400))
    # At step 8 the rule gives (9 / 0.5)² = 324.
    assert rounds == [8, 324, 68]
    at = lambda rate: periods.linear(rate, coefficient=1.0, base=8, multiple=4).length(0, 1000)
    assert [at(1 / 11.5), at(1 / 12.5), at(1 / 15.5), at(1 / 16.5)] == [8, 12, 12, 16]


def test_changes_at_their_step():
    switch = periods.post_local(3, 4)
    assert [switch.length(step, 100) for step in range(5)] == [1, 1, 1, 4, 4]
    assert [periods.swap(3).length(step, 100) for step in range(5)] == [1, 1, 1, 100, 100]
    assert list(lengths(periods.swap(0), 7)) == [7]
    assert list(lengths(periods.swap(9), 3)) == [1, 1, 1]


def test_no_steps_are_no_rounds():
    assert list(lengths(periods.constant(3), 0)) == []


def test_schedules_are_read_in_float64_while_training_is_in_float32():
    # In float32 0.1 is 0.100000001: (0.2 / 0.1)² would be 3 and not 4.
    assert jnp.asarray(0.1).dtype == jnp.float32
    schedules = [lambda step: jnp.asarray(0.1), lambda step: 0.1, optax.constant_schedule(0.1), 0.1]
    for schedule in schedules:
        assert rates(schedule)(3) == 0.1
        assert periods.qsr(schedule, coefficient=0.2, base=1).length(3, 100) == 4
    # Near the end of a cosine float32 would be wrong by more than a tenth of a percent.
    cosine = optax.cosine_decay_schedule(1.0, 100_000)
    expected = (1 + np.cos(np.pi * 99_990 / 100_000)) / 2
    assert rates(cosine)(99_990) == pytest.approx(expected, rel=1e-6)
    assert not jax.config.jax_enable_x64


def test_schedules_are_read_at_any_step_in_any_order():
    rate_at = rates(lambda step: 1.0 / (1 + step))
    for step in (5000, 0, 4095, 4096, 10**6, 4095, 2**31 + 5):
        assert rate_at(step) == 1 / (1 + step)
        assert isinstance(rate_at(step), float)


def test_schedules_are_evaluated_many_steps_at_once():
    traced = []

    def schedule(step):
        traced.append(step)
        return 0.1 / (1 + step)

    rule = periods.qsr(schedule, coefficient=0.2, base=1)
    assert not traced  # a rule costs nothing before it is used
    for step in range(9000):
        rule.length(step, 10)
    assert len(traced) == 1


def test_descriptions_state_the_rule():
    assert periods.constant(4).description == "constant, H = 4"
    assert (
        periods.qsr(0.1, coefficient=0.0175, base=4).description
        == "quadratic, H = max(4, ⌊(0.0175/η)^2⌋)"
    )
    assert (
        periods.power(0.1, coefficient=1, base=2, exponent=5).description
        == "power 5, H = max(2, ⌊(1/η)^5⌋)"
    )
    assert "until step 7, then 3" in periods.post_local(7, 3).description
    assert "until step 7, then one" in periods.swap(7).description
