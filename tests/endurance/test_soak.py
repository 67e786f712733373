"""Thousands of rounds in one process: memory does not grow, nothing is compiled again, the bits are
counted right, and a run that was stopped and resumed in the middle ends with the same bits."""

import math
import resource
import sys
from pathlib import Path
from typing import NamedTuple

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal.training import Checkpoints, run
from jaxlocal.types import MessageBits

pytestmark = pytest.mark.slow

ROUNDS, PERIOD, VALUES = 3000, 2, 64
LAYOUT = jaxlocal.Layout(workers_per_hub=4, rates=0.9)
START = {"w": jnp.zeros((VALUES, 2)), "b": jnp.zeros(2)}
MOST_GROWTH = 8 << 20  # bytes of the process in 1,200 rounds; each makes arrays of some KiB


def loss(params, batch, key):
    noise = 0.01 * jax.random.normal(key, (2,))
    return jnp.square(batch @ params["w"] + params["b"] - batch[:2] - noise).mean()


def make_round_fn():
    method = jaxlocal.qsparse_local_sgd(
        jaxlocal.gradients(loss), optax.adam(0.001), compressor="grbs:16", period=PERIOD
    )
    mesh = jaxlocal.make_mesh(LAYOUT, jax.devices()[:2])
    return jaxlocal.RoundFn(method, LAYOUT, mesh)


def batches(start_step, steps):
    at = lambda step: np.random.default_rng(step).normal(size=(*LAYOUT.shape, VALUES))
    return np.stack([at(start_step + n).astype(np.float32) for n in range(steps)])


class Used(NamedTuple):
    """What the process holds."""

    process: int  # bytes
    arrays: int
    programs: int  # compiled since the start


def process_bytes():
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, at their peak
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_three_thousand_rounds_leave_nothing_behind(times, tmp_path):
    steps, round_fn = ROUNDS * PERIOD * times, make_round_fn()
    middle, seen = steps // 2, {}
    state = round_fn.init(START, jax.random.key(0))
    options = {"steps": steps, "measure_every": steps // 10, "save_every": middle}
    checkpoints = Checkpoints(tmp_path)
    with compilations.counted() as compiled:
        for progress in run(round_fn, state, batches, **options):
            if progress.due:
                measured = Used(process_bytes(), len(jax.live_arrays()), len(compiled))
                seen[progress.step] = measured
                assert progress.step == 0 or math.isfinite(progress.loss)
            if progress.save and progress.step == middle:
                checkpoints.save(progress.state)
                checkpoints.wait()
    whole, sent = jax.tree.map(np.asarray, progress.state.params), progress.message_bits
    # The save in the middle makes programs and threads of its own.
    tenths = [seen[steps * n // 10] for n in range(11)]
    for first, last in (
        (tenths[1], tenths[5]),
        (tenths[6], tenths[10]),
    ):
        grown = last.process - first.process
        print(f"{4 * ROUNDS * times // 10} rounds: {grown >> 10} KiB more in the process")
        assert grown < MOST_GROWTH
        assert last.arrays <= first.arrays and last.programs == first.programs
    assert progress.round == ROUNDS * times and progress.loss < 0.2
    payload = sum(-(-x.size // 16) for x in jax.tree.leaves(START)) * 32
    assert sent == MessageBits(workers=ROUNDS * times * payload)

    again = make_round_fn()  # as another process has it
    resumed, _ = checkpoints.restore(again.shapes(START))
    assert int(resumed.step) == middle
    *_, progress = run(again, resumed, batches, **options)
    assert progress.message_bits == sent
    jax.tree.map(np.testing.assert_array_equal, progress.state.params, whole)
