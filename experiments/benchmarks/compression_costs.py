"""What compression costs: the time of a partial synchronisation beside that of a step's gradient,
and the memory of methods above Local SGD's."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding

import jaxlocal
from experiments.benchmarks.benchmarking import in_turns, peak_bytes, spread_of
from jaxlocal import Layout, RoundFn
from jaxlocal.communication import mixing
from jaxlocal.compression import parse, payload_bits
from jaxlocal.models import build
from jaxlocal.models.supervised import training_loss
from jaxlocal.parallel.collectives import over_mesh
from jaxlocal.parallel.keys import stream_key
from jaxlocal.parallel.layout import STACKED
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.stages.partial_sync import partial_sync
from jaxlocal.types import Compressor, Method, Tree

GRADIENT = "gradient"
CLASSES = 10


class Task(NamedTuple):
    """What is trained: a model on random images."""

    params: Tree  # shapes
    model_state: Tree  # shapes
    init: Callable
    grad_fn: Callable
    batch: dict[str, jax.ShapeDtypeStruct]  # of one worker


def make_task(model: str, image: tuple[int, ...], batch_size: int) -> Task:
    built = build(model, image, CLASSES)
    grad_fn = jaxlocal.gradients(training_loss(built, lambda x: x, CLASSES), stateful=True)
    batch = {
        "inputs": jax.ShapeDtypeStruct((batch_size, *image), np.float32),
        "targets": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    params, model_state = jax.eval_shape(built.init, jax.random.key(0))
    return Task(params, model_state, built.init, grad_fn, batch)


def overhead(
    task: Task, compressors: Sequence[str], repeats: int, steps: int = 2, syncs: int = 8
) -> dict[str, Any]:
    """Seconds of one step's gradient and of one partial synchronisation by each compressor.

    One worker on one device. Each is run several times in one program, so that dispatching it does
    not count.
    """
    parsed = [parse(name) for name in compressors]
    programs = {GRADIENT: _gradients(task, steps)}
    programs |= {compressor.name: _syncs(task, compressor, syncs) for compressor in parsed}
    seconds = in_turns(programs, repeats)
    gradient = [s / steps for s in seconds[GRADIENT]]
    bits = {c.name: payload_bits(c, task.params) for c in parsed}
    rows = {}
    for name, size in bits.items():
        sync = [s / syncs for s in seconds[name]]
        ratios = [s / g for s, g in zip(sync, gradient, strict=True)]
        rows[name] = {"seconds": spread_of(sync), "ratio": spread_of(ratios), "bits": size}
    parameters = sum(x.size for x in jax.tree.leaves(task.params))
    return {"parameters": parameters, "gradient": spread_of(gradient), "compressors": rows}


def _gradients(task: Task, steps: int) -> Callable[[], Any]:
    """A program of so many gradients, each on its own batch, as a round takes them."""
    params, model_state = jax.jit(task.init)(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), steps)
    shape = task.batch["inputs"].shape
    batches = {
        "inputs": jax.random.normal(jax.random.key(2), (steps, *shape)),
        "targets": jax.random.randint(jax.random.key(3), (steps, shape[0]), 0, CLASSES),
    }

    @jax.jit
    def run(params, model_state, batches):
        def step(carry, told):
            _, model_state = carry
            grads, model_state, _ = task.grad_fn(params, model_state, *told)
            return (grads, model_state), None

        return lax.scan(step, (params, model_state), (batches, keys))[0]

    return lambda: run(params, model_state, batches)


def _syncs(task: Task, compressor: Compressor, syncs: int) -> Callable[[], Any]:
    """A program of so many partial synchronisations, on buffers that it updates in place."""
    layout = Layout()
    mixer, context = mixing.mean(), layout.context()
    key = jax.random.key(0)

    def run(tree, memory, context):
        def one(carry, number):
            held, kept = carry
            now = stream_key(key, 0, number)
            synced = partial_sync(mixer, compressor, held, kept, now, context)
            return (synced.add(synced.residual), synced.memory), None

        return lax.scan(one, (tree, memory), jnp.arange(syncs))[0]

    mesh = make_mesh(layout, jax.devices()[:1])
    specs = (STACKED, STACKED, jax.tree.map(lambda _: STACKED, context))
    program = jax.jit(over_mesh(run, mesh, specs, specs[:2]), donate_argnums=(0, 1))
    tree = jax.tree.map(lambda x: jax.random.normal(key, (1, 1, *x.shape), x.dtype), task.params)
    memory = jax.tree.map(lambda x: x[None, None], compressor.init(task.params))
    held = list(jax.device_put((tree, memory), NamedSharding(mesh, STACKED)))

    def again() -> Any:
        held[:] = program(*held, context)
        return held

    return again


def memory(task: Task, workers: int, steps: int = 4) -> dict[str, Any]:
    """What each method keeps on one device from round to round, and the peak of its rounds: bytes
    above Local SGD's, in models."""
    layout = Layout(workers_per_hub=workers)
    optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)
    made = methods(task.grad_fn, optimizer, steps)
    sizes = {name: _sizes(task, method, layout, steps) for name, method in made.items()}
    model = _bytes(task.params)
    least = sizes["local_sgd"]
    rows = {
        name: {
            "peak_bytes": peak,
            "kept_above": (kept - least[0]) / model,
            "peak_above": (peak - least[1]) / model,
        }
        for name, (kept, peak) in sizes.items()
    }
    return {"model_bytes": model, "workers": workers, "methods": rows}


def _bytes(tree: Tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def methods(
    grad_fn: Callable, optimizer: optax.GradientTransformation, steps: int
) -> dict[str, Method]:
    """With rounds of so many steps, with and without compression."""
    own = (grad_fn, optimizer)
    gradient, reset = parse("grbs:64"), parse("grbs:4")
    return {
        "local_sgd": jaxlocal.local_sgd(*own, steps),
        "data_parallel": jaxlocal.data_parallel(*own),
        "cser": jaxlocal.cser(*own, gradient, reset, steps),
        "qsparse_local_sgd": jaxlocal.qsparse_local_sgd(*own, reset, steps),
        "ef_sgd": jaxlocal.ef_sgd(*own, gradient),
    }


def _sizes(task: Task, method: Method, layout: Layout, steps: int) -> tuple[int, int]:
    """Bytes of the state, and the peak of the two programs of a method: so many steps, for all
    methods alike since batches count too, and the end of a round."""
    round_fn = RoundFn(method, layout, make_mesh(layout, jax.devices()[:1]))
    state = round_fn.shapes(task.params, task.model_state)
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((steps, *layout.shape, *x.shape), x.dtype), task.batch
    )
    local = peak_bytes(round_fn.local_steps, state, batches, donate=(0,))
    end = peak_bytes(round_fn.end_round, state, donate=(0,))
    return _bytes(state), max(local, end)
