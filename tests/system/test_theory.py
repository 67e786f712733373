"""The command that compares the bound of MLL-SGD with exact moments and runs."""

import csv

import numpy as np
import pytest

from experiments.bounding import figure, least_squares
from experiments.bounding.moments import exact_moments

pytestmark = pytest.mark.slow


def test_measured_runs_agree_with_exact_moments_and_the_bound(tmp_path, monkeypatch):
    monkeypatch.setitem(least_squares.RUN, "steps", 800)
    found = [least_squares.compare(graph, seeds=4) for graph in ("complete", "ring")]
    for one in found:
        error = np.std(one.measured, ddof=1) / 2
        # Starts of rounds lie half a round before the mean step, in a loss that falls.
        assert (
            abs(np.mean(one.measured) - one.exact.gradient) < 4 * error + 0.02 * one.exact.gradient
        )
        assert one.exact.gradient < one.bound.total and one.exact.consensus < one.consensus_bound
    figure.write_table(tmp_path / "theory.csv", found)
    figure.draw(tmp_path / "theory.png", found)
    rows = list(csv.DictReader((tmp_path / "theory.csv").open()))
    assert [row["graph"] for row in rows] == ["complete", "ring"]
    assert float(rows[1]["bound"]) == pytest.approx(found[1].bound.total, rel=1e-5)
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")


def test_the_basis_of_the_eigenvectors_does_not_change_the_loss():
    inputs, optimum = least_squares._task()
    problem = least_squares.in_own_basis()
    loss = np.square(inputs @ optimum).mean() / 2
    assert problem.gap == pytest.approx(loss, rel=1e-12)
    one = exact_moments(
        problem,
        least_squares.LAYOUT,
        np.full((10, 10), 0.1),
        **least_squares.PERIODS,
        steps=1,
        learning_rate=0.1,
    )
    gradient = inputs.T @ (inputs @ optimum) / len(inputs)
    assert one.gradient == pytest.approx(np.square(gradient).sum(), rel=1e-12)
