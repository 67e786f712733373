"""The reference's rules of the period and its schedules against values by hand."""

import numpy as np
import pytest
import reference_periods


def test_constant_post_local_and_swap_periods():
    assert reference_periods.constant(10, 4) == [4, 4, 2]
    assert reference_periods.post_local(10, 3, 4) == [1, 1, 1, 4, 3]
    assert reference_periods.swap(10, 3) == [1, 1, 1, 7]
    assert reference_periods.post_local(3, 3, 4) == reference_periods.swap(3, 5) == [1, 1, 1]


@pytest.mark.parametrize(
    ("power", "expected"),
    # alpha / lr is 0.4 up to step 3, 2 up to step 9, then 5.
    [(1, [2, 2, 2, 2, 2, 5, 5]), (2, [2, 2, 4, 4, 8]), (3, [2, 2, 8, 8])],
)
def test_qsr_by_hand(power, expected):
    def learning_rate(step):
        return 0.5 if step < 4 else 0.1 if step < 10 else 0.04

    assert reference_periods.qsr(learning_rate, 20, 0.2, 2, power) == expected


def test_qsr_in_warm_up_takes_the_period_of_the_peak_rate():
    warm = reference_periods.schedule("constant", 0.1, 14, warmup_steps=5)
    # (0.25 / 0.1)^2 = 6.25, while the first rate, 1e-6, would ask for one round of 14 steps.
    assert reference_periods.qsr(warm, 14, 0.25, 2, warmup_steps=5) == [6, 6, 2]
    assert reference_periods.qsr(warm, 14, 0.25, 2) == [14]


def test_guarded_qsr_by_hand():
    # From 0 to 0.1 in five steps; (0.25 / 0.1)² = 6.25. Then a fall to 0.01 (625 steps) and a
    # restart at step 12, to which the rate rises from step 11 on.
    rates = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.09, 0.08, 0.07, 0.05, 0.02, 0.01]
    restarted = [0.1, 0.09, 0.08, 0.07]
    at = lambda step: (rates + restarted)[min(step, 15)]
    assert reference_periods.guarded(at, 16, 0.25, 2, known=16) == [6, 6, 4]
    assert reference_periods.guarded(at, 16, 0.1, 1, known=16) == [1] * 8 + [2] + [1] * 6
    # Where the rate falls throughout it is the paper's rule.
    cosine = reference_periods.schedule("cosine", 0.1, 60)
    expected = reference_periods.qsr(cosine, 60, 0.2, 3)
    assert reference_periods.guarded(cosine, 60, 0.2, 3, known=60) == expected


def test_qsr_without_coefficient_is_constant():
    decaying = reference_periods.schedule("cosine", 0.1, 50)
    assert reference_periods.qsr(decaying, 50, 0.0, 4) == reference_periods.constant(50, 4)


def test_qsr_on_the_published_vit_run():
    # 300 epochs of 312 steps, peak 0.008: (0.0175 / 0.008)^2 = 4.8, so H starts at 4 and the
    # published saving (9 to 25 % of the synchronizations) is that of the tail.
    steps, warmup = 300 * 312, 10_000
    cosine = reference_periods.schedule("cosine", 0.008, steps, warmup)
    periods = reference_periods.qsr(cosine, steps, 0.0175, 4, warmup_steps=warmup)
    assert sum(periods) == steps and periods[:2500] == [4] * 2500
    assert periods[:-1] == sorted(periods[:-1])
    assert 0.09 <= len(periods) / steps <= 0.25


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8]),
        ("cosine", [0.8, (0.8 + 1e-6) / 2, 1e-6]),
        ("linear", [0.8, (0.8 + 1e-6) / 2, 1e-6]),
        # log2 of 0.8, 0.4 and 1e-6 is -0.32, -1.32 and -19.93.
        ("cosine_step", [1.0, 0.5, 2.0**-20]),
        # Thirds count from step 0: step 15 of 24 lies in the second, step 24 after the third.
        ("step", [0.8, 0.08, 0.008]),
    ],
)
def test_schedules_at_the_peak_in_the_middle_and_at_the_end(decay, expected):
    learning_rate = reference_periods.schedule(decay, 0.8, 24, warmup_steps=6)
    np.testing.assert_allclose([learning_rate(t) for t in (6, 15, 24)], expected, rtol=1e-12)
    warm = [1e-6 + (0.8 - 1e-6) * t / 6 for t in range(6)]
    np.testing.assert_allclose([learning_rate(t) for t in range(6)], warm, rtol=1e-12)


def test_step_decay_changes_at_the_first_step_at_or_after_a_third():
    learning_rate = reference_periods.schedule("step", 1.0, 10)
    changes = [t for t in range(1, 10) if learning_rate(t) != learning_rate(t - 1)]
    assert changes == [4, 7]
