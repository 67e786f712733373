"""Time slots against their distribution, and against a loop over workers with the same draws."""

import math

import numpy as np
import pytest

from jaxlocal import ConfigurationError
from jaxlocal.communication.time_slots import TimeSlots

PATH = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]], bool)
RATES = np.array([[0.3, 1.0], [0.6, 0.9], [0.5, 0.5]])


def expected_slots(rates, steps):
    """E max_i T_i = Σ_t P(max_i T_i > t), where P(T_i ≤ t) is that of `steps` successes in t."""
    total, t, left = 0.0, 0, 1.0
    while left > 1e-15:
        done = lambda p, t=t: sum(
            math.comb(t, k) * p**k * (1 - p) ** (t - k) for k in range(steps, t + 1)
        )
        left = 1 - math.prod(map(done, rates))
        total, t = total + left, t + 1
    return total


@pytest.mark.parametrize(
    ("rates", "steps"), [([0.4], 1), ([0.25], 3), ([0.6, 0.9, 0.9], 8), ([0.1, 0.6], 2)]
)
def test_a_round_lasts_until_the_slowest_worker_has_its_steps(rates, steps):
    rounds = 3000
    slots = TimeSlots([rates], [steps] * rounds)
    ends = np.array([slots(steps * n) for n in range(rounds + 1)])
    lengths = np.diff(ends)
    error = lengths.std() / math.sqrt(rounds)
    assert abs(lengths.mean() - expected_slots(rates, steps)) < 4 * error
    assert lengths.min() >= steps


def test_the_expectation_by_hand():
    """One worker: H/p. Two of rate p: E max of two geometric numbers is 2/p − 1/(p (2 − p))."""
    assert expected_slots([0.25], 3) == pytest.approx(12)
    assert expected_slots([0.5, 0.5], 1) == pytest.approx(4 - 1 / 0.75)


def one_after_another(rates, lengths, inner_steps, hubs_wait, links, seed):
    """The slots after every step, each worker with a clock of its own."""
    random, clocks, counts = np.random.default_rng(seed), np.zeros(rates.shape, int).tolist(), [0]
    for length in lengths:
        for step in range(1, length + 1):
            drawn = random.geometric(rates)
            for hub, clock in enumerate(clocks):
                for worker in range(len(clock)):
                    clock[worker] += int(drawn[hub][worker])
                if hubs_wait and step % inner_steps == 0:
                    clocks[hub] = [max(clock)] * len(clock)
            if step == length:
                slowest = [max(clock) for clock in clocks]
                for hub, clock in enumerate(clocks):
                    waits_for = [slowest[j] for j in range(len(slowest)) if links[j][hub]]
                    clocks[hub] = [max(waits_for)] * len(clock)
            counts.append(max(map(max, clocks)))
    return counts


@pytest.mark.parametrize("hubs_wait", [False, True])
@pytest.mark.parametrize("links", [PATH, np.ones((3, 3), bool)], ids=["path", "complete"])
def test_hubs_wait_for_their_workers_and_for_the_hubs_with_which_they_mix(hubs_wait, links):
    lengths, inner = [4, 4, 8, 4], 2
    slots = TimeSlots(RATES, lengths, inner, hubs_wait, links, seed=3)
    expected = one_after_another(RATES, lengths, inner, hubs_wait, links, seed=3)
    assert [slots(step) for step in range(21)] == expected


def test_waiting_for_more_takes_longer():
    lengths = [8] * 50
    end = lambda *options: TimeSlots(RATES, lengths, 2, *options)(400)
    assert end(False, np.eye(3, dtype=bool)) < end(False, PATH) < end(True, np.ones((3, 3)))
    every_step = TimeSlots(RATES.reshape(1, -1), [1] * 400)(400)
    assert TimeSlots(RATES.reshape(1, -1), lengths)(400) < every_step


def test_the_counts_do_not_depend_on_how_they_are_asked_for():
    lengths = [3] * 20
    slots, other = (TimeSlots(RATES, lengths, seed=5) for _ in range(2))
    every = [slots(step) for step in range(61)]
    assert [other(step) for step in (60, 12, 12, 31, 0)] == [every[s] for s in (60, 12, 12, 31, 0)]
    assert every != [TimeSlots(RATES, lengths, seed=6)(step) for step in range(61)]


def test_workers_that_always_step_take_a_slot_a_step():
    slots = TimeSlots(np.ones((2, 2)), [4, 4], 2, True)
    assert [slots(step) for step in range(9)] == list(range(9))


@pytest.mark.parametrize("rates", [[[0.0]], [[1.5]], [0.5], [[float("nan")]]])
def test_what_are_no_rates_is_refused(rates):
    with pytest.raises(ConfigurationError, match="rates must be in"):
        TimeSlots(rates, [1])
