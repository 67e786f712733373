"""Small problems on which tests run methods, and the ways in which they run them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlocal
from jaxlocal import Layout, make_mesh
from jaxlocal.parallel.collectives import broadcast_to_workers
from jaxlocal.parallel.layout import CONTEXT, STACKED

EXAMPLES, FEATURES = 4, 3
START = {"weight": np.array([0.5, -1.0, 2.0]), "bias": np.array(0.25)}
# The random ten-hub graph of the MLL-SGD experiments (arXiv 2007.13819), with self loops.
_ROWS = (
    "1010110010 0100111111 1011101110 0011101100 1111111011 "
    "1100110001 0111101100 0111001110 1110100111 0100110011"
)
TEN_HUBS = np.array([[entry == "1" for entry in row] for row in _ROWS.split()])


def loss(params, batch, key):
    """Half the mean squared error of a linear model; two leaves, one of them a scalar."""
    errors = batch["inputs"] @ params["weight"] + params["bias"] - batch["targets"]
    return 0.5 * jnp.mean(errors**2)


grad_fn = jaxlocal.gradients(loss)


def make_batches(layout: Layout, steps: int, seed: int = 0, examples: int = EXAMPLES) -> dict:
    """Least squares with a different optimum for every worker; leaves [steps, D, N, ...]."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(steps, *layout.shape, examples, FEATURES))
    optima = random.normal(size=(*layout.shape, FEATURES))
    noise = 0.1 * random.normal(size=inputs.shape[:-1])
    return {"inputs": inputs, "targets": np.einsum("tdnbf,dnf->tdnb", inputs, optima) + noise}


def numpy_gradient(batches: dict):
    """gradient(worker, x, step) of the same loss, x being the weight and then the bias."""
    inputs, targets = (batches[name] for name in ("inputs", "targets"))
    inputs = inputs.reshape(len(inputs), -1, *inputs.shape[3:])
    targets = targets.reshape(len(targets), -1, targets.shape[-1])

    def gradient(worker, x, step):
        a = np.column_stack([inputs[step, worker], np.ones(inputs.shape[2])])
        return a.T @ (a @ x - targets[step, worker]) / len(a)

    return gradient


def vectors(params) -> np.ndarray:
    """All workers' models as the rows of a matrix, [K, FEATURES + 1]."""
    weight, bias = np.asarray(params["weight"]), np.asarray(params["bias"])
    return np.concatenate([weight.reshape(-1, FEATURES), bias.reshape(-1, 1)], axis=1)


def steps_of(batches, start: int, stop: int):
    return jax.tree.map(lambda leaf: leaf[start:stop], batches)


def trajectory(round_fn, batches, periods, seed: int = 0):
    """Models before the run and after every inner stage, [stages + 1, K, FEATURES + 1], and which
    workers were active, bool [steps, K].

    Where a round ends, the models are those after its end. One inner stage is dispatched at a time,
    so that rounds of any length take two compilations.
    """
    state = round_fn.init(START, jax.random.key(seed))
    size, start = round_fn.method.inner.steps, 0
    models, active = [vectors(state.params)], []
    for length in periods:
        for stop in range(start + size, start + length + 1, size):
            state, info = round_fn.local_steps(state, steps_of(batches, stop - size, stop))
            active.append(np.asarray(info.worker["active"]).reshape(size, -1))
            if stop == start + length:
                state, _ = round_fn.end_round(state)
            models.append(vectors(state.params))
        start += length
    return np.stack(models), np.concatenate(active) > 0


def on_one_device(method, layout: Layout, **options) -> jaxlocal.RoundFn:
    return jaxlocal.RoundFn(method, layout, make_mesh(layout, shape=(1, 1)), **options)


def mix(mixer, tree, layout: Layout, shape: tuple[int, int] = (1, 1), times: int = 1):
    """The tree, leaves [D, N, ...], after a number of averages."""

    def program(tree, context):
        return broadcast_to_workers(mixer.average(tree, context), tree)

    mesh = make_mesh(layout, shape=shape)
    mapped = jax.jit(
        jax.shard_map(program, mesh=mesh, in_specs=(STACKED, CONTEXT), out_specs=STACKED)
    )
    for _ in range(times):
        tree = mapped(tree, layout.context())
    return jax.tree.map(np.asarray, tree)


def connected_graph(hubs: int, seed: int) -> np.ndarray:
    """The adjacency of a random tree with some more edges, bool [D, D]."""
    random = np.random.default_rng(seed)
    adjacency = random.random((hubs, hubs)) < random.random()
    for hub in range(1, hubs):
        adjacency[hub, random.integers(hub)] = True
    adjacency = np.tril(adjacency, -1)
    return adjacency | adjacency.T


def schedule(decay: str, peak: float, steps: int, warmup_steps: int = 0, floor: float = 1e-6):
    """`reference_periods.schedule`, composed of schedules of optax."""
    rest = steps - warmup_steps
    cosine = optax.cosine_decay_schedule(peak, rest, alpha=floor / peak)
    third = lambda step: jnp.minimum(jnp.floor(3 * (step + warmup_steps) / steps), 2)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": cosine,
        "linear": optax.linear_schedule(peak, floor, rest),
        "cosine_step": lambda step: 2.0 ** jnp.round(jnp.log2(cosine(step))),
        "step": lambda step: peak * 0.1 ** third(step),
    }[decay]
    rise = optax.linear_schedule(floor, peak, max(1, warmup_steps))
    joined = optax.join_schedules([rise, after], [warmup_steps])
    # An int32 step would be divided in float32, in float64 mode too.
    return lambda step: joined(jnp.asarray(step, jnp.result_type(float)))
