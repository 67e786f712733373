"""Batches: a pure function of the steps, with the examples that the partition gives."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxlocal.data import assign, make_batches, parse_partition, plan_batches
from jaxlocal.errors import ConfigurationError

SPECS = ["iid", "fresh", "reused:7", "sorted", "sorted:0.3", "unequal:0.4,0.6", "dirichlet:5"]
FIXED = [spec for spec in SPECS if parse_partition(spec).fixed]


@st.composite
def runs(draw, specs):
    """Arguments of make_batches that fit together."""
    spec, hubs, workers = draw(st.sampled_from(specs)), draw(st.integers(1, 3)), 2
    batch = draw(st.integers(1, 5))
    examples = draw(st.integers(hubs * workers * batch, 200))
    # Two groups of equal size, of which the smaller holds 0.4 up to rounding.
    assume(not spec.startswith("unequal") or 0.4 * examples - 1 >= hubs * batch + hubs)
    # With 3 classes, shares seldom give a worker less than a quarter of an equal part.
    assume(not spec.startswith("dirichlet") or examples >= 4 * hubs * workers * batch)
    targets = np.random.default_rng(examples).integers(3, size=examples)
    return spec, targets, hubs, workers, batch, draw(st.integers(0, 2**40))


@given(runs(SPECS), st.lists(st.integers(0, 30), min_size=2, max_size=5))
def test_steps_do_not_depend_on_the_calls_that_they_are_cut_into(run, cuts):
    cuts = sorted(cuts)
    start, stop = cuts[0], cuts[-1]
    whole = make_batches(*run).indices(start, stop - start)
    batches = make_batches(*run)
    parts = [batches.indices(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    backwards = [batches.indices(step, 1) for step in reversed(range(start, stop))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    if backwards:
        np.testing.assert_array_equal(np.concatenate(backwards[::-1]), whole)
    _, targets, hubs, workers, batch, _ = run
    assert whole.shape == (stop - start, hubs, workers, batch) and whole.dtype == np.int32
    assert whole.size == 0 or 0 <= whole.min() <= whole.max() < len(targets)


@given(runs(["iid"]), st.integers(0, 5))
def test_iid_repeats_no_example_within_an_epoch(run, epoch):
    batches = make_batches(*run)
    taken = batches.indices(epoch * batches.epoch_steps, batches.epoch_steps).ravel()
    assert len(set(taken.tolist())) == len(taken)
    _, targets, hubs, workers, batch, _ = run
    assert len(targets) - len(taken) < hubs * workers * batch
    assert (batches.shard_sizes == len(targets) // (hubs * workers)).all()


@given(runs(FIXED), st.integers(0, 3))
def test_a_worker_passes_over_its_shard_without_repeats(run, number):
    spec, targets, hubs, workers, batch, seed = run
    batches = make_batches(*run)
    shards = assign(parse_partition(spec), targets, hubs * workers, seed, least=batch)
    for worker, shard in enumerate(shards):
        steps = len(shard) // batch
        taken = batches.indices(number * steps, steps).reshape(steps, hubs * workers, batch)
        mine = taken[:, worker].ravel().tolist()
        assert len(set(mine)) == len(mine) == steps * batch
        assert set(mine) <= set(shard.tolist())
    assert batches.shard_sizes.ravel().tolist() == [len(shard) for shard in shards]
    assert all((a == b).all() for a, b in zip(batches.shards, shards, strict=True))


@given(runs(SPECS))
def test_a_plan_reads_no_data_except_the_labels_of_dirichlet(run):
    spec, targets, hubs, workers, batch, seed = run
    read = lambda: targets if spec.startswith("dirichlet") else pytest.fail("read")
    plan = plan_batches(spec, len(targets), hubs, workers, batch, read, seed)
    batches = make_batches(*run)
    np.testing.assert_array_equal(plan.shard_sizes, batches.shard_sizes)
    assert plan.shard_sizes.shape == (hubs, workers)
    assert bool(batches.shards) == (spec in FIXED)
    assert plan.epoch_steps == batches.epoch_steps == len(targets) // (hubs * workers * batch)


@pytest.mark.parametrize("spec", SPECS)
def test_batches_do_not_depend_on_the_grouping_into_hubs(spec):
    targets = np.arange(240) % 7
    flat = make_batches(spec, targets, 1, 6, 4, seed=3).indices(2, 30)
    hubs = make_batches(spec, targets, 3, 2, 4, seed=3).indices(2, 30)
    np.testing.assert_array_equal(hubs.reshape(flat.shape), flat)


@pytest.mark.parametrize("spec", SPECS)
def test_batches_of_seeds_workers_and_steps_differ(spec):
    targets = np.arange(4000) % 7
    one = make_batches(spec, targets, 1, 2, 50, seed=0).indices(0, 60)
    two = make_batches(spec, targets, 1, 2, 50, seed=1).indices(0, 60)
    # With 50 of at least 1000 examples in order, no two independent batches are equal.
    assert (one != two).any(axis=-1).all()
    assert len({batch.tobytes() for batch in one.reshape(-1, 50)}) == 120


@pytest.mark.parametrize("spec", ["iid", "sorted", "unequal:0.4,0.6"])
def test_the_examples_that_a_pass_leaves_out_change(spec):
    batches = make_batches(spec, np.zeros(22), 1, 2, 3, seed=0)
    # A pass leaves an example out with probability at most 1/4 (2 of 8); 40 passes never do.
    assert set(batches.indices(0, 160).ravel().tolist()) == set(range(22))


def test_fresh_draws_are_uniform_and_repeat():
    batches = make_batches("fresh", np.zeros(50), 2, 5, 40, seed=0)
    counts = np.bincount(batches.indices(0, 200).ravel(), minlength=50)
    # 1600 of 80,000 draws are expected of each; five standard deviations of 39.6 are allowed.
    assert abs(counts - 1600).max() < 200
    assert (batches.shard_sizes == 50).all() and batches.epoch_steps == 1
    batch = batches.indices(0, 1)[0, 0, 0]
    assert len(set(batch.tolist())) < 40


@pytest.mark.parametrize("spec", SPECS)
def test_two_threads_get_the_same_batches(spec):
    targets = np.arange(97) % 5
    batches = make_batches(spec, targets, 2, 2, 3, seed=1)
    expected = make_batches(spec, targets, 2, 2, 3, seed=1).indices(0, 400)
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda step: batches.indices(step, 5), range(0, 400, 5)))
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_the_caller_may_change_the_indices_it_got():
    batches = make_batches("iid", np.zeros(40), 1, 2, 4, seed=0)
    first = batches.indices(0, 5)
    kept = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(batches.indices(0, 5), kept)


@pytest.mark.parametrize(
    "spec, examples, batch, message",
    [
        (
            "iid",
            30,
            8,
            "a batch of 8 is larger than the shard of worker 0, which holds 7 of the 30",
        ),
        (
            "sorted",
            30,
            8,
            "a batch of 8 is larger than the shard of worker 2, which holds 7 of the 30",
        ),
        ("unequal:0.8,0.2", 100, 11, "a batch of 11 .* worker 2, which holds 10 of the 100"),
        ("dirichlet", 31, 8, "31 examples are too few for 4 workers that need 8 each"),
        ("iid", 30, 0, "batch_size must be at least 1, got 0"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error(spec, examples, batch, message):
    with pytest.raises(ConfigurationError, match=message):
        make_batches(spec, np.zeros(examples, int), 2, 2, batch, seed=0)


def test_a_plan_of_dirichlet_without_labels_is_an_error():
    message = "under partition 'dirichlet' depends on the labels of the 100 examples"
    with pytest.raises(ConfigurationError, match=message):
        plan_batches("dirichlet:0.3", 100, 1, 2, 4)


def test_wrong_sizes_seeds_and_steps_are_errors():
    with pytest.raises(ConfigurationError, match="hubs must be at least 1, got 0"):
        plan_batches("iid", 10, 0, 2, 1)
    with pytest.raises(ConfigurationError, match="seed must not be negative, got -3"):
        make_batches("iid", np.zeros(10), 1, 2, 1, seed=-3)
    with pytest.raises(ValueError, match="-1"):
        make_batches("iid", np.zeros(10), 1, 2, 1, seed=0).indices(-1, 2)


@given(runs(["reused:1", "reused:7", "reused:12"]))
def test_reused_subsets_are_those_of_the_released_loop(run):
    """Once in a period every worker draws a subset, and passes over it, shuffled, until the next.

    The loop is that of the code released with MLL-SGD, over single steps.
    """
    spec, targets, hubs, per_hub, batch, _ = run
    period, workers = int(spec.split(":")[1]), hubs * per_hub
    size = len(targets) // workers
    taken = make_batches(*run).indices(0, 3 * period).reshape(3, period, workers, batch)
    subsets = {}
    for draw in range(3):
        for worker in range(workers):
            held, left = set(), 0
            for step in range(period):
                if left < batch:  # a pass takes whole batches of the subset
                    seen, left = set(), size
                mine = taken[draw, step, worker].tolist()
                assert len(set(mine)) == batch and not seen & set(mine)
                seen, held, left = seen | set(mine), held | set(mine), left - batch
            assert len(held) <= size  # whatever was taken in the period is of one subset
            subsets[draw, worker] = frozenset(held)
    if size >= 8 and len(targets) >= 4 * size and period * batch >= size:
        assert len(set(subsets.values())) == len(subsets)  # drawn anew, and by each worker


def test_reused_subsets_are_uniform_and_passes_are_shuffled():
    batches = make_batches("reused:8", np.zeros(400), 1, 4, 25, seed=3)
    taken = batches.indices(0, 8 * 50).reshape(50, 2, 4, 4, 25)  # draws, passes, steps, workers
    first, second = (taken[:, n].swapaxes(1, 2).reshape(50, 4, 100) for n in (0, 1))
    np.testing.assert_array_equal(np.sort(first, -1), np.sort(second, -1))  # the same examples
    assert (first != second).any(-1).all()
    counts = np.bincount(first.ravel(), minlength=400)
    # Each example is in each of 200 subsets with probability 1/4: five deviations of a binomial.
    assert abs(counts - 50).max() < 5 * np.sqrt(200 * 3 / 16)
    # Two workers share a quarter of their examples: they draw independently.
    shared = [len(set(a) & set(b)) for a, b in first[:, :2].tolist()]
    # A hypergeometric with the mean 25 and the variance 100 (1/4) (3/4) (300/399) = 14.1.
    assert abs(np.mean(shared) - 25) < 5 * np.sqrt(14.1 / 50)
    assert (batches.shard_sizes == 100).all() and batches.epoch_steps == 4 and not batches.shards


def test_distances_order_the_shards():
    distances = np.array([0.5, -2.0, 1.5, -0.25, -1.0, 3.0])
    batches = make_batches("by_distance", np.zeros(6), 1, 3, 2, seed=0, distances=distances)
    assert [sorted(shard.tolist()) for shard in batches.shards] == [[1, 4], [0, 3], [2, 5]]
    assert sorted(batches.indices(5, 1)[0, 0, 2].tolist()) == [2, 5]
    with pytest.raises(ConfigurationError, match="dataset that defines a separating hyperplane"):
        make_batches("by_distance", np.zeros(6), 1, 3, 2, seed=0)
    with pytest.raises(ConfigurationError, match=r"for each of 6 examples, got the shape \[5\]"):
        make_batches("by_distance", np.zeros(6), 1, 3, 2, seed=0, distances=distances[:5])
