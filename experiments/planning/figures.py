"""The figures of a plan: rounds, communication, compression, devices and memory."""

import itertools
import math
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from experiments.building.compressors import ratio_by_formula
from experiments.building.job import Plan, make_round_fn, measure_every
from jaxlocal import RoundFn
from jaxlocal.communication.accounting import model_bits
from jaxlocal.compression import payload_bits
from jaxlocal.types import Tree


def plan_figures(plan: Plan) -> dict[str, Any]:
    """The figures of a run, as `experiments.plan --format=json` prints them.

    `local_steps` is the H schedule as segments of equal H: {"step", "local_steps", "rounds"}, the
    first step of the segment, H and the number of its rounds.
    """
    round_fn = make_round_fn(plan)
    rounds, turns = len(plan.lengths), plan.method.outer.turns
    return {
        "method": plan.config.method,
        "period": plan.method.period.description,
        "steps": plan.steps,
        "rounds": rounds,
        "communication_volume": rounds / (turns * plan.steps),
        "turns": turns,
        "local_steps": _segments(plan.lengths),
        "local_steps_max": max(plan.lengths),
        "hubs": plan.layout.hubs,
        "workers": plan.layout.workers,
        "zeta": plan.zeta,
        **_communication(plan, round_fn),
        "compressors": _compressors(plan),
        "devices": plan.mesh.size,
        "mesh": dict(plan.mesh.shape),
        "training_programs": _count_programs(plan, round_fn),
        "memory_bytes": _memory(plan),
    }


def _communication(plan: Plan, round_fn: RoundFn) -> dict[str, Any]:
    """Sizes of the model and of all messages, and the compression ratios."""
    rounds, turns = len(plan.lengths), plan.method.outer.turns
    sent, model = (
        round_fn.message_bits(plan.state, plan.steps, rounds),
        model_bits(plan.state.params),
    )
    steps_per_model = turns * plan.steps / rounds  # a whole model is sent in `turns` rounds
    ratio = ratio_by_formula(plan.config, plan.compressors, steps_per_model)
    leaves = jax.tree.leaves(plan.state.params)
    return {
        "parameters": sum(x.size for x in leaves) // plan.layout.workers,
        "bits_model": model,
        "bits_workers": sent.workers,
        "bits_hubs": sent.hubs,
        "bits_workers_data_parallel": model * plan.steps if plan.layout.workers > 1 else 0,
        "compression_ratio_formula": ratio,
        "compression_ratio_counted": model * plan.steps / sent.workers if sent.workers else None,
    }


def _compressors(plan: Plan) -> dict[str, dict[str, Any]]:
    """Each compressor's δ on the model's tensors, and the bits of one of its messages."""
    params = plan.model_shapes[0]
    return {
        what: {
            "name": compressor.name,
            "delta": compressor.delta(params),
            "bits": payload_bits(compressor, params),
        }
        for what, compressor in plan.compressors.items()
    }


def _segments(lengths: tuple[int, ...]) -> list[dict[str, int]]:
    segments, step = [], 0
    for length, group in itertools.groupby(lengths):
        rounds = len(list(group))
        segments.append({"step": step, "local_steps": length, "rounds": rounds})
        step += rounds * length
    return segments


def _count_programs(plan: Plan, round_fn: RoundFn) -> int:
    """Number of programs that training compiles: one per size of chunk, and the end of a round."""
    stretches = _stretches(
        np.asarray(plan.lengths),
        plan.method.inner.steps,
        plan.method.outer.steps,
        measure_every(plan),
    )
    return len({size for steps in stretches for size in round_fn.chunks(steps)}) + 1


def _stretches(lengths: NDArray, inner: int, outer: int, every: int) -> list[int]:
    """The different numbers of steps that are taken without a stop: a measurement or a round's end.

    Args:
      lengths: H of all rounds.
      inner: steps of an inner stage, at whose ends a measurement can be.
      outer: steps of the end of a round, which are a program of their own.
      every: steps between measurements; 0 for the ends of rounds.
    """
    ends = np.cumsum(lengths)
    due = np.arange(every, ends[-1], every) if every else np.empty(0, ends.dtype)
    stops = np.unique(np.concatenate([[0], ends, ends - outer, -(-due // inner) * inner]))
    starts, steps = stops[:-1], np.diff(stops)
    local = starts < (ends - outer)[np.searchsorted(ends, starts, side="right")]
    return np.unique(steps[local]).tolist()


def _memory(plan: Plan) -> dict[str, int]:
    """Bytes that one device holds during the whole run. A step needs more for its activations."""
    state = plan.state

    def held(tree: Tree) -> int:
        shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)

    return {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "model_state": held(state.model_state),
        "anchor": held(state.anchor),
        "memory": held(state.memory),
        "examples": plan.pool_bytes,
    }
