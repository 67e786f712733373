"""The picture of a partition has the counts of its classes, for each kind and size."""

import numpy as np
import pytest

from experiments.plotting import partition as partition_plot
from experiments.plotting.partition import plot_partition
from jaxlocal.data import make_batches

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which stay open until the end of the test."""
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    for figure in drawn:
        pyplot.close(figure)


def heights(figure):
    return [bar.get_height() for bar in figure.axes[0].patches]


def counts_of(figure):
    [image] = figure.axes[1].images
    return np.asarray(image.get_array())


def test_the_examples_of_a_worker_are_counted_by_class(tmp_path, figures):
    targets = np.arange(60) % 3
    batches = make_batches("sorted", targets, 2, 2, 4, seed=0)
    plot_partition(tmp_path / "partition.png", targets, batches, 3, "sorted")
    # Twenty examples of each class, in order, for four workers with fifteen each.
    expected = [[15, 5, 0, 0], [0, 10, 10, 0], [0, 0, 5, 15]]
    [figure] = figures
    np.testing.assert_array_equal(counts_of(figure), expected)
    assert heights(figure) == [15] * 4
    assert figure.get_suptitle() == "sorted: examples held"
    assert figure.axes[1].get_xlabel() == "worker, 2 hubs of 2"
    written = [text.get_text() for text in figure.axes[1].texts if text.get_text() != "0"]
    assert [text for text in written if text] == ["15", "5", "10", "10", "5", "15"]
    assert [path.name for path in tmp_path.iterdir()] == ["partition.png"]
    assert (tmp_path / "partition.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("spec", ["iid", "fresh"])
def test_a_partition_without_fixed_shards_shows_the_first_epoch(spec, tmp_path, figures):
    targets = np.random.default_rng(0).integers(5, size=103)
    batches = make_batches(spec, targets, 1, 4, 5, seed=1)
    plot_partition(tmp_path / "partition.png", targets, batches, 5, spec)
    expected = np.zeros((5, 4), int)
    for step in range(5):  # 103 examples are five whole steps of 4 times 5
        for worker in range(4):
            for example in batches.indices(step, 1)[0, 0, worker]:
                expected[targets[example], worker] += 1
    [figure] = figures
    np.testing.assert_array_equal(counts_of(figure), expected)
    assert heights(figure) == [25] * 4
    assert figure.get_suptitle() == f"{spec}: examples taken in the first epoch"


def test_a_regression_shows_sizes_only(tmp_path, figures):
    targets = np.random.default_rng(0).normal(size=100)
    batches = make_batches("unequal:0.2,0.8", targets, 1, 4, 2, seed=0)
    plot_partition(tmp_path / "partition.png", targets, batches, 0, "regression")
    [figure] = figures
    assert len(figure.axes) == 1 and heights(figure) == [10, 10, 40, 40]
    assert figure.axes[0].get_xlabel() == "worker"


@pytest.mark.parametrize("workers, classes", [(1, 2), (2, 100), (100, 2), (100, 100)])
def test_numbers_are_drawn_only_where_they_do_not_overlap(workers, classes, tmp_path, figures):
    targets = np.arange(4000) % classes
    batches = make_batches("dirichlet:2", targets, 1, workers, 1, seed=0)
    plot_partition(tmp_path / "partition.png", targets, batches, classes, "dirichlet")
    [figure] = figures
    assert counts_of(figure).shape == (classes, workers) and counts_of(figure).sum() == 4000
    few = max(workers, classes) <= partition_plot.WRITTEN
    assert bool(figure.axes[1].texts) == few
    assert max(figure.get_size_inches()) <= 13
