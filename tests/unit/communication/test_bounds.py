"""The lemmas and the bound of docs/theory_mll.md against exact second moments, and its matrices."""

import numpy as np
import pytest

from experiments.bounding.moments import Problem, exact_moments
from jaxlocal import ConfigurationError, Layout
from jaxlocal.communication.bounds import drift, mll_bound, noise_spread, rate_condition
from jaxlocal.communication.topology import hub_graph, mixing_matrix, zeta

GRAPHS = ("complete", "ring", "path", "star")


def instance(seed):
    """A random layout, hub network, τ, q and a step size that the bound allows."""
    random = np.random.default_rng(seed)
    hubs, workers = int(random.integers(1, 6)), int(random.integers(1, 4))
    weights = random.uniform(0.2, 4, (hubs, workers))
    rates = random.uniform(0.1, 1, (hubs, workers)) if seed % 3 else 1.0
    layout = Layout(hubs, workers, weights, rates)
    matrix = mixing_matrix(hub_graph(GRAPHS[seed % 4], hubs), layout.hub_weight)
    periods = {"local_steps": int(random.integers(1, 5)), "hub_period": int(random.integers(1, 4))}
    step = 1.0
    while rate_condition(layout, zeta(matrix), **periods, step=step) > 1:
        step *= 0.8
    return layout, matrix, periods, step


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_and_its_lemma_hold_for_exact_moments(seed):
    """A quadratic of three curvatures, L = 2, from far and from near, with and without noise."""
    layout, matrix, periods, step = instance(seed)
    smoothness, steps = 2.0, 40 * periods["local_steps"] * periods["hub_period"]
    for distance, noise in ((1.0, 0.0), (1.0, 1.0), (0.01, 5.0)):
        problem = Problem([2.0, 1.0, 0.05], [distance] * 3, noise)
        run = {"steps": steps, "learning_rate": step / smoothness}
        exact = exact_moments(problem, layout, matrix, **periods, **run)
        task = {"smoothness": smoothness, "noise": noise, "gap": problem.gap}
        bound = mll_bound(layout, zeta(matrix), **periods, **run, **task)
        assert 0 < exact.gradient <= bound.total
        spread, moved = (f(layout, zeta(matrix), **periods) for f in (noise_spread, drift))
        consensus = 2 * run["learning_rate"] ** 2 * (noise * spread + moved * exact.at_workers)
        assert exact.consensus <= consensus * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(0, 12, 4))
def test_the_disagreement_of_noise_alone_is_exact_where_hubs_average_completely(seed):
    """Seeds of complete graphs, ζ = 0: between mixings nothing is estimated."""
    layout, matrix, periods, _ = instance(seed)
    period = periods["local_steps"] * periods["hub_period"]
    problem, run = Problem([0.0], [1.0], 3.0), {"steps": 5 * period, "learning_rate": 0.1}
    exact = exact_moments(problem, layout, matrix, **periods, **run)
    expected = 0.1**2 * 3.0 * noise_spread(layout, 0.0, **periods)
    assert exact.consensus == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_without_the_mean_rate_in_the_denominator_the_first_term_is_no_bound():
    """One worker of rate 0.1, no noise, F = x²/2 from 1, η = 0.1, twenty steps."""
    layout, one = Layout(1, 1, rates=0.1), np.ones((1, 1))
    periods, run = {"local_steps": 1, "hub_period": 1}, {"steps": 20, "learning_rate": 0.1}
    exact = exact_moments(Problem([1.0], [1.0], 0.0), layout, one, **periods, **run)
    growth = 1 - 2 * 0.1 * 0.1 + 0.1**2 * 0.1
    assert exact.gradient == pytest.approx((1 - growth**20) / (1 - growth) / 20)
    bound = mll_bound(layout, 0.0, **periods, **run, smoothness=1, noise=0, gap=0.5)
    assert 0.1 * bound.start < exact.gradient < bound.start


@pytest.mark.parametrize("seed", range(8))
def test_the_matrices_of_the_first_lemma(seed):
    layout, matrix, _, _ = instance(seed)
    hub = np.repeat(np.arange(layout.hubs), layout.workers_per_hub)
    a = layout.weight.reshape(-1)
    share = a / layout.hub_weight[hub]
    v = (hub[:, None] == hub[None]) * share[:, None]
    z, mean = matrix[np.ix_(hub, hub)] * share[:, None], np.outer(a, np.ones_like(a))
    for product, expected in [
        (v @ v, v),
        (v @ z, z),
        (z @ v, z),
        (z @ mean, mean),
        (v @ mean, mean),
    ]:
        np.testing.assert_allclose(product, expected, atol=1e-12)
    scaled = lambda m: m * np.sqrt(a)[None] / np.sqrt(a)[:, None]
    for m in (v, z, mean):
        np.testing.assert_allclose(scaled(m), scaled(m).T, atol=1e-12)
    for times in (1, 2, 3):
        norm = np.linalg.norm(scaled(np.linalg.matrix_power(z, times) - mean), 2)
        assert norm == pytest.approx(zeta(matrix) ** times, abs=1e-12)
        left = zeta(matrix) ** (2 * times) * (share - a)
        square = scaled(np.linalg.matrix_power(z, times) - mean)
        assert (np.diag(square @ square) <= left + 1e-12).all()
    np.testing.assert_allclose(np.diag(scaled(v - mean) @ scaled(v - mean)), share - a, atol=1e-12)


def test_only_the_mean_rate_counts_and_more_frequent_hub_averages_help():
    """For equal weights and a fixed qτ, as the paper says."""
    task = {"steps": 3200, "learning_rate": 1e-4, "smoothness": 1, "noise": 1, "gap": 1}
    rates = ([0.55] * 10, [0.1 * n for n in range(1, 11)], [1.0] + [0.5] * 9)
    bounds = [
        mll_bound(Layout(10, 10, rates=r), 0.9, local_steps=8, hub_period=4, **task) for r in rates
    ]
    for bound in bounds[1:]:
        assert bound[:2] == pytest.approx(bounds[0][:2])
        assert bound.disagreement == pytest.approx(bounds[0].disagreement / 0.55)  # p_max
    periods = [(32, 1), (8, 4), (4, 8), (1, 32)]
    by_period = [
        mll_bound(Layout(10, 10), 0.9, local_steps=tau, hub_period=q, **task).disagreement
        for tau, q in periods
    ]
    assert by_period == sorted(by_period, reverse=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 1.0}, "needs a smaller learning rate"),
        ({"zeta": 1.0}, "zeta must be in"),
        ({"steps": 30}, "multiple of q·τ = 8 steps, got 30"),
        ({"local_steps": 0}, "local_steps must be an integer"),
    ],
)
def test_what_the_bound_does_not_cover_is_refused(changes, sentence):
    task = {"steps": 32, "learning_rate": 0.001, "smoothness": 1, "noise": 1, "gap": 1}
    arguments = {"zeta": 0.5, "local_steps": 4, "hub_period": 2} | task | changes
    with pytest.raises(ConfigurationError, match=sentence):
        mll_bound(Layout(4, 5), **arguments)
