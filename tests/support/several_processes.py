"""The program that `test_several_processes.py` runs in one process or in several: methods on eight
workers, and a run whose mesh spans processes.

Each process is `several_processes.py PROCESSES ID PORT DEVICES FOLDER WHAT`, WHAT being "losses" or
"all".
"""

import functools
import json
import sys
from pathlib import Path

import compressed_problem as problem
import fast_compilation
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import jaxlocal
from jaxlocal import Layout, RoundFn, make_mesh, periods
from jaxlocal.communication import topology
from jaxlocal.compression import parse
from jaxlocal.data import Stream, make_batches
from jaxlocal.parallel.mesh import place
from jaxlocal.training.checkpoints import Checkpoints, export
from jaxlocal.training.evaluation import Evaluation, Reestimation
from jaxlocal.training.loop import Diverged, run

STEPS = 50
SGD = optax.sgd(0.05)
# Float32 rounds at 6e-8; losses of size ten after fifty contracting steps differ by a few of it.
ROUNDING = {"rtol": 2e-6, "atol": 2e-6}
WEIGHTS = [1, 2, 3, 4, 4, 3, 2, 1]
FLAT, HUBS = Layout(1, 8, WEIGHTS), Layout(4, 2, WEIGHTS)
IRREGULAR = np.array([[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)


def _on_hubs(adjacency):
    matrix = topology.mixing_matrix(adjacency, HUBS.hub_weight)
    return jaxlocal.mll_sgd(problem.grad_fn, SGD, matrix=matrix, local_steps=2, hub_period=1)


def _cser(reset):
    return jaxlocal.cser(
        problem.grad_fn,
        SGD,
        gradient_compressor=parse("grbs:4"),
        reset_compressor=parse(reset),
        period=4,
    )


METHODS = {
    "local_sgd": (lambda: jaxlocal.local_sgd(problem.grad_fn, SGD, period=4), FLAT),
    "ring": (lambda: _on_hubs(topology.hub_graph("ring", 4)), HUBS),
    "irregular": (lambda: _on_hubs(IRREGULAR), HUBS),
    "cser_grbs": (lambda: _cser("grbs:2"), FLAT),
    "cser_top_k": (lambda: _cser("top_k:4"), FLAT),
    "diloco": (
        lambda: jaxlocal.diloco(
            problem.grad_fn, SGD, period=4, outer_optimizer=optax.sgd(0.7, 0.9, nesterov=True)
        ),
        FLAT,
    ),
}


def losses(name, devices=None):
    """Losses of all workers at all steps, [STEPS, D, N]."""
    make, layout = METHODS[name]
    method, batches = make(), problem.make_batches(layout, STEPS)
    round_fn = RoundFn(method, layout, make_mesh(layout, devices), max_chunk=1)
    state, start, infos = round_fn.init(problem.START, jax.random.key(0)), 0, []
    everywhere = NamedSharding(round_fn.mesh, P())
    joined = jax.jit(lambda infos: jnp.concatenate(infos), out_shardings=everywhere)
    for length in periods.lengths(method.period, STEPS):
        for step in range(start, start + length, method.inner.steps):
            state, info = round_fn.local_steps(
                state, problem.steps_of(batches, step, step + method.inner.steps)
            )
            infos.append(info.worker["loss"])
        state, _ = round_fn.end_round(state)
        start += length
    return np.asarray(joined(infos))


@functools.cache
def losses_alone(name):
    """The losses of one process on one device."""
    return losses(name, jax.devices()[:1])


class Counted:
    """Examples that record which of them were read."""

    def __init__(self):
        random = np.random.default_rng(3)
        self.inputs = random.normal(size=(64, problem.FEATURES)).astype(np.float32)
        self.targets = random.normal(size=(64, problem.OUTPUTS)).astype(np.float32)
        self.read = set()

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, number):
        self.read.add(int(number))
        return {"inputs": self.inputs[number], "targets": self.targets[number]}


def metrics(params, model_state, batch):
    errors = batch["inputs"] @ params["weight"] + params["bias"] - batch["targets"]
    return {"square": (errors**2).sum(-1)}


def whole_run(folder):
    """The results of a streamed run that is measured, saved and restored, of an export, and of a
    run that diverges."""
    method, layout = METHODS["local_sgd"]
    round_fn, source = RoundFn(method(), layout), Counted()
    workers = round_fn.local_workers
    last = _streamed(round_fn, source, workers)
    results = {"workers": workers.tolist(), "streamed": sorted(source.read)}
    results |= {"loss": last.loss, "distance": last.distance}
    results |= _evaluated(round_fn, source, last.state, folder)
    results["mean"] = _reestimated_mean(round_fn, last.state)
    results["undamaged"] = _undamaged(round_fn, folder / "damaged")
    return results | {"exported": _exported(folder), "diverged": _diverged(round_fn)}


def _streamed(round_fn, source, workers):
    """The last progress of a run whose examples are sorted by worker."""
    indices = make_batches("sorted", np.arange(64) // 8, 1, 8, 4, seed=0).indices
    with Stream(source, indices, processes=0, buffer_bytes=1, workers=workers) as stream:
        feed = lambda start, steps: round_fn.local_batches(stream(start, steps))
        state = round_fn.init(problem.START, jax.random.key(0), {"mean": np.float32(0)})
        *_, last = run(round_fn, state, feed, 8, measure_every=4, save_every=8)
    return last


def _evaluated(round_fn, source, state, folder):
    """Evaluations on streamed examples, on examples in memory, and of the restored state."""
    evaluation = Evaluation(round_fn, metrics, batch_size=2, source=source)
    source.read.clear()
    results = {"source": evaluation(state), "evaluated": sorted(source.read)}
    pool = {"inputs": source.inputs, "targets": source.targets}
    results["pool"] = Evaluation(round_fn, metrics, pool, batch_size=2)(state)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state, {"written by": jax.process_index()})
        checkpoints.wait()
        shapes = round_fn.shapes(problem.START, {"mean": np.float32(0)})
        restored, notes = checkpoints.restore(shapes)
    return results | {"notes": notes, "step": int(restored.step), "again": evaluation(restored)}


def _undamaged(round_fn, folder):
    """The step that is restored where the newest checkpoint is damaged, and what is in the folder.

    One byte is flipped, in values that the last process alone wrote and reads."""
    noise = {"noise": np.random.default_rng(0).normal(size=1000).astype(np.float32)}
    state = round_fn.init(problem.START, jax.random.key(0), noise)
    with Checkpoints(folder) as checkpoints:
        for steps in (1, 2):
            checkpoints.save(state._replace(step=state.step + steps))
        checkpoints.wait()
        if jax.process_index() == 0:
            data = folder / "2" / "state" / f"ocdbt.process_{jax.process_count() - 1}" / "d"
            largest = max(data.iterdir(), key=lambda path: path.stat().st_size)
            flipped = bytearray(largest.read_bytes())
            flipped[len(flipped) // 2] ^= 1
            largest.write_bytes(flipped)
        multihost_utils.sync_global_devices("damaged")
        restored, _ = checkpoints.restore(round_fn.shapes(problem.START, noise))
    return int(restored.step), sorted(path.name for path in folder.iterdir())


def _reestimated_mean(round_fn, state):
    """A running mean, a tenth of which is that of the last batch."""
    move = lambda params, old, batch: {"mean": 0.9 * old["mean"] + 0.1 * batch["inputs"].mean()}
    batches = {"inputs": np.arange(16.0).reshape(2, 1, 8, 1)}
    estimated = Reestimation(round_fn, move, batches)(state)
    return float(round_fn.mean(estimated)[1]["mean"])


def _exported(folder):
    """The exported values of an array that no process has all of."""
    everyone = NamedSharding(Mesh(np.array(jax.devices()), "model"), P("model"))
    _, single = export(folder / "export", {"sharded": place(np.arange(8.0), everyone)}, {})
    return load_file(single)["params/sharded"].tolist()


def _diverged(round_fn):
    """The error of a run in which one worker has an infinite loss."""
    broken = problem.make_batches(round_fn.layout, 8)
    broken["targets"][5, 0, 6] = np.inf
    state = round_fn.init(problem.START, jax.random.key(0))
    feed = lambda start, steps: problem.steps_of(broken, start, start + steps)
    try:
        list(run(round_fn, state, feed, 8, measure_every=4))
    except Diverged as error:
        return str(error)


def main(processes, number, port, devices, folder, what):
    jax.config.update("jax_num_cpu_devices", int(devices))
    fast_compilation.install()
    folder = Path(folder)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(number))
    np.savez(folder / f"losses{number}.npz", **{name: losses(name) for name in METHODS})
    if what == "all":
        (folder / f"results{number}.json").write_text(json.dumps(whole_run(folder)))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
