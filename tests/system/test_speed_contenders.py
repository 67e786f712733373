"""The ratios of the suite `speed` are fair: all contenders train the same numbers, and the count of
floating-point operations agrees with one by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from experiments.benchmarks.speed import jax_contenders
from experiments.benchmarks.speed.flops import count_flops, flops_timer, round_flops
from experiments.benchmarks.workloads import WORKLOADS, Workload, initial_params, make_indices

IMAGE = (8, 8, 1)
SOFTMAX = Workload("softmax", "logistic", 4, 3, 2, IMAGE, 10, 20)
QUICK = [
    Workload("logistic", "logistic", 4, 3, 2, IMAGE, 1, 20),
    SOFTMAX,
    Workload("mlp", "mlp", 2, 3, 2, IMAGE, 10, 20),
]
SLOW = [
    Workload("mll_cnn", "mll_cnn", 2, 3, 2, IMAGE, 6, 20),
    Workload("resnet", "small_resnet_layer_norm", 2, 2, 2, (8, 8, 3), 4, 20),
    Workload("transformer", "small_transformer", 2, 2, 2, (6,), 11, 20),
]


# Sums in another order round differently in float32, and later steps amplify the difference.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}

workloads = pytest.mark.parametrize(
    "workload",
    [*QUICK, *(pytest.param(w, marks=pytest.mark.slow) for w in SLOW)],
    ids=lambda w: w.name,
)


def losses(rounds, workload, count=2):
    """Losses of the first rounds, [steps, workers]; the second round begins with an average."""
    shape = (workload.steps, workload.workers)
    numbers = range(count)
    return np.concatenate(
        [np.reshape(rounds.run(make_indices(workload, n)), shape) for n in numbers]
    )


@functools.cache
def of_jaxlocal(workload):
    """Initial parameters of a workload, and the losses of jaxlocal."""
    params = initial_params(workload)
    return params, losses(jax_contenders.library_rounds(workload, params), workload)


@workloads
def test_vmap_trains_the_same_numbers_as_jaxlocal(workload):
    params, expected = of_jaxlocal(workload)
    assert np.isfinite(expected).all() and len(np.unique(expected)) > expected.size / 2
    mapped = losses(jax_contenders.vmap_rounds(workload, params), workload)
    np.testing.assert_allclose(mapped, expected, **CLOSE)


@workloads
def test_pytorch_trains_the_same_numbers_as_jaxlocal(workload):
    pytest.importorskip("torch")
    from experiments.benchmarks.speed.torch_contender import torch_rounds

    params, expected = of_jaxlocal(workload)
    np.testing.assert_allclose(losses(torch_rounds(workload, params), workload), expected, **CLOSE)


def test_a_shared_model_trains_on_the_examples_of_all_workers():
    workload = SOFTMAX
    params, indices = initial_params(workload), make_indices(workload, 0)
    params["map"]["kernel"] = np.linspace(-1, 1, params["map"]["kernel"].size, dtype=np.float32)
    params["map"]["kernel"] = params["map"]["kernel"].reshape(64, 10)
    apart = jax_contenders.library_rounds(workload, params).run(indices)
    together = jax_contenders.shared_model_rounds(workload, params).run(indices)
    np.testing.assert_allclose(np.mean(together[0]), np.mean(apart[0]), rtol=1e-5)


def test_flops_of_the_mll_cnn_counted_by_hand():
    # Multiply-adds of one example: pixels × outputs × window × inputs.
    first, second = 28 * 28 * 10 * 25 * 1, 14 * 14 * 20 * 25 * 10
    dense = 980 * 100 + 100 * 62
    # The forward pass and both gradients; the input of the first layer needs no gradient.
    example = 2 * (2 * first + 3 * (second + dense))
    assert round_flops(WORKLOADS["mll_cnn"]) == 20 * 32 * 8 * example


def test_a_strided_convolution_and_its_gradients_have_three_times_its_flops():
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
    with pytest.raises(ValueError, match="unknown"):
        count_flops(jax.make_jaxpr(endless)(matrix))


def test_arithmetic_is_timed_at_the_rate_of_a_matrix_product(monkeypatch):
    monkeypatch.setattr("experiments.benchmarks.speed.flops.SIZES", {"cpu": (8, 16)})
    assert 0 < flops_timer(QUICK[0])() < 1


def test_the_program_of_more_workers_needs_no_more_models():
    few, many = (jax_contenders.program_bytes(SOFTMAX._replace(workers=n)) for n in (2, 8))
    model = 4 * (64 * 10 + 10)
    assert few >= model and many - few < model
