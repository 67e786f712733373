"""Time partial synchronisations against the gradient of one step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from experiments.benchmarks.compression.task import CLASSES, Task
from experiments.benchmarks.timing import interleaved_seconds, ratio_spread, spread
from jaxlocal import Layout
from jaxlocal.communication import mixing
from jaxlocal.compression import parse, payload_bits
from jaxlocal.parallel.collectives import over_mesh
from jaxlocal.parallel.keys import stream_key
from jaxlocal.parallel.layout import STACKED
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.stages.partial_sync import partial_sync
from jaxlocal.types import Compressor

GRADIENT = "gradient"
STEPS, SYNCS = 2, 8  # in one program, so that the time to dispatch it does not matter


def sync_times(task: Task, compressors: Sequence[str], repeats: int) -> dict[str, Any]:
    """Time the gradient of one step and one partial synchronisation with each compressor.

    They run with one worker on one device, in alternation.

    Args:
      task: what is trained.
      compressors: spec strings.
      repeats: runs of each program that count.

    Returns:
      "parameters": their number; "gradient": the spread of its seconds; "compressors": by name the
      spread of the "seconds" of one synchronisation, of their "ratio" to the gradient's in the same
      repeat, and the "bits" of one message.
    """
    parsed = [parse(spec) for spec in compressors]
    programs = {GRADIENT: _gradients(task)}
    programs |= {compressor.name: _syncs(task, compressor) for compressor in parsed}
    seconds = interleaved_seconds(programs, repeats)
    gradient = [s / STEPS for s in seconds[GRADIENT]]
    rows = {}
    for compressor in parsed:
        sync = [s / SYNCS for s in seconds[compressor.name]]
        rows[compressor.name] = {
            "seconds": spread(sync),
            "ratio": ratio_spread(sync, gradient),
            "bits": payload_bits(compressor, task.params),
        }
    parameters = sum(x.size for x in jax.tree.leaves(task.params))
    return {"parameters": parameters, "gradient": spread(gradient), "compressors": rows}


def _gradients(task: Task) -> Callable[[], Any]:
    """A program of several gradients, each of its own batch, as the steps of a round take them."""
    params, model_state = jax.jit(task.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), STEPS)
    shape = task.batch["inputs"].shape
    batches = {
        "inputs": jax.random.normal(jax.random.key(2), (STEPS, *shape)),
        "targets": jax.random.randint(jax.random.key(3), (STEPS, shape[0]), 0, CLASSES),
    }

    @jax.jit
    def run(params, model_state, batches):
        def step(carry, batch_and_key):
            _, model_state = carry
            grads, model_state, _ = task.grad_fn(params, model_state, *batch_and_key)
            return (grads, model_state), None

        return lax.scan(step, (params, model_state), (batches, keys))[0]

    return lambda: run(params, model_state, batches)


def _syncs(task: Task, compressor: Compressor) -> Callable[[], Any]:
    """A program of several partial synchronisations, which updates its buffers in place."""
    layout, key = Layout(), jax.random.key(0)
    context, mesh = layout.context(), make_mesh(layout, jax.devices()[:1])
    specs = (STACKED, STACKED, jax.tree.map(lambda _: STACKED, context))
    run = over_mesh(_repeated_sync(compressor, key), mesh, specs, specs[:2])
    program = jax.jit(run, donate_argnums=(0, 1))
    tree = jax.tree.map(lambda x: jax.random.normal(key, (1, 1, *x.shape), x.dtype), task.params)
    memory = jax.tree.map(lambda x: x[None, None], compressor.init(task.params))
    buffers = list(jax.device_put((tree, memory), NamedSharding(mesh, STACKED)))

    def run_in_place() -> Any:
        buffers[:] = program(*buffers, context)
        return buffers

    return run_in_place


def _repeated_sync(compressor: Compressor, key: jax.Array) -> Callable:
    """The function (tree, memory, context) -> (tree, memory) that synchronises `SYNCS` times."""
    mixer = mixing.mean()

    def run(tree, memory, context):
        def sync(carry, number):
            tree, memory = carry
            sync_key = stream_key(key, 0, number)
            synced = partial_sync(mixer, compressor, tree, memory, sync_key, context)
            return (synced.add(synced.residual), synced.memory), None

        return lax.scan(sync, (tree, memory), jnp.arange(SYNCS))[0]

    return run
