"""The reference against closed forms, calculations by hand and other forms of the same loops."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
import reference
import reference_periods

WORKERS, DIM, STEPS = 6, 3, 24
HUB_OF_WORKER = (0, 0, 1, 2, 2, 2)
WEIGHTS = np.array([1.0, 3.0, 2.0, 0.5, 1.5, 4.0])
HUB_WEIGHTS = np.array([4.0, 2.0, 6.0]) / 12
PATH = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
COMPLETE = np.ones((3, 3))
ALWAYS = np.ones((STEPS, WORKERS), bool)
RANDOM = np.random.default_rng(0)
START = RANDOM.normal(size=DIM)
SCALES = RANDOM.uniform(0.5, 2.0, size=(WORKERS, DIM))
TARGETS = RANDOM.normal(size=(WORKERS, DIM))
NOISE = 0.1 * RANDOM.normal(size=(STEPS, WORKERS, DIM))
SOMETIMES = RANDOM.random((STEPS, WORKERS)) < np.linspace(0.1, 1, WORKERS)
RELEASED_TEN_HUBS = """
1010110010 0100111111 1011101110 0011101100 1111111011
1100110001 0111101100 0111001110 1110100111 0100110011
"""
# Sums of a few dozen terms of size one in two orders: some 1e-15, with room for more terms.
EXACT = {"rtol": 0, "atol": 1e-12}


def noisy_quadratic(worker, x, step):
    return SCALES[worker] * (x - TARGETS[worker]) + NOISE[step, worker]


def rate(step):
    return 0.1 / (1 + 0.1 * step)


def one(step):
    return 1.0


def ring(hubs):
    return np.roll(np.eye(hubs), 1, axis=1) + np.roll(np.eye(hubs), -1, axis=1)


def ten_hubs():
    return np.array([[int(entry) for entry in row] for row in RELEASED_TEN_HUBS.split()])


@pytest.mark.parametrize("adjacency", [PATH, COMPLETE, ring(8), ring(5), ten_hubs()], ids=len)
def test_mixing_matrix_keeps_the_weighted_mean_and_contracts(adjacency):
    weights = np.random.default_rng(1).uniform(0.1, 1.0, len(adjacency))
    weights /= weights.sum()
    mixing = reference.mixing_matrix(adjacency, weights)
    np.testing.assert_allclose(mixing.sum(axis=0), 1, **EXACT)
    np.testing.assert_allclose(mixing @ weights, weights, **EXACT)
    np.testing.assert_allclose(mixing * weights, (mixing * weights).T, **EXACT)
    apart = ~(np.asarray(adjacency, bool) | np.eye(len(weights), dtype=bool))
    assert np.all(mixing[apart] == 0)
    # The scale c is an off-diagonal entry over its weight; no diagonal entry is below c b_j.
    scale = mixing[1, 0] / weights[1] if adjacency[1][0] else (mixing[2, 0] / weights[2])
    assert np.all(np.diag(mixing) >= scale * weights - 1e-15)
    moduli = np.sort(np.abs(np.linalg.eigvals(mixing)))
    assert moduli[-1] == pytest.approx(1) and moduli[-2] < 1 - 1e-3


@pytest.mark.parametrize("adjacency", [PATH, ring(6), ten_hubs()], ids=len)
def test_equal_hub_weights_give_the_laplacian_step(adjacency):
    hubs = len(adjacency)
    links = np.asarray(adjacency) * (1 - np.eye(hubs))
    degrees = links.sum(axis=0)
    expected = np.eye(hubs) - (np.diag(degrees) - links) / (degrees.max() + 1)
    mixing = reference.mixing_matrix(adjacency, np.full(hubs, 1 / hubs))
    np.testing.assert_allclose(mixing, expected, **EXACT)


def test_complete_graph_mixes_to_the_weighted_mean_at_once():
    mixing = reference.mixing_matrix(COMPLETE, HUB_WEIGHTS)
    np.testing.assert_allclose(mixing, np.outer(HUB_WEIGHTS, np.ones(3)), **EXACT)


def test_mixing_matrix_of_a_weighted_path_by_hand():
    # b = (1/2, 1/4, 1/4): the middle sees all weight, so c = 1 and H_ij = b_i on edges.
    expected = np.array([[0.75, 0.5, 0.0], [0.25, 0.25, 0.25], [0.0, 0.25, 0.75]])
    np.testing.assert_allclose(reference.mixing_matrix(PATH, [0.5, 0.25, 0.25]), expected, **EXACT)


@pytest.mark.parametrize("active", [ALWAYS, SOMETIMES], ids=["always", "sometimes"])
@pytest.mark.parametrize(("tau", "q"), [(1, 1), (3, 1), (1, 4), (4, 3), (5, 2)])
def test_mll_sgd_loops_equal_one_matrix_a_step(tau, q, active):
    mixing = reference.mixing_matrix(PATH, HUB_WEIGHTS)
    start = START + np.random.default_rng(2).normal(size=(WORKERS, DIM))
    arguments = (start, rate, STEPS, tau, q, WEIGHTS, HUB_OF_WORKER, mixing, active)
    loops = reference.mll_sgd(noisy_quadratic, *arguments)
    matrix = reference.mll_sgd_matrix(noisy_quadratic, *arguments)
    assert loops.shape == (STEPS + 1, WORKERS, DIM)
    np.testing.assert_allclose(loops, matrix, **EXACT)


def test_mll_sgd_without_steps_contracts_to_the_weighted_mean_by_the_second_eigenvalue():
    mixing = reference.mixing_matrix(PATH, HUB_WEIGHTS)
    start = np.random.default_rng(3).normal(size=(WORKERS, DIM))
    idle = np.zeros((40, WORKERS), bool)
    models = reference.mll_sgd(
        noisy_quadratic, start, rate, 40, 1, 1, WEIGHTS, HUB_OF_WORKER, mixing, idle
    )
    kept = reference.weighted_mean(start, WEIGHTS)
    apart = np.array([reference.weighted_mean((row - kept) ** 2, WEIGHTS) for row in models])
    for row in models:
        np.testing.assert_allclose(reference.weighted_mean(row, WEIGHTS), kept, **EXACT)
    # H is self-adjoint in the b-weighted norm; after 40 steps its slowest mode is all that is left.
    second = np.sort(np.abs(np.linalg.eigvals(mixing)))[-2]
    contraction = np.sqrt(apart[1:] / apart[:-1])
    assert np.all(contraction <= second + 1e-9)
    np.testing.assert_allclose(contraction[-1], second, rtol=1e-6)


def test_mll_sgd_mean_moves_by_the_weighted_gradients_only():
    mixing = reference.mixing_matrix(PATH, HUB_WEIGHTS)
    models = reference.mll_sgd(
        noisy_quadratic, START, rate, STEPS, 2, 3, WEIGHTS, HUB_OF_WORKER, mixing, SOMETIMES
    )
    for step in range(STEPS):
        moves = [
            rate(step) * SOMETIMES[step, i] * noisy_quadratic(i, models[step, i], step)
            for i in range(WORKERS)
        ]
        moved = reference.weighted_mean(models[step], WEIGHTS)
        moved = moved - reference.weighted_mean(moves, WEIGHTS)
        after = reference.weighted_mean(models[step + 1], WEIGHTS)
        np.testing.assert_allclose(after, moved, **EXACT)


@pytest.mark.parametrize(
    ("hub_of_worker", "mixing"),
    [
        ((0,) * WORKERS, np.ones((1, 1))),
        (HUB_OF_WORKER, reference.mixing_matrix(COMPLETE, HUB_WEIGHTS)),
    ],
    ids=["one hub", "complete graph"],
)
def test_mll_sgd_on_one_hub_or_a_complete_graph_is_local_sgd(hub_of_worker, mixing):
    multi_level = reference.mll_sgd(
        noisy_quadratic, START, rate, STEPS, 4, 1, WEIGHTS, hub_of_worker, mixing, ALWAYS
    )
    periods = reference_periods.constant(STEPS, 4)
    local = reference.local_sgd(noisy_quadratic, START, rate, periods, WEIGHTS)
    np.testing.assert_allclose(multi_level, local, **EXACT)


def test_mll_sgd_that_mixes_completely_at_every_step_is_data_parallel():
    mixing = reference.mixing_matrix(COMPLETE, HUB_WEIGHTS)
    multi_level = reference.mll_sgd(
        noisy_quadratic, START, rate, STEPS, 1, 1, WEIGHTS, HUB_OF_WORKER, mixing, ALWAYS
    )
    parallel = reference.data_parallel(noisy_quadratic, START, rate, STEPS, WEIGHTS)
    np.testing.assert_allclose(multi_level, np.stack([parallel] * WORKERS, axis=1), **EXACT)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("at_sync", ["keep", "average"])
def test_momentum_sgd_that_averages_at_every_step_is_data_parallel(nesterov, at_sync):
    # Momentum is linear in the gradients, so the mean of momenta is the momentum of the mean.
    periods = reference_periods.constant(STEPS, 1)
    local = reference.local_sgd(
        noisy_quadratic, START, rate, periods, WEIGHTS, 0.9, nesterov, at_sync
    )
    parallel = reference.data_parallel(noisy_quadratic, START, rate, STEPS, WEIGHTS, 0.9, nesterov)
    np.testing.assert_allclose(local, np.stack([parallel] * WORKERS, axis=1), **EXACT)


@pytest.mark.parametrize(
    ("periods", "nesterov", "at_sync", "expected"),
    [
        # m = 1, 3/2, 7/4 under a constant gradient 1 and beta = 1/2.
        ([3], False, "keep", [0, -1, -2.5, -4.25]),
        # g + m/2 = 3/2, 7/4, 15/8.
        ([3], True, "keep", [0, -1.5, -3.25, -5.125]),
        ([1, 1, 1], False, "keep", [0, -1, -2.5, -4.25]),
        ([1, 2], False, "reset", [0, -1, -2, -3.5]),
    ],
)
def test_momentum_by_hand(periods, nesterov, at_sync, expected):
    models = reference.local_sgd(
        lambda worker, x, step: np.ones(1), [0.0], one, periods, [1.0], 0.5, nesterov, at_sync
    )
    np.testing.assert_allclose(models[:, 0, 0], expected, **EXACT)


@pytest.mark.parametrize(
    ("at_sync", "in_second_round"),
    # After one step with gradients 1 and -3 the model is 1 and the momenta are 1 and -3, kept, or
    # both -1, or both 0; the next ones are half of that plus the gradient.
    [("keep", [-0.5, 5.5]), ("average", [0.5, 4.5]), ("reset", [0.0, 4.0])],
)
def test_momentum_at_a_sync_of_two_workers_by_hand(at_sync, in_second_round):
    models = reference.local_sgd(
        lambda worker, x, step: np.array([(1.0, -3.0)[worker]]),
        [0.0], one, [1, 2], [1.0, 1.0], 0.5, at_sync=at_sync,
    )  # fmt: skip
    np.testing.assert_allclose(models[1, :, 0], [1, 1], **EXACT)
    np.testing.assert_allclose(models[2, :, 0], in_second_round, **EXACT)


def test_adamw_by_hand():
    # Gradients 1 then 3, decay 1/10, from x = 1: m_hat is 1, then (0.9 * 0.1 + 0.1 * 3) / 0.19;
    # v_hat is 1, then (0.999 * 0.001 + 0.001 * 9) / 0.001999.
    models = reference.local_adamw(
        lambda worker, x, step: np.array([(1.0, 3.0)[step]]),
        [1.0], lambda step: 0.5, [2], [1.0], epsilon=0.0, weight_decay=0.1,
    )  # fmt: skip
    first = 1 - 0.5 * (1 + 0.1 * 1)
    second = first - 0.5 * (0.39 / 0.19 / np.sqrt(9.999 / 1.999) + 0.1 * first)
    np.testing.assert_allclose(models[:, 0, 0], [1, first, second], **EXACT)


@pytest.mark.parametrize(
    ("at_sync", "moves"),
    # Gradients +-1, +-1, +-3. Kept moments repeat the sign step, averaged ones leave m = 0 and
    # v = 0.001 with the count at one, zeroed ones begin again with the sign step and the count.
    [
        ("keep", [1.0, 0.471 / 0.271 / np.sqrt(10.997001 / 2.997001)]),
        ("average", [0.1 / 0.19, 0.39 / 0.271 / np.sqrt(10.997001 / 2.997001)]),
        ("reset", [1.0, 0.39 / 0.19 / np.sqrt(9.999 / 1.999)]),
    ],
)
def test_adamw_at_a_sync_of_two_workers_by_hand(at_sync, moves):
    models = reference.local_adamw(
        lambda worker, x, step: np.array([(1.0, -1.0)[worker] * (1.0, 1.0, 3.0, 0.0)[step]]),
        [0.0], one, [1, 3], [1.0, 1.0], epsilon=0.0, at_sync=at_sync,
    )  # fmt: skip
    np.testing.assert_allclose(models[1, :, 0], [0, 0], **EXACT)
    np.testing.assert_allclose(models[2, :, 0], [-moves[0], moves[0]], **EXACT)
    np.testing.assert_allclose(models[3, 0, 0], -sum(moves), **EXACT)


@pytest.mark.parametrize(
    ("function", "options", "optimizer"),
    [
        (reference.local_sgd, (), optax.sgd(rate)),
        (reference.local_sgd, (0.9,), optax.sgd(rate, 0.9)),
        (reference.local_sgd, (0.9, True), optax.sgd(rate, 0.9, nesterov=True)),
        (
            reference.local_adamw,
            (0.8, 0.95, 1e-3, 0.1),
            optax.adamw(rate, 0.8, 0.95, 1e-3, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "adamw"],
)
def test_one_worker_is_optax(function, options, optimizer):
    models = function(noisy_quadratic, START, rate, [4, 2], [1.0], *options)
    with jax.enable_x64(True):
        x, update = jax.numpy.asarray(START), jax.jit(optimizer.update)
        state = optimizer.init(x)
        for step in range(6):
            updates, state = update(noisy_quadratic(0, x, step), state, x)
            x = optax.apply_updates(x, updates)
            assert x.dtype == np.float64
            np.testing.assert_allclose(models[step + 1, 0], x, **EXACT)


@pytest.mark.parametrize(
    ("local_steps", "learning_rate", "expected"),
    [(1, 1.0, 9.195e-5), (20, 1.0, 9.195e-5), (1, 0.1, 2.261e-4), (20, 0.1, 1.038e-4)],
)
def test_two_quadratics_figures_at_a_thousand_rounds(local_steps, learning_rate, expected):
    problem = reference.two_quadratics(1000, local_steps, learning_rate)
    # Half a unit of the last of four printed digits.
    assert problem.final_loss == pytest.approx(expected, rel=6e-4)
    assert problem.lower_bound == pytest.approx(9.192e-5, rel=6e-4)
    assert problem.final_loss >= problem.lower_bound


@pytest.mark.parametrize(
    ("rounds", "local_steps", "learning_rate", "smoothness"),
    [(1, 3, 0.1, 1.0), (40, 1, 1.0, 1.0), (40, 5, 0.2, 2.5), (1000, 4, 0.1, 1.0)],
)
def test_two_quadratics_run_as_the_closed_form(rounds, local_steps, learning_rate, smoothness):
    arguments = (rounds, local_steps, learning_rate, smoothness)
    a_1, a_2, start, final_loss, lower_bound = reference.two_quadratics(*arguments)
    assert a_1 @ a_1 == pytest.approx(1) and a_2 @ a_2 == pytest.approx(1)
    assert a_1 @ a_2 == pytest.approx(1 - 1 / (rounds + 0.5))
    np.testing.assert_allclose(start, (a_1 - a_2) / np.linalg.norm(a_1 - a_2), **EXACT)
    losses = reference.two_quadratics_losses(*arguments)
    assert losses.shape == (rounds + 1,) and np.all(np.diff(losses) < 0)
    # Each of R rounds rounds a factor, so relative errors add up to some R units of 1e-16.
    assert losses[-1] == pytest.approx(final_loss, rel=1e-11)
    assert losses[-1] >= lower_bound

    models = reference.local_sgd(
        lambda worker, x, step: smoothness * ((a_1, a_2)[worker] @ x) * (a_1, a_2)[worker],
        start, lambda step: learning_rate, [local_steps] * min(rounds, 40), [1, 1],
    )  # fmt: skip
    last = models[-1, 0]
    loss = smoothness / 4 * ((a_1 @ last) ** 2 + (a_2 @ last) ** 2)
    assert loss == pytest.approx(losses[min(rounds, 40)], rel=1e-11)
