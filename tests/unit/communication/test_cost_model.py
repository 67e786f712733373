"""The cost model against simulations, collectives message by message and rounds step by step, and
against closed forms."""

import math
import re

import numpy as np
import pytest
import reference_cluster as reference
from hypothesis import given
from hypothesis import strategies as st

from jaxlocal import ConfigurationError
from jaxlocal.communication.collective_costs import ALL_REDUCE, Cluster
from jaxlocal.communication.cost_model import hours
from jaxlocal.communication.hours_fit import Fit, fit

SIZE = 1680  # divisible by 2 … 8 and by 2⁴
SIMULATED = {
    "ring": (reference.ring_all_reduce, reference.ring_all_gather),
    "halving_doubling": (reference.halving_doubling_all_reduce, reference.doubling_all_gather),
    "server": (reference.server_all_reduce, reference.server_all_gather),
}
RUNS = 4000


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


def parts(spent):
    """Seconds of compute, communication and waiting."""
    return [3600 * part for part in spent]


@pytest.mark.parametrize("name", ALL_REDUCE)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 16])
def test_collectives_cost_the_sum_of_their_messages(name, n):
    cluster = Cluster(0.008, 100, 1.0, 16, name)  # 8 Mbit/s: a byte a microsecond
    vectors = np.random.default_rng(0).normal(size=(n, SIZE))
    pieces = np.array_split(vectors[0], n)
    results = ((vectors.sum(0), vectors), (vectors[0], pieces))
    kinds = ("all-reduce", "all-gather")
    for kind, simulate, (expected, held) in zip(kinds, SIMULATED[name], results, strict=True):
        got, loads = simulate(held)
        for result in got:
            np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
        microseconds = sum(100 + 8 * load for load in loads)
        assert 1e6 * cluster.seconds(kind, 8 * SIZE, n) == pytest.approx(microseconds, rel=1e-12)


def test_a_permute_is_one_message_and_a_single_device_sends_nothing():
    cluster = Cluster(8, 50, 1.0, 4)
    assert cluster.seconds("collective-permute", 1e9, 4) == pytest.approx(1 + 50e-6)
    for kind in ("all-reduce", "all-gather", "collective-permute"):
        assert cluster.seconds(kind, 1e9, 1) == 0


@given(
    st.sampled_from(list(ALL_REDUCE)),
    st.sampled_from(["all-reduce", "all-gather", "collective-permute"]),
    st.integers(2, 64),
    st.floats(0, 1e12),
    st.floats(1, 10),
)
def test_more_bytes_a_slower_link_and_latency_take_longer(name, kind, n, nbytes, factor):
    seconds = lambda bandwidth, latency, size: Cluster(bandwidth, latency, 1.0, 64, name).seconds(
        kind, size, n
    )
    base = seconds(10, 50, nbytes)
    assert seconds(10, 50, factor * nbytes) >= base
    assert seconds(10, 50 * factor, nbytes) >= base
    assert seconds(10 / factor, 50, nbytes) >= base
    # Without latency the time is inversely proportional to the bandwidth.
    assert seconds(10 / factor, 0, nbytes) == pytest.approx(factor * seconds(10, 0, nbytes))


def test_the_hours_of_equal_devices_without_jitter_are_sums():
    cluster = Cluster(8, 1000, 0.5, 4)  # a gigabyte a second
    ring = 2 * 3 * 1e-3 + 1.5 * 0.4
    sent = [("all-reduce", 0.4e9, 4)]
    assert parts(hours([4, 4, 2], cluster, outer=sent)) == pytest.approx([5, 3 * ring, 0])
    assert parts(hours([10], cluster, inner=sent)) == pytest.approx([5, 10 * ring, 0])
    assert hours([10], cluster, inner=sent) == hours([1] * 10, cluster, outer=sent)
    both = hours([4, 4], cluster, [("all-gather", 0.4e9, 2)], sent, inner_steps=2)
    assert parts(both) == pytest.approx([4, 4 * (1e-3 + 0.2) + 2 * ring, 0])
    assert both.total == pytest.approx(sum(parts(both)) / 3600)


@pytest.mark.parametrize(("overlap", "left"), [(0, 2.1), (1, 1.6), (4, 0.1), (5, 0), (9, 0)])
def test_communication_that_overlaps_with_steps_does_not_count(overlap, left):
    cluster = Cluster(8, 0, 0.5, 8)
    sent = [("all-reduce", 1.2e9, 8)]  # 2.1 s
    spent = hours([10, 10, 10], cluster, outer=sent, overlap_steps=overlap)
    assert parts(spent) == pytest.approx([15, 3 * left, 0])
    # A round that is shorter than the overlap hides no more than its own steps.
    spent = hours([2], cluster, outer=sent, overlap_steps=overlap)
    assert parts(spent)[1] == pytest.approx(max(0.0, 2.1 - 0.5 * min(2, overlap)))


def expected_maximum(n):
    """The expected maximum of n standard normal variables, in closed form."""
    return {2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi)}[n]


@pytest.mark.parametrize("n", [2, 3])
def test_waiting_per_average_grows_as_the_square_root_of_h(n):
    cluster = Cluster(8, 0, 2.0, n, jitter=0.1)
    sent = [("all-reduce", 0, n)]
    once = 0.1 * 2.0 * expected_maximum(n)
    for length in (1, 4, 16):
        waiting = parts(hours([length] * 3, cluster, outer=sent))[2]
        assert waiting == pytest.approx(3 * math.sqrt(length) * once, rel=1e-9)
    every_step = parts(hours([48], cluster, inner=sent))[2]
    rarely = parts(hours([16] * 3, cluster, outer=sent))[2]
    assert every_step == pytest.approx(4 * rarely, rel=1e-9)


def test_a_slow_device_is_not_averaged_out():
    cluster = Cluster(8, 0, 1.0, 4, slowdown=(3.0,))
    for lengths in ([1] * 8, [4, 4], [8]):
        spent = parts(hours(lengths, cluster, outer=[("all-reduce", 0, 4)]))
        assert spent == pytest.approx([8 * 1.5, 0, 8 * 1.5])  # compute of the mean device, its wait
    slow = hours(
        [100] * 9, Cluster(8, 0, 1.0, 4, jitter=0.01, slowdown=(3.0,)), outer=[("all-reduce", 0, 4)]
    )
    assert 3600 * slow.total == pytest.approx(2700, rel=1e-9)


def drawn(cluster, shape=None, seed=0):
    """Random seconds of every device's steps, normal or, with a `shape`, gamma distributed."""
    rng = np.random.default_rng(seed)
    size = (RUNS, cluster.devices)
    if shape is None:
        return lambda: cluster.step * (1 + cluster.jitter * rng.standard_normal(size))
    return lambda: cluster.step * rng.gamma(shape, 1 / shape, size)


def modelled(cluster, lengths, inner=0.0, outer=0.0, group=1, at_end=True, **options):
    """Seconds of a run by the model; `inner` and `outer` are the seconds of its collectives."""
    permute = lambda seconds, n: [("collective-permute", seconds * 1e9, n)]
    spent = hours(
        lengths,
        cluster,
        permute(inner, group) if group > 1 else [],
        permute(outer, cluster.devices) if at_end else [],
        **options,
    )
    return 3600 * spent.total


CASES = {
    "data parallel": ([12], {"group": 6, "inner": 0.3, "at_end": False}),
    "local": ([1, 5, 6], {"outer": 0.7}),
    "hubs": ([8, 4], {"group": 3, "inner": 0.2, "outer": 0.5, "inner_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slowdown", [(), (1.2, 1.0, 0.8, 1.1)])
def test_the_model_agrees_with_simulated_rounds(case, slowdown):
    lengths, options = CASES[case]
    cluster = Cluster(8, 0, 1.0, 6, jitter=0.15, slowdown=slowdown)
    runs = reference.run_seconds(lengths, drawn(cluster), **{"inner": 0.0, "outer": 0.0, **options})
    model = modelled(cluster, lengths, **options)
    # Five standard errors; on hubs the model also treats sums of maxima as normal.
    error = 5 * runs.std() / math.sqrt(RUNS)
    assert abs(runs.mean() - model) < error + (0.01 if case == "hubs" else 0)
    # The waiting that is compared is larger than that.
    assert model - modelled(Cluster(8, 0, 1.0, 6, slowdown=slowdown), lengths, **options) > (
        2 * error
    )


def test_the_model_is_close_for_steps_that_are_not_normal():
    cluster = Cluster(8, 0, 1.0, 8, jitter=0.2)  # the jitter of gamma(25) too
    for lengths, near in (([1] * 16, 0.12), ([16], 0.04)):
        runs = reference.run_seconds(lengths, drawn(cluster, shape=25), 0.0, 0.0)
        waiting = modelled(cluster, lengths) - 16
        assert runs.mean() - 16 == pytest.approx(waiting, rel=near)
        assert waiting > 0.1


@pytest.mark.parametrize("overlap", [1, 3])
@pytest.mark.parametrize("slowdown", [(), (1.5,)])
def test_the_model_is_an_upper_bound_with_overlap(overlap, slowdown):
    cluster = Cluster(8, 0, 1.0, 4, jitter=0.2, slowdown=slowdown)
    lengths = [6] * 5
    runs = reference.run_seconds(lengths, drawn(cluster), 0.0, 2.5, overlap=overlap)
    model = modelled(cluster, lengths, outer=2.5, overlap_steps=overlap)
    assert runs.mean() <= model + 5 * runs.std() / math.sqrt(RUNS)
    assert model <= modelled(cluster, lengths, outer=2.5)


@given(
    st.integers(1, 6).map(lambda n: 2**n),
    st.floats(0, 0.4),
    st.lists(st.floats(0.5, 4), max_size=2),
    st.integers(0, 4),
    st.integers(0, 8),
)
def test_longer_rounds_and_overlap_never_take_longer(devices, jitter, slowdown, power, overlap):
    cluster = Cluster(1, 50, 0.1, devices, jitter=jitter, slowdown=slowdown)
    sent = [("all-reduce", 1e8, devices)]
    run = lambda steps, overlap=0: hours(
        [steps] * (32 // steps), cluster, outer=sent, overlap_steps=overlap
    )
    often, rarely = run(2**power), run(2 ** (power + 1))
    assert min(often) >= 0
    assert rarely.compute == pytest.approx(often.compute)
    assert rarely.communication <= often.communication
    assert rarely.waiting <= often.waiting * (1 + 1e-9) + 1e-15
    assert run(2**power, overlap).communication <= often.communication
    data_parallel = hours([32], cluster, inner=sent)
    assert rarely.total <= data_parallel.total * (1 + 1e-9)


positive = st.floats(0.01, 1e3)


@given(positive, positive, st.floats(0.01, 0.9))
def test_a_fit_passes_through_its_two_points(compute, communication, volume):
    points = [(v, compute + v * communication) for v in (1.0, volume)]
    known = fit(*points)
    for v, total in points:
        assert known.hours(v) == pytest.approx(total, rel=1e-12)
    assert known == pytest.approx((compute, communication), rel=1e-6, abs=1e-9)
    assert fit(*points[::-1]) == known


def test_the_model_without_waiting_lies_on_the_line_of_a_fit():
    cluster = Cluster(10, 20, 0.05, 8)
    sent = [("all-reduce", 3e8, 8)]
    run = lambda steps: hours([steps] * (64 // steps), cluster, outer=sent)
    known = fit((1.0, run(1).total), (1 / 16, run(16).total))
    assert known == pytest.approx(Fit(run(1).compute, run(1).communication))
    for steps in (2, 4, 32):
        assert known.hours(1 / steps) == pytest.approx(run(steps).total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bandwidth_gbps": 0}, "the bandwidth in Gbit/s must be a number > 0, got 0"),
        ({"bandwidth_gbps": math.nan}, "bandwidth in Gbit/s must be a number > 0, got nan"),
        ({"latency_us": -1}, "the latency in µs must be a number ≥ 0, got -1"),
        ({"latency_us": math.inf}, "the latency in µs must be a number ≥ 0, got inf"),
        ({"step_seconds": 0.0}, "the step in seconds must be a number > 0, got 0.0"),
        ({"devices": 0}, "the number of devices must be a number > 0, got 0"),
        ({"jitter": 1.5}, "the jitter must be in [0, 1], got 1.5"),
        ({"slowdown": (1.0, -2.0)}, "the slowdown of device 1 must be a number > 0, got -2.0"),
        ({"slowdown": (1.0,) * 5}, "5 slowdowns do not fit a cluster of 4 devices"),
        ({"all_reduce": "rign"}, "unknown all-reduce 'rign'; did you mean 'ring'?"),
    ],
)
def test_an_impossible_cluster_is_refused(arguments, message):
    good = {"bandwidth_gbps": 1, "latency_us": 0, "step_seconds": 1.0, "devices": 4}
    with refused(message):
        Cluster(**{**good, **arguments})


def test_collectives_and_stages_that_do_not_fit_a_cluster_are_refused():
    cluster = Cluster(1, 0, 1.0, 4)
    with refused("a collective of 8 devices does not fit a cluster of 4"):
        cluster.seconds("all-reduce", 1, 8)
    with refused("unknown collective 'all-reduced'; did you mean 'all-reduce'"):
        cluster.seconds("all-reduced", 1, 4)
    with refused("4 devices do not divide into groups of 3"):
        hours([1], cluster, inner=[("all-reduce", 1, 3)])
    with refused("at least 1 step, an overlap and an end at least 0, got 0, 0 and 0"):
        hours([1], cluster, inner_steps=0)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (((0.5, 2), (0.5, 3)), "two runs of the same communication volume, 0.5"),
        (((1, 2), (0.5, 3)), "2 hours at a communication volume of 1 and 3 at 0.5 leave 4 hours"),
        (((1, 9), (0.5, 2)), "leave -5 hours of compute and 14 of communication"),
        (((0, 9), (0.5, 2)), "the communication volume must be a number > 0, got 0"),
        (((1, math.nan), (0.5, 2)), "the number of hours must be a number > 0, got nan"),
    ],
)
def test_hours_that_no_fit_explains_are_refused(points, message):
    with refused(message):
        fit(*points)
