"""Count the memory of methods above that of Local SGD."""

from typing import Any

import jax
import optax

from experiments.benchmarks.compression.task import Task
from experiments.benchmarks.memory import peak_bytes
from experiments.benchmarks.methods import measured_methods
from jaxlocal import Layout, RoundFn
from jaxlocal.parallel.mesh import make_mesh
from jaxlocal.training.common_state import full_shapes
from jaxlocal.types import Method, Tree


def method_memory(task: Task, workers: int, steps: int = 4) -> dict[str, Any]:
    """Count the memory of each method on one device: its state, and the peak of its rounds.

    Args:
      task: what is trained.
      workers: on the device.
      steps: local steps of a round.

    Returns:
      "model_bytes": of one model; "workers"; "methods": by name "peak_bytes", and "state_above" and
      "peak_above", the state and the peak above those of Local SGD with a model for every worker,
      in models.
    """
    layout = Layout(workers_per_hub=workers)
    optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)
    methods = measured_methods(task.grad_fn, optimizer, steps)
    sizes = {name: _sizes(task, method, layout, steps) for name, method in methods.items()}
    model = _bytes(task.params)
    least_state, least_peak = sizes["local_sgd"]
    rows = {
        name: {
            "peak_bytes": peak,
            "state_above": (state - least_state) / model,
            "peak_above": (peak - least_peak) / model,
        }
        for name, (state, peak) in sizes.items()
    }
    return {"model_bytes": model, "workers": workers, "methods": rows}


def _sizes(task: Task, method: Method, layout: Layout, steps: int) -> tuple[int, int]:
    """Bytes of a method's state, and the peak of its two programs: local steps, end of a round.

    The number of steps is the same for all methods, since batches count too.
    """
    round_fn = RoundFn(method, layout, make_mesh(layout, jax.devices()[:1]))
    state = full_shapes(round_fn.shapes(task.params, task.model_state))
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((steps, *layout.shape, *x.shape), x.dtype), task.batch
    )
    local = peak_bytes(round_fn.local_steps, state, batches, donate=(0,))
    end = peak_bytes(round_fn.end_round, state, donate=(0,))
    return _bytes(state), max(local, end)


def _bytes(tree: Tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
