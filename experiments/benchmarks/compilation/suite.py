"""Run the suite `compilation`."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jaxlocal
from experiments.benchmarks.machine_load import OtherLoad, wait_until_idle
from experiments.plotting.display import show_table
from jaxlocal import Layout, RoundFn
from jaxlocal.compression import parse
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.types import Method, Tree

WIDTH, WORKERS, STEPS = 64, 4, 4
BLOCK = {
    **{f"{name}_kernel": (WIDTH, 4, WIDTH // 4) for name in ("query", "key", "value")},
    **{f"{name}_bias": (4, WIDTH // 4) for name in ("query", "key", "value")},
    **{"out_kernel": (4, WIDTH // 4, WIDTH), "out_bias": (WIDTH,)},
    **{f"norm_{name}": (WIDTH,) for name in ("scale_1", "bias_1", "scale_2", "bias_2")},
    **{"up_kernel": (WIDTH, 4 * WIDTH), "up_bias": (4 * WIDTH,)},
    **{"down_kernel": (4 * WIDTH, WIDTH), "down_bias": (WIDTH,)},
}  # the tensors of a block of a transformer


def run(
    compressors: Sequence[str], tensors: int, wait_idle: float, console: Console
) -> dict[str, Any]:
    """Measure how long Qsparse-local-SGD and CSER compile with each compressor.

    Args:
      compressors: spec strings.
      tensors: of the model, in blocks of a transformer.
      wait_idle: seconds to wait for an idle machine.
      console: where the table is printed.

    Returns:
      The figures: "tensors", and "seconds" by method and compressor, of the processor, in which the
      programs of a round are traced, lowered and compiled, "other_load_before" and
      "other_load_during".
    """
    for spec in compressors:
        parse(spec)  # a mistake is reported before anything is measured
    before, load = wait_until_idle(wait_idle), OtherLoad()
    grad_fn, optimizer = jaxlocal.gradients(_loss), optax.sgd(0.1)
    params = model_shapes(tensors)
    plain = jaxlocal.local_sgd(grad_fn, optimizer, period=STEPS)
    _compile_seconds(plain, model_shapes(len(BLOCK)))  # what only the first compilation costs
    seconds = {"local_sgd": _compile_seconds(plain, params)}
    for spec in compressors:
        qsparse = jaxlocal.qsparse_local_sgd(grad_fn, optimizer, compressor=spec, period=STEPS)
        both: dict[str, Any] = {"gradient_compressor": spec, "reset_compressor": spec}
        cser = jaxlocal.cser(grad_fn, optimizer, **both, period=STEPS)
        seconds[f"qsparse_local_sgd {spec}"] = _compile_seconds(qsparse, params)
        seconds[f"cser {spec}"] = _compile_seconds(cser, params)
    unit = seconds["local_sgd"]
    rows = [(name, f"{took:.1f} s, {took / unit:.2f}×") for name, took in seconds.items()]
    title = f"\ntime to compile a round of {tensors} tensors, and how many times Local SGD's"
    show_table(console, title, rows)
    figures = {"tensors": tensors, "seconds": seconds}
    return {**figures, "other_load_before": before, "other_load_during": [load.share()]}


def model_shapes(tensors: int) -> Tree:
    """The shapes of the first tensors of as many blocks as it takes."""
    names = (
        (f"block_{i}_{name}", shape) for i in itertools.count() for name, shape in BLOCK.items()
    )
    some = itertools.islice(names, tensors)
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in some}


def _loss(params: Tree, batch: jax.Array, key: jax.Array) -> Any:
    return sum(jnp.square(x - batch.mean()).mean() for x in jax.tree.leaves(params))


def _compile_seconds(method: Method, params: Tree) -> float:
    layout = Layout(workers_per_hub=WORKERS)
    round_fn = RoundFn(method, layout, make_mesh(layout, jax.devices()[:1]))
    batches = jax.ShapeDtypeStruct((STEPS, 1, WORKERS, 8), np.float32)
    start = time.process_time()  # other processes delay a compilation, but do not lengthen it
    for _, lowered in round_fn.lower(round_fn.shapes(params), batches):
        lowered.compile()
    return time.process_time() - start
