"""Partitions: each example in one shard, no empty shard, and the shards of the papers."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxlocal.data import UNEQUAL_FRACTIONS, Partition, assign, parse_partition, shard_sizes
from jaxlocal.errors import ConfigurationError


def draw_targets(draw, examples):
    labels = draw(st.integers(1, 12))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(labels, size=examples)


@st.composite
def fixed_partitions(draw):
    """A partition whose sizes do not depend on labels, with targets and workers that fit it."""
    examples, workers = draw(st.integers(1, 300)), draw(st.integers(1, 24))
    assume(examples >= workers)
    targets = draw_targets(draw, examples)
    if draw(st.booleans()):
        offset = draw(st.floats(0, 1, exclude_max=True))
        return Partition("sorted", offset=offset), targets, workers
    parts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    assume(workers % len(parts) == 0)
    fractions = tuple(part / sum(parts) for part in parts)
    # Rounding moves a bound by one example at most.
    assume(min(fractions) * examples >= workers // len(parts) + 1)
    return Partition("unequal", fractions=fractions), targets, workers


@given(fixed_partitions(), st.integers(0, 9))
def test_every_example_is_in_one_shard_and_no_shard_is_empty(drawn, seed):
    partition, targets, workers = drawn
    shards = assign(partition, targets, workers, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(len(targets)))
    sizes = [len(shard) for shard in shards]
    assert min(sizes) >= 1
    assert sizes == shard_sizes(partition, len(targets), workers).tolist()
    assert all(shard.dtype == np.int32 for shard in shards)


@given(fixed_partitions())
def test_sizes_are_the_given_fractions(drawn):
    partition, targets, workers = drawn
    sizes = shard_sizes(partition, len(targets), workers)
    fractions = partition.fractions or (1.0,)
    groups = sizes.reshape(len(fractions), -1)
    assert (np.ptp(groups, axis=1) <= 1).all()
    # Each of a group's two bounds is rounded by half an example at most.
    np.testing.assert_allclose(groups.sum(1), np.array(fractions) * len(targets), atol=1.0 + 1e-6)


@given(st.integers(1, 500), st.integers(1, 30))
def test_iid_shards_are_equal_and_fresh_ones_hold_all_examples(examples, workers):
    assume(examples >= workers)
    iid = shard_sizes(Partition("iid"), examples, workers)
    assert (iid == examples // workers).all() and len(iid) == workers
    fresh = shard_sizes(Partition("fresh"), examples, workers)
    assert (fresh == examples).all() and len(fresh) == workers


@pytest.mark.parametrize("spec, labels_held", [("sorted", [1] * 20), ("sorted:0.5", [1, 2] * 10)])
def test_twenty_workers_on_ten_equal_classes_hold_the_labels_of_the_paper(spec, labels_held):
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 500))
    shards = assign(parse_partition(spec), targets, workers=20, seed=0)
    assert [len(shard) for shard in shards] == [250] * 20
    assert [len(set(targets[shard])) for shard in shards] == labels_held


def test_sorting_is_stable_and_does_not_depend_on_the_seed():
    # Long enough that an unstable sort would show.
    targets = np.random.default_rng(0).integers(2, size=600)
    expected = sorted(range(600), key=lambda example: targets[example])
    for seed in (0, 1):
        shards = assign(parse_partition("sorted"), targets, workers=3, seed=seed)
        assert np.concatenate(shards).tolist() == expected


def test_a_rotation_is_circular():
    shards = assign(parse_partition("sorted:0.5"), np.arange(8), workers=2, seed=0)
    assert [shard.tolist() for shard in shards] == [[2, 3, 4, 5], [6, 7, 0, 1]]


def test_one_hundred_workers_hold_the_released_fractions_mixed():
    targets = np.repeat(np.arange(10), 1200)
    partition = parse_partition("unequal")
    assert partition.fractions == UNEQUAL_FRACTIONS == (0.05, 0.1, 0.2, 0.25, 0.4)
    shards = assign(partition, targets, workers=100, seed=1)
    expected = np.repeat(np.array(UNEQUAL_FRACTIONS) * 12_000 / 20, 20)
    assert [len(shard) for shard in shards] == expected.astype(int).tolist()
    assert len(set(targets[shards[-1]])) == 10
    other = assign(partition, targets, workers=100, seed=2)
    assert any((one != two).any() for one, two in zip(shards, other, strict=True))


@given(st.data(), st.integers(1, 24), st.floats(0.5, 100), st.integers(0, 9))
def test_a_dirichlet_partition_holds_every_example_once(data, workers, alpha, seed):
    targets = draw_targets(data.draw, data.draw(st.integers(30 * workers, 40 * workers)))
    shards = assign(Partition("dirichlet", alpha=alpha), targets, workers, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(len(targets)))
    assert len(shards) == workers and min(map(len, shards)) >= 1
    assert all(shard.dtype == np.int32 for shard in shards)


def dirichlet_counts(targets, workers, alpha, seed=0):
    """[classes, workers]"""
    shards = assign(Partition("dirichlet", alpha=alpha), targets, workers, seed)
    return np.stack([np.bincount(targets[s], minlength=targets.max() + 1) for s in shards], axis=1)


def test_shares_of_a_class_have_the_moments_of_the_dirichlet():
    classes, workers, alpha = 10_000, 5, 0.5
    shares = dirichlet_counts(np.repeat(np.arange(classes), 50), workers, alpha) / 50
    # Var = 1/K (1 - 1/K) / (K alpha + 1). A share is Beta(1/2, 2), whose fourth moment over its
    # squared variance is 4.3: 10,000 of them estimate it to sqrt(3.3 / 10,000) = 1.8 %, four
    # of which are allowed. Rounding to examples adds (1/50)^2 / 6, 0.1 % of it.
    np.testing.assert_allclose(shares.var(0), 0.2 * 0.8 / 3.5, rtol=0.075)
    # The standard deviation of the mean is sqrt(0.0457 / 10,000) = 0.0021.
    np.testing.assert_allclose(shares.mean(0), 0.2, atol=0.009)
    # Classes are independent: correlations deviate by 1 / sqrt(10,000).
    assert abs(np.corrcoef(shares[:-1, 0], shares[1:, 0])[0, 1]) < 0.04


def test_a_large_alpha_gives_all_workers_the_same_proportions_of_classes():
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 1000))
    # Shares deviate by sqrt(1/8 7/8 / (8e6 + 1)) = 1.2e-4, an eighth of an example; rounding both
    # bounds moves a count by one at most.
    assert abs(dirichlet_counts(targets, 8, alpha=1e6) - 125).max() <= 2


def test_a_small_alpha_gives_each_class_to_one_worker_and_each_worker_some():
    counts = dirichlet_counts(np.repeat(np.arange(10), 100), workers=3, alpha=1e-6)
    assert ((counts == 100).sum(1) == 1).all() and ((counts == 0).sum(1) == 2).all()
    assert (counts.sum(0) > 0).all()


def test_dirichlet_depends_on_its_seed_and_the_labels_only():
    targets = np.random.default_rng(0).integers(6, size=900)
    partition = parse_partition("dirichlet:0.7")
    one, again, renamed, other = (
        assign(partition, labels, 5, seed)
        for labels, seed in ((targets, 0), (targets, 0), (3 * targets - 7, 0), (targets, 1))
    )
    for shard, same, also in zip(one, again, renamed, strict=True):
        assert shard.tolist() == same.tolist() == also.tolist()
    assert [len(shard) for shard in one] != [len(shard) for shard in other]
    # The examples of a class that a worker holds are drawn too; they are not the first ones.
    mine = one[0][targets[one[0]] == 0]
    assert 1 < len(mine) < 150
    assert set(mine) != set(np.flatnonzero(targets == 0)[: len(mine)])


def test_every_worker_of_a_dirichlet_partition_holds_the_least_number():
    targets = np.repeat(np.arange(10), 144)
    partition = parse_partition("dirichlet:0.1")
    least = lambda **need: [
        min(map(len, assign(partition, targets, 8, s, **need))) for s in range(8)
    ]
    assert min(least(least=16)) >= 16
    assert min(least()) < 16  # without the requirement, shards are smaller


def test_numbers_that_no_dirichlet_draw_can_give_are_errors():
    targets = np.repeat([0, 1], 50)
    # Each of two classes goes to one worker, so two of four workers hold nothing.
    message = (
        "none of 1000 draws with alpha 1e-06 gives each of 4 workers 1 of the 100 examples: in "
        r"the best draw worker \d holds 0; use a larger alpha, fewer workers or smaller batches"
    )
    with pytest.raises(ConfigurationError, match=message):
        assign(parse_partition("dirichlet:1e-6"), targets, 4, seed=0)
    with pytest.raises(
        ConfigurationError, match="100 examples are too few for 4 workers that need"
    ):
        assign(parse_partition("dirichlet"), targets, 4, seed=0, least=26)


def test_dirichlet_and_sorted_need_one_label_for_each_example():
    with pytest.raises(
        ConfigurationError, match="needs integer labels, and the targets are float32"
    ):
        assign(parse_partition("dirichlet"), np.zeros(10, np.float32), workers=2, seed=0)
    for spec in ("dirichlet", "sorted"):
        with pytest.raises(
            ConfigurationError, match=r"one label .* targets have the shape \[10, 3\]"
        ):
            assign(parse_partition(spec), np.zeros((10, 3), int), workers=2, seed=0)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sort", "did you mean 'sorted'"),
        ("iid:0.5", "takes no argument"),
        ("sorted:half", "'half'.*not a number"),
        ("sorted:", "not a number"),
        ("sorted:1", "below 1 shard, got 1.0"),
        ("sorted:nan", "below 1 shard, got nan"),
        ("sorted:-0.5", "got -0.5"),
        ("unequal:0.5,0.6", "sum to 1.1"),
        ("unequal:1.5,-0.5", "must all be positive"),
        ("unequal:nan,1", "must all be positive"),
        ("unequal:inf", "sum to inf"),
        ("unequal:", "not a number"),
        ("reused", "such as reused:16; got 'reused'"),
        ("reused:0", "from 1 to 2.31 - 1, such as reused:16; got 'reused:0'"),
        ("reused:1.5", "got 'reused:1.5'"),
        ("by_distance:1", "takes no argument"),
        ("dirichlet:", "not a number"),
        ("dirichlet:0", "from 1e-6 to 1e6, got 0.0"),
        ("dirichlet:-1", "got -1.0"),
        ("dirichlet:inf", "got inf"),
        ("dirichlet:nan", "got nan"),
    ],
)
def test_a_wrong_spec_is_an_error(spec, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_partition(spec)


@pytest.mark.parametrize(
    "spec, examples, workers, message",
    [
        ("unequal", 100, 12, "12 workers do not divide into 5 unequal groups"),
        ("unequal", 100, 50, "0.05 of 100 examples is 5, too few for the 10 workers"),
        ("iid", 3, 4, "3 examples are too few for 4 workers"),
        ("sorted", 3, 4, "3 examples are too few for 4 workers"),
    ],
)
def test_sizes_that_do_not_fit_are_errors_with_both_values(spec, examples, workers, message):
    with pytest.raises(ConfigurationError, match=message):
        shard_sizes(parse_partition(spec), examples, workers)


@pytest.mark.parametrize("spec", ["iid", "fresh"])
def test_a_partition_without_fixed_shards_assigns_none(spec):
    with pytest.raises(ConfigurationError, match="no worker a fixed shard"):
        assign(parse_partition(spec), np.zeros(10), workers=2, seed=0)


def test_fractions_may_sum_to_one_up_to_rounding():
    examples = 4_000_000  # 5e-7 of them are two
    sizes = shard_sizes(parse_partition("unequal:0.5,0.4999995"), examples, workers=4)
    assert sizes.sum() == examples
    with pytest.raises(ConfigurationError, match="sum to 1"):
        parse_partition("unequal:0.33333,0.33333,0.33333")
