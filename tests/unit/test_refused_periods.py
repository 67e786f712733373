"""What makes no rule of the period, no learning rate and no schedule is refused in one sentence."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, periods
from jaxlocal.periods import lengths
from jaxlocal.types import Period

SGD = optax.sgd(0.1)


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


def test_rules_that_make_no_sense_are_refused():
    with refused("a period must be an integer of at least 1 step, got 0"):
        periods.constant(0)
    with refused("a period must be an integer of at least 1 step, got -2"):
        periods.post_local(3, -2)
    with refused("a period must be an integer of at least 1 step, got 2.5"):
        periods.constant(2.5)
    with refused("H_base must be an integer of at least 1 step, got 0"):
        periods.qsr(0.1, coefficient=0.2, base=0)
    for wrong in (-0.5, float("nan"), float("inf")):
        with refused(f"the period's coefficient must be a number ≥ 0, got {wrong!r}"):
            periods.linear(0.1, coefficient=wrong, base=4)
    for wrong in (-1, 2.5):
        with refused(f"a warm-up must be an integer of ≥ 0 steps, got {wrong}"):
            periods.qsr(0.1, coefficient=0.2, base=4, warmup_steps=wrong)
    with refused("H_base = 6 steps is not a multiple of 4 steps"):
        periods.cubic(0.1, coefficient=0.2, base=6, multiple=4)
    for wrong in (-1, 1.5, float("nan"), True, "3", None):
        for make in (lambda step: periods.post_local(step, 4), periods.swap):
            with refused(f"to local steps must be at an integer step ≥ 0, got {wrong!r}"):
                make(wrong)


@pytest.mark.parametrize("wrong", [None, "0.1", 1j, True, np.ones(3), SGD, lambda: 0.1])
def test_what_is_no_learning_rate_is_refused(wrong):
    with refused("a learning rate must be a number or a function of the step, got"):
        periods.qsr(wrong, coefficient=0.2, base=4)
    with refused("a learning rate must be a number or a function of the step, got"):
        jaxlocal.scheduled(optax.sgd, wrong)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            lambda step: 0.5 if step < 3 else 0.1,
            "that jax.jit can compile, as those of optax are, with jnp.where for if",
        ),
        (lambda step: 0.5 / int(step), "that jax.jit can compile"),
        (lambda step: None, "must give a number at a step, got NoneType"),
        (lambda step: jnp.ones(1), "must give a number at a step, got float64[1]"),
        (optax.constant_schedule, "must give a number at a step, got function"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, message):
    with refused(message):
        list(lengths(periods.qsr(schedule, coefficient=0.2, base=4), 10))


@pytest.mark.parametrize("wrong", [0, -3, 2.5, 4.0, None, "4", True, float("nan")])
def test_a_rule_that_gives_no_number_of_steps_is_refused(wrong):
    rule = Period(lambda step, remaining: wrong, "mine")
    for listed in (lengths(rule, 10), lengths(periods.split(rule, 2), 10)):
        with refused(f"(mine) must give an integer of at least 1 step, got {wrong!r} at step 0"):
            next(listed)


@pytest.mark.parametrize("steps", [4, np.int64(4), jnp.int32(4)])
def test_a_rule_may_ignore_what_remains(steps):
    found = list(lengths(Period(lambda step, remaining: steps, "mine"), 10))
    assert found == [4, 4, 2] and {type(length) for length in found} == {int}


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_a_rule_refuses_a_rate_that_is_no_rate(rate):
    with pytest.raises(ConfigurationError, match=r"learning rate must be ≥ 0.*step 0"):
        list(lengths(periods.qsr(lambda step: rate + 0 * step, coefficient=0.1, base=4), 10))


@pytest.mark.parametrize(
    "options",
    [
        {"multiple": 0},
        {"exponent": 0},
        {"exponent": 400},
        {"exponent": "2"},
        {"exponent": float("nan")},
        {"coefficient": "0.2"},
        {"base": True},
    ],
)
def test_a_rule_refuses_numbers_that_are_none(options):
    [wrong] = options.values()
    with refused(f"got {wrong!r}"):
        periods.power(0.1, **{"coefficient": 0.1, "base": 4, "exponent": 2, **options})
