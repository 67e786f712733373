"""What makes the ratios honest: all contenders train the same numbers, the bound counts what a hand
counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.benchmarks.speed import in_jax
from experiments.benchmarks.speed.arithmetic import bound, count_flops, round_flops
from experiments.benchmarks.speed.workloads import WORKLOADS, Workload, initial_params, make_indices

IMAGE = (8, 8, 1)
TINY = [
    Workload("logistic", "logistic", 4, 3, 2, IMAGE, 1, 20),
    Workload("softmax", "logistic", 4, 3, 2, IMAGE, 10, 20),
    Workload("mlp", "mlp", 2, 3, 2, IMAGE, 10, 20),
    Workload("mll_cnn", "mll_cnn", 2, 3, 2, IMAGE, 6, 20),
    Workload("resnet", "small_resnet_layer_norm", 2, 2, 2, (8, 8, 3), 4, 20),
    Workload("transformer", "small_transformer", 2, 2, 2, (6,), 11, 20),
]


def losses(run, workload, rounds=2):
    """Of each step and worker of the first rounds, of which the second begins with an average."""
    shape = (workload.steps, workload.workers)
    made = [np.reshape(run(make_indices(workload, turn)), shape) for turn in range(rounds)]
    return np.concatenate(made)


@pytest.mark.parametrize("workload", TINY, ids=lambda w: w.name)
def test_all_contenders_train_the_same_numbers(workload):
    params = initial_params(workload)
    own = losses(in_jax.workers(workload, params), workload)
    assert np.isfinite(own).all() and len(np.unique(own)) > own.size / 2
    # Sums in another order: float32 rounding, some steps on.
    close = {"rtol": 1e-3, "atol": 1e-5}
    np.testing.assert_allclose(losses(in_jax.plain_vmap(workload, params), workload), own, **close)
    pytest.importorskip("torch")
    from experiments.benchmarks.speed.in_torch import workers_in_turn

    np.testing.assert_allclose(losses(workers_in_turn(workload, params), workload), own, **close)


def test_shared_weights_see_the_examples_of_all_workers():
    workload = TINY[1]
    params, indices = initial_params(workload), make_indices(workload, 0)
    params["map"]["kernel"] = np.linspace(-1, 1, params["map"]["kernel"].size, dtype=np.float32)
    params["map"]["kernel"] = params["map"]["kernel"].reshape(64, 10)
    apart = in_jax.workers(workload, params)(indices)
    together = in_jax.shared(workload, params)(indices)
    np.testing.assert_allclose(np.mean(together[0]), np.mean(apart[0]), rtol=1e-5)


def test_flops_of_the_mll_cnn_counted_by_hand():
    # Multiply-adds of an example: pixels × outputs × window × inputs.
    first, second = 28 * 28 * 10 * 25 * 1, 14 * 14 * 20 * 25 * 10
    dense = 980 * 100 + 100 * 62
    # Forward and both gradients; the first layer's input needs none.
    example = 2 * (2 * first + 3 * (second + dense))
    assert round_flops(WORKLOADS["mll_cnn"]) == 20 * 32 * 8 * example


def test_flops_of_a_strided_convolution_and_its_gradients_are_three_times_the_same():
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 2, 3, 5))
    convolve = lambda *xs: lax.conv_general_dilated(
        *xs, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    forward = 2 * (2 * 4 * 4 * 5) * (2 * 2 * 3)
    assert count_flops(jax.make_jaxpr(convolve)(image, kernel)) == forward
    gradients = jax.value_and_grad(lambda *xs: jnp.square(convolve(*xs)).sum(), (0, 1))
    assert count_flops(jax.make_jaxpr(gradients)(image, kernel)) == 3 * forward


def test_flops_of_groups_loops_and_branches():
    image, kernel = jnp.ones((1, 4, 4, 6)), jnp.ones((1, 1, 3, 4))
    grouped = lambda x, k: lax.conv_general_dilated(
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    assert count_flops(jax.make_jaxpr(grouped)(image, kernel)) == 2 * (16 * 4) * 3
    matrix = jnp.ones((2, 2))
    once = 2 * 2 * 2 * 2
    loop = lambda a: lax.scan(lambda c, _: (c @ a, None), a, length=5)[0]
    assert count_flops(jax.make_jaxpr(jax.jit(loop))(matrix)) == 5 * once
    branch = lambda a: lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a @ a)
    assert count_flops(jax.make_jaxpr(branch)(matrix)) == 2 * once
    endless = lambda a: lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ a, a)
    with pytest.raises(ValueError, match="not known"):
        count_flops(jax.make_jaxpr(endless)(matrix))


def test_the_bound_is_time_at_a_rate(monkeypatch):
    monkeypatch.setattr("experiments.benchmarks.speed.arithmetic.SIZES", {"cpu": (8, 16)})
    assert 0 < bound(TINY[0])() < 1


def test_the_program_of_more_workers_holds_more():
    few, many = (in_jax.program_bytes(TINY[1]._replace(workers=n)) for n in (2, 8))
    model = 4 * (64 * 10 + 10)
    assert few >= 2 * model and many - few >= 6 * model
