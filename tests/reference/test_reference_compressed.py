"""The loops with compressed messages against calculations by hand, conservation laws, the loops
without compression, and other forms of the same loops."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import reference_compressed as compressed
import reference_compressors as compressors
from reference_compressed import Run, adamw, sgd

WORKERS, DIM, STEPS = 5, 6, 24
HUB_OF_WORKER = (0, 0, 1, 2, 2)
WEIGHTS = np.array([1.0, 3.0, 2.0, 0.5, 1.5])
SHARES = WEIGHTS / WEIGHTS.sum()
PATH = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
MIXING = reference.mixing_matrix(PATH, np.array([4.0, 2.0, 2.0]) / 8)
RANDOM = np.random.default_rng(0)
START = RANDOM.normal(size=DIM)
SCALES = RANDOM.uniform(0.5, 2.0, size=(WORKERS, DIM))
TARGETS = RANDOM.normal(size=(WORKERS, DIM))
NOISE = 0.1 * RANDOM.normal(size=(STEPS, WORKERS, DIM))
SOMETIMES = RANDOM.random((STEPS, WORKERS)) < np.linspace(0.2, 1, WORKERS)
# Sums of a few dozen terms of size one in two orders: some 1e-15, with room for more terms.
EXACT = {"rtol": 0, "atol": 1e-12}


def start_of(message):
    return 5 * message


COMPRESSORS = {
    "identity": compressors.identity,
    "zero": compressors.zero,
    "top_k": compressors.top_k(2),
    "sign": compressors.sign,
    "shared_block": compressors.shared_block(2, start_of),
}
RULES = {
    "sgd": sgd(),
    "momentum": sgd(0.8),
    "nesterov": sgd(0.8, nesterov=True),
    "adamw": adamw(0.8, 0.95, 0.1),
}
LOSSY = compressors.top_k(2)
BLOCK = compressors.shared_block(1, start_of)


def noisy_quadratic(worker, x, step):
    return SCALES[worker] * (x - TARGETS[worker]) + NOISE[step, worker]


def rate(step):
    return 0.1 / (1 + 0.1 * step)


def make_run(rule=RULES["sgd"], active=None):
    return Run(noisy_quadratic, START, rate, WEIGHTS, rule, active)


def mean_of(trajectory):
    return np.einsum("i,tid->td", SHARES, trajectory)


def updates_of(rule, models, active=None):
    """The mean of the updates that the models of a trajectory made, [steps, DIM]."""
    states, updates = [None] * WORKERS, []
    for step, x in enumerate(models[:-1]):
        mean = np.zeros(DIM)
        for worker in range(WORKERS):
            if active is None or active[step, worker]:
                g = noisy_quadratic(worker, x[worker], step)
                update, states[worker] = rule(x[worker], states[worker], g, rate(step))
                mean += SHARES[worker] * update
        updates.append(mean)
    return np.stack(updates)


def test_compressors_by_hand():
    vectors = np.array([[1.0, -4.0, 3.0], [0.0, 2.0, -2.0]])
    sent = {name: compress(vectors, 1).tolist() for name, compress in COMPRESSORS.items()}
    assert sent["identity"] == vectors.tolist() and sent["zero"] == [[0] * 3, [0] * 3]
    assert sent["top_k"] == [[0, -4, 3], [0, 2, -2]]
    assert sent["shared_block"] == [[1, 0, 3], [0, 0, -2]]  # from 5 mod 3 on, around the end
    np.testing.assert_allclose(sent["sign"], np.array([[8, -8, 8], [4, 4, -4]]) / 3)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_partial_synchronisation_keeps_the_mean_and_the_residuals(name):
    vectors = np.random.default_rng(1).normal(size=(WORKERS, DIM))
    synced, residuals = compressed.psync(vectors, COMPRESSORS[name], WEIGHTS, 3)
    np.testing.assert_allclose(SHARES @ synced, SHARES @ vectors, **EXACT)
    np.testing.assert_allclose(residuals + COMPRESSORS[name](vectors, 3), vectors, **EXACT)
    common = synced - residuals
    np.testing.assert_allclose(common, np.broadcast_to(common[0], common.shape), **EXACT)


def test_partial_synchronisation_by_hand():
    """Weights 1/4 and 3/4; each worker sends its larger entry: (0, −4) and (8, 0)."""
    vectors = np.array([[1.0, -4.0], [8.0, 2.0]])
    synced, residuals = compressed.psync(vectors, compressors.top_k(1), [1, 3], 0)
    assert residuals.tolist() == [[1, 0], [0, 2]]
    assert synced.tolist() == [[7, -1], [6, 1]]


@pytest.mark.parametrize("active", [None, SOMETIMES], ids=["always", "sometimes"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_mean_moves_by_the_mean_update_with_any_compressor(name, rule, active):
    """The mean is Σ a_j x_j in CSER, and Σ a_j (x_j + e_j) with error feedback."""
    run, compress = make_run(RULES[rule], active), COMPRESSORS[name]
    models, errors = compressed.m_cser_1(run, [5, 3, 8, 8], compress, BLOCK)
    moved = START + np.cumsum(updates_of(run.rule, models, active), axis=0)
    np.testing.assert_allclose(mean_of(models)[1:], moved, **EXACT)
    models = compressed.m_cser_2(run, [5, 3, 8, 8], compress, BLOCK)
    moved = START + np.cumsum(updates_of(run.rule, models, active), axis=0)
    np.testing.assert_allclose(mean_of(models)[1:], moved, **EXACT)
    models, errors = compressed.qsparse_local_sgd(run, [5, 3, 8, 8], compress)
    moved = START + np.cumsum(updates_of(run.rule, models, active), axis=0)
    np.testing.assert_allclose(mean_of(models + errors)[1:], moved, **EXACT)


@pytest.mark.parametrize("active", [None, SOMETIMES], ids=["always", "sometimes"])
@pytest.mark.parametrize("method", [compressed.cser, compressed.m_cser_1])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_models_without_their_errors_are_common_at_every_step(name, method, active):
    run = make_run(active=active)
    models, errors = method(run, [5, 3, 8, 8], COMPRESSORS[name], LOSSY)
    common = models - errors
    np.testing.assert_allclose(common, np.broadcast_to(common[:, :1], common.shape), **EXACT)


def anchor_form(run, periods, update_compress, reset_compress, at_steps):
    """M-CSER I with one anchor y instead of K errors, e_i = x_i − y. The anchor moves by the mean
    message, at steps too or at resets alone."""
    x, y, step = np.stack([run.start] * WORKERS), run.start, 0
    states, models = [None] * WORKERS, [x]
    for local_steps in periods:
        for _ in range(local_steps):
            updates = np.zeros_like(x)
            for worker in range(WORKERS):
                g = run.gradient(worker, x[worker], step)
                updates[worker], states[worker] = run.rule(
                    x[worker], states[worker], g, run.learning_rate(step)
                )
            sent = update_compress(updates, step)
            x = x + SHARES @ sent + (updates - sent)
            y = y + SHARES @ sent if at_steps else y
            step += 1
            models.append(x)
        errors = x - y
        sent = reset_compress(errors, step)
        y = y + SHARES @ sent
        x = y + (errors - sent)
        models[-1] = x
    return np.stack(models)


@pytest.mark.parametrize("rule", RULES)
def test_one_anchor_replaces_the_errors_of_all_workers_if_it_moves_at_steps_too(rule):
    arguments = (make_run(RULES[rule]), [5, 3, 8, 8], BLOCK, LOSSY)
    models, _ = compressed.m_cser_1(*arguments)
    np.testing.assert_allclose(anchor_form(*arguments, at_steps=True), models, **EXACT)
    assert np.abs(anchor_form(*arguments, at_steps=False) - models).max() > 1e-3


def test_under_a_linear_reset_the_common_part_of_the_errors_does_not_matter():
    """PSync(e_i + c) = PSync(e_i) + c if the mask is the same on all workers."""
    arguments = (make_run(), [5, 3, 8, 8], LOSSY, BLOCK)
    models, _ = compressed.m_cser_1(*arguments)
    for at_steps in (True, False):
        np.testing.assert_allclose(anchor_form(*arguments, at_steps=at_steps), models, **EXACT)


@pytest.mark.parametrize("active", [None, SOMETIMES], ids=["always", "sometimes"])
@pytest.mark.parametrize("name", ["top_k", "sign", "shared_block"])
def test_momentum_cser_without_momentum_is_cser(name, active):
    """These compressors are homogeneous and odd: C(−η g) = −η C(g)."""
    arguments = (make_run(active=active), [5, 3, 8, 8], COMPRESSORS[name], LOSSY)
    first, first_errors = compressed.cser(*arguments)
    second, second_errors = compressed.m_cser_1(*arguments)
    np.testing.assert_allclose(first, second, **EXACT)
    np.testing.assert_allclose(first_errors, second_errors, **EXACT)


def local(rule, periods):
    """The loops without compression."""
    options = {"momentum": {"momentum": 0.8}, "nesterov": {"momentum": 0.8, "nesterov": True}}
    if rule == "adamw":
        loop, options = reference.local_adamw, {"beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1}
    else:
        loop, options = reference.local_sgd, options.get(rule, {})
    return loop(noisy_quadratic, START, rate, periods, WEIGHTS, **options)


@pytest.mark.parametrize("rule", RULES)
def test_methods_that_send_everything_are_local_sgd(rule):
    run, periods, whole = make_run(RULES[rule]), [5, 3, 8, 8], compressors.identity
    expected = local(rule, periods)
    for models in [
        compressed.qsparse_local_sgd(run, periods, whole)[0],
        compressed.sparse_loco(run, periods, whole, 0.5, 1.0)[0],
        compressed.m_cser_1(run, periods, compressors.zero, whole)[0],
        compressed.m_cser_2(run, periods, compressors.zero, whole),
    ]:
        np.testing.assert_allclose(models, expected, **EXACT)
    every_step = local(rule, [1] * STEPS)
    np.testing.assert_allclose(compressed.ef_sgd(run, STEPS, whole)[0], every_step, **EXACT)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov"])
def test_updates_that_are_linear_in_the_gradient_sent_whole_are_data_parallelism(rule):
    run, whole = make_run(RULES[rule]), compressors.identity
    beta = 0.0 if rule == "sgd" else 0.8
    expected = reference.data_parallel(
        noisy_quadratic, START, rate, STEPS, WEIGHTS, beta, rule == "nesterov"
    )
    np.testing.assert_allclose(compressed.data_parallel(run, STEPS, whole), expected, **EXACT)
    models, errors = compressed.m_cser_1(run, [5, 3, 8, 8], whole, LOSSY)
    np.testing.assert_allclose(models, np.stack([expected] * WORKERS, axis=1), **EXACT)
    assert not errors.any()
    if rule == "sgd":
        models, _ = compressed.cser(run, [5, 3, 8, 8], whole, LOSSY)
        np.testing.assert_allclose(models, np.stack([expected] * WORKERS, axis=1), **EXACT)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_error_feedback_at_every_step_is_qsparse_with_rounds_of_one_step(name):
    run, compress = make_run(RULES["nesterov"], SOMETIMES), COMPRESSORS[name]
    models, errors = compressed.ef_sgd(run, STEPS, compress)
    expected, expected_errors = compressed.qsparse_local_sgd(run, [1] * STEPS, compress)
    np.testing.assert_allclose(models, expected, **EXACT)
    np.testing.assert_allclose(errors, expected_errors, **EXACT)
    loco, _ = compressed.sparse_loco(run, [1] * STEPS, compress, 1.0, 1.0)
    np.testing.assert_allclose(loco, expected, **EXACT)


def test_error_feedback_by_hand():
    """Constant gradients (1, 3) and (2, 0), η = 1, top-1. First p = (−1, −3), (−2, 0), of which −3
    and −2 are sent; then (−2, −3) and (−2, 0): −3 and −2 again, and e_1 = (−2, 0)."""
    gradients = np.array([[1.0, 3.0], [2.0, 0.0]])
    run = Run(lambda worker, x, step: gradients[worker], np.zeros(2), lambda step: 1.0, [1, 1])
    models, errors = compressed.ef_sgd(run, 2, compressors.top_k(1))
    assert models[:, 0].tolist() == [[0, 0], [-1, -1.5], [-2, -3]]
    assert errors[:, 0].tolist() == [[0, 0], [-1, 0], [-2, 0]] and not errors[:, 1].any()


def test_an_outer_optimizer_and_a_decay_by_hand():
    """One worker, a gradient of 1, η = 1, rounds of two steps, nothing sent at the second end:
    d = 2, v = 2, y = −α (2 + β 2) = −1.5; then p = −2, d = 0, v = 1, y = −1.5 − 0.5 · 0.5 · 1."""
    run = Run(lambda worker, x, step: np.ones(1), np.zeros(1), lambda step: 1.0, [1])
    send_at_2 = lambda vectors, message: vectors * (message == 2)
    arguments = (run, [2, 2, 2], send_at_2, 0.5, 0.5)
    models, errors = compressed.sparse_loco(*arguments, outer_momentum=0.5, nesterov=True)
    # The third: p = 0.5 · −2 − 2 = −3, d = 0, v = 0.5, y = −1.75 − 0.5 · 0.5 · 0.5.
    assert models[::2, 0, 0].tolist() == [0, -1.5, -1.75, -1.875]
    assert errors[::2, 0, 0].tolist() == [0, 0, -2, -3]


@pytest.mark.parametrize("active", [None, SOMETIMES], ids=["always", "sometimes"])
def test_hub_averages_sent_whole_are_multi_level_local_sgd(active):
    run = make_run(active=active)
    models, _ = compressed.mll_sgd(run, STEPS, 3, 2, HUB_OF_WORKER, MIXING, compressors.identity)
    always = np.ones((STEPS, WORKERS), bool) if active is None else active
    expected = reference.mll_sgd(
        noisy_quadratic, START, rate, STEPS, 3, 2, WEIGHTS, HUB_OF_WORKER, MIXING, always
    )
    np.testing.assert_allclose(models, expected, **EXACT)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_one_hub_is_qsparse_and_hubs_keep_the_mean_with_their_errors(name):
    run, compress = make_run(RULES["momentum"], SOMETIMES), COMPRESSORS[name]
    one, _ = compressed.mll_sgd(run, STEPS, 3, 1, [0] * WORKERS, np.eye(1), compress)
    expected, _ = compressed.qsparse_local_sgd(run, [3] * (STEPS // 3), compress)
    np.testing.assert_allclose(one, expected, **EXACT)
    models, errors = compressed.mll_sgd(run, STEPS, 3, 2, HUB_OF_WORKER, MIXING, compress)
    moved = START + np.cumsum(updates_of(run.rule, models, SOMETIMES), axis=0)
    np.testing.assert_allclose(mean_of(models + errors)[1:], moved, **EXACT)


@pytest.mark.parametrize("name", ["top_k", "sign"])
def test_feedback_reaches_the_optimum_where_the_same_compressor_without_it_stalls(name):
    """Unequal quadratics ½ s_i (x − t_i)²: x* = Σ a s t / Σ a s. Feedback leaves an error of
    O(η²/δ²) here, and none at all with a rate that goes to zero."""
    pull = lambda worker, x, step: SCALES[worker] * (x - TARGETS[worker])
    weighted = SHARES[:, None] * SCALES
    optimum = (weighted * TARGETS).sum(axis=0) / weighted.sum(axis=0)
    run = Run(pull, START, lambda step: 0.3 / (1 + 0.02 * step), WEIGHTS)
    fed_back, _ = compressed.ef_sgd(run, 2000, COMPRESSORS[name])
    without = compressed.data_parallel(run, 2000, COMPRESSORS[name])
    distance = np.linalg.norm(fed_back[-1, 0] - optimum)
    assert distance < 0.03
    assert np.linalg.norm(without[-1] - optimum) > 5 * distance


def drawn_block(ratio, seed):
    """One of `ratio` blocks, drawn for each message and the same on all workers."""

    def compress(vectors, message):
        kept = vectors.shape[1] // ratio
        at = kept * np.random.default_rng((seed, message)).integers(ratio)
        sent = np.zeros_like(vectors)
        sent[:, at : at + kept] = vectors[:, at : at + kept]
        return sent

    return compress


def test_the_released_cser_is_between_the_implementations_of_the_paper():
    """Noisy quadratics in 512 dimensions, R_C = 16: implementation II also averages the block of
    every step in what workers already differ by, and the released one sends a message less."""
    workers, steps, dim = 8, 160, 512
    noise = np.random.default_rng(0).normal(size=(steps, workers, dim))
    curvature = np.linspace(0.2, 1, dim)
    gradient = lambda worker, x, step: curvature * x + noise[step, worker]
    run = Run(gradient, np.ones(dim), lambda step: 0.1, np.ones(workers), sgd(0.9, nesterov=True))
    arguments = (run, [16] * 10, drawn_block(32, 1), drawn_block(2, 2))

    def distance(models):
        return np.linalg.norm(models - models.mean(axis=1, keepdims=True), axis=2).mean()

    first = distance(compressed.m_cser_1(*arguments)[0])
    second = distance(compressed.m_cser_2(*arguments))
    released = distance(compressed.m_cser_released(*arguments))
    assert second < released < 0.97 * first and released < 1.01 * second


def test_the_released_cser_sends_one_message_a_step():
    """With H = 1 every message is that of a reset; with C1 = C2 implementation II sends the last
    block of a round a second time, which changes nothing."""
    sent = []

    def counted(name, compress):
        return lambda vectors, message: sent.append((name, message)) or compress(vectors, message)

    run = make_run(RULES["momentum"])
    compressors_of = counted("C2", BLOCK), counted("C1", BLOCK)
    models = compressed.m_cser_released(run, [3, 2], *compressors_of)
    assert sent == [("C2", 1), ("C2", 2), ("C1", 3), ("C2", 4), ("C1", 5)]
    twice = compressed.m_cser_2(run, [3, 2], BLOCK, BLOCK)
    np.testing.assert_allclose(models, twice, **EXACT)


def with_decay(rule, weight_decay):
    """The rule with λx added to the gradient."""
    return lambda x, state, g, rate: rule(x, state, g + weight_decay * x, rate)


@pytest.mark.parametrize(("beta", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_decay_outside_a_compressor_that_sends_everything_is_decay_inside(beta, nesterov):
    """Updates of SGD are linear in g + λx, and with H = 1 every x_i is y."""
    rule = sgd(beta, nesterov)
    outside, _ = compressed.qsparse_with_decay_outside(
        make_run(rule), [1] * STEPS, compressors.identity, 0.3, beta, nesterov
    )
    inside, _ = compressed.ef_sgd(make_run(with_decay(rule, 0.3)), STEPS, compressors.identity)
    np.testing.assert_allclose(outside, inside, **EXACT)


def test_decay_outside_a_compressor_that_sends_nothing_shrinks_the_model():
    """y decays by 1 − ηλ a step, where decay inside the compressor never arrives."""
    run = Run(noisy_quadratic, START, lambda step: 0.1, WEIGHTS)
    models, _ = compressed.qsparse_with_decay_outside(run, [2] * 6, compressors.zero, 0.3, 0.0)
    np.testing.assert_allclose(models[-1], np.tile(0.97**12 * START, (WORKERS, 1)), **EXACT)
    inside = run._replace(rule=with_decay(sgd(), 0.3))
    models, _ = compressed.qsparse_local_sgd(inside, [2] * 6, compressors.zero)
    np.testing.assert_allclose(models[-1], np.tile(START, (WORKERS, 1)), **EXACT)


def test_decay_outside_the_compressor_by_hand():
    """Gradient 1, η = 1, λ = 1/2, β = 1/2, heavy ball, nothing sent: y = 4; w = 2, y = 2; w = 2,
    y = 0; w = 1, y = −1."""
    run = Run(lambda worker, x, step: np.ones(1), np.full(1, 4.0), lambda step: 1.0, [1])
    models, errors = compressed.qsparse_with_decay_outside(run, [1] * 3, compressors.zero, 0.5, 0.5)
    assert models[:, 0, 0].tolist() == [4, 2, 0, -1]
    assert errors[:, 0, 0].tolist() == [0, -1, -2, -3]
