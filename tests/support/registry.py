"""Every method with an optimizer and a layout, and the problem on which contract tests run it.

`test_every_method_is_in_the_registry` fails for a method that is missing here. The problem has all
that a state can hold: parameters of two dtypes, a model state with an integer, noise from keys,
unequal weights, workers that skip steps.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own

import jaxlocal
from jaxlocal import Layout
from jaxlocal.communication import topology
from jaxlocal.compression import parse
from jaxlocal.types import Method

BATCH = 4


def layout(hubs: int, workers_per_hub: int) -> Layout:
    workers = hubs * workers_per_hub
    weights = 1 + np.arange(workers) % 3
    return Layout(hubs, workers_per_hub, weights, rates=np.where(np.arange(workers) % 2, 0.5, 1.0))


def matrix(graph: str, of: Layout) -> np.ndarray:
    return topology.mixing_matrix(topology.hub_graph(graph, of.hubs), of.hub_weight)


class Entry(NamedTuple):
    build: Callable[[Callable, optax.GradientTransformation], Method]
    layout: Layout
    steps: int = 4  # of one round
    half: bool = True  # whether it takes parameters in half precision

    def params(self):
        whole = lambda x: x if self.half else x.astype(jnp.float32)
        return jax.tree.map(whole, params())


FLAT, HUBS, PAIRS, ALONE = layout(1, 8), layout(4, 2), layout(2, 4), layout(8, 1)

mll_sgd = partial(jaxlocal.mll_sgd, local_steps=2, hub_period=1)
hl_sgd = partial(jaxlocal.hl_sgd, layout=PAIRS, local_steps=1, hub_period=4)


def cser(gradient: str, reset: str, **options) -> Callable[..., Method]:
    compressors = {"gradient_compressor": parse(gradient), "reset_compressor": parse(reset)}
    return partial(jaxlocal.cser, **compressors, period=4, **options)


# Compressors and mixers that property tests range over besides the library's.
COMPRESSORS = [own.one_bit().name]
MIXERS = {"halfway_mean": own.halfway_mean}

METHODS = {
    "clipped_sgd": Entry(own.clipped_sgd, FLAT),
    "data_parallel": Entry(jaxlocal.data_parallel, FLAT, steps=1),
    "data_parallel-average": Entry(
        partial(jaxlocal.data_parallel, model_state="average"), FLAT, steps=1
    ),
    "local_sgd": Entry(partial(jaxlocal.local_sgd, period=4), FLAT),
    "local_sgd-average": Entry(
        partial(jaxlocal.local_sgd, period=4, optimizer_state="average"), FLAT
    ),
    "local_sgd-reset": Entry(partial(jaxlocal.local_sgd, period=4, optimizer_state="reset"), FLAT),
    "post_local_sgd": Entry(partial(jaxlocal.post_local_sgd, switch_step=2, local_steps=4), FLAT),
    "swap": Entry(partial(jaxlocal.swap, switch_step=2), FLAT),
    "mll_sgd": Entry(partial(mll_sgd, matrix=matrix("ring", HUBS)), HUBS, steps=2),
    "mll_sgd-average": Entry(
        partial(mll_sgd, matrix=matrix("star", HUBS), optimizer_state="average"), HUBS, steps=2
    ),
    "hl_sgd": Entry(hl_sgd, PAIRS),
    "cooperative_sgd": Entry(
        partial(jaxlocal.cooperative_sgd, matrix=matrix("path", ALONE), period=4), ALONE
    ),
    "slowmo": Entry(
        partial(
            jaxlocal.slowmo,
            learning_rate=lambda t: 0.1 / (1 + t),
            period=4,
            optimizer_state="reset",
            model_state="average",
        ),
        FLAT,
    ),
    "diloco": Entry(
        partial(
            jaxlocal.diloco, period=4, outer_optimizer=optax.adam(0.1), optimizer_state="average"
        ),
        FLAT,
    ),
    "streaming_diloco": Entry(
        partial(
            jaxlocal.streaming_diloco, period=8, fragments=2, delay_steps=2, model_state="average"
        ),
        FLAT,
    ),
    "fedavgm": Entry(partial(jaxlocal.fedavgm, period=4), FLAT),
    "fedadam": Entry(partial(jaxlocal.fedadam, period=4, optimizer_state="reset"), FLAT),
    "data_parallel-qsgd": Entry(
        partial(jaxlocal.data_parallel, compressor=parse("qsgd:4")), FLAT, steps=1
    ),
    "ef_sgd": Entry(partial(jaxlocal.ef_sgd, compressor=parse("sign")), FLAT, steps=1),
    "qsparse_local_sgd": Entry(
        partial(
            jaxlocal.qsparse_local_sgd,
            compressor=parse("powersgd:1"),
            period=4,
            optimizer_state="average",
        ),
        FLAT,
    ),
    "qsparse_local_sgd-decay": Entry(
        partial(
            jaxlocal.qsparse_local_sgd,
            compressor="top_k:2",
            period=4,
            decay_optimizer=optax.chain(
                optax.add_decayed_weights(0.1), optax.trace(0.5), optax.scale(-0.1)
            ),
        ),
        FLAT,
    ),
    "cser": Entry(cser("top_k:3", "int8"), FLAT, half=False),
    "cser-powersgd": Entry(cser("powersgd:1", "powersgd:1"), FLAT, half=False),
    "cser-2": Entry(cser("grbs:2", "random_k:2", implementation=2), FLAT),
    "cser-released": Entry(cser("grbs:2", "random_k:2", implementation="released"), FLAT),
    "csea": Entry(
        partial(jaxlocal.csea, reset_compressor=parse("grbs:2"), model_state="average"),
        FLAT,
        steps=1,
        half=False,
    ),
    "cser_pl": Entry(
        partial(jaxlocal.cser_pl, reset_compressor=parse("grbs:2+bfloat16"), period=4),
        FLAT,
        half=False,
    ),
    "sparse_loco": Entry(
        partial(
            jaxlocal.sparse_loco,
            compressor=parse("top_k:2+qsgd:2"),
            period=4,
            outer_optimizer=optax.adam(0.1),
        ),
        FLAT,
    ),
    "mll_sgd-grbs": Entry(
        partial(
            mll_sgd,
            matrix=matrix("ring", HUBS),
            optimizer_state="reset",
            model_state="average",
            compressor=parse("grbs:2"),
        ),
        HUBS,
        steps=2,
    ),
    "hl_sgd-top_k": Entry(partial(hl_sgd, compressor=parse("top_k:2:model")), PAIRS),
}
OPTIMIZERS = {
    "momentum": optax.chain(optax.trace(0.9), jaxlocal.scale_by_step(lambda t: 0.1 / (1 + t))),
    "adamw": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(0.05, 100))
    ),
}
# A compilation takes a second: each method once, Local SGD with both optimizers.
CASES = [
    ("clipped_sgd", "adamw"),
    ("data_parallel", "momentum"),
    ("data_parallel-average", "adamw"),
    ("local_sgd", "momentum"),
    ("local_sgd", "adamw"),
    ("local_sgd-average", "adamw"),
    ("local_sgd-reset", "adamw"),
    ("post_local_sgd", "momentum"),
    ("swap", "adamw"),
    ("mll_sgd", "momentum"),
    ("mll_sgd-average", "adamw"),
    ("hl_sgd", "adamw"),
    ("cooperative_sgd", "momentum"),
    ("slowmo", "momentum"),
    ("diloco", "adamw"),
    ("streaming_diloco", "adamw"),
    ("fedavgm", "momentum"),
    ("fedadam", "adamw"),
    ("data_parallel-qsgd", "momentum"),
    ("ef_sgd", "momentum"),
    ("qsparse_local_sgd", "adamw"),
    ("qsparse_local_sgd-decay", "momentum"),
    ("cser", "adamw"),
    ("cser-powersgd", "momentum"),
    ("cser-2", "momentum"),
    ("cser-released", "momentum"),
    ("csea", "momentum"),
    ("cser_pl", "adamw"),
    ("sparse_loco", "adamw"),
    ("mll_sgd-grbs", "adamw"),
    ("hl_sgd-top_k", "momentum"),
]


def params():
    random = np.random.default_rng(0)
    return {
        "matrix": jnp.asarray(random.normal(size=(3, 2)), jnp.float32),
        "offset": jnp.asarray(random.normal(size=2), jnp.bfloat16),
    }


def model_state():
    return {"seen": jnp.zeros((), jnp.int32), "running": jnp.zeros(2)}


def loss(params, model_state, batch, key):
    offset = params["offset"].astype(jnp.float32)[None]  # as JAX's strict modes want it
    outputs = jnp.tanh(batch["x"] @ params["matrix"]) + offset
    residual = outputs - batch["y"] + jax.random.uniform(key)
    running = 0.9 * model_state["running"] + 0.1 * outputs.mean(0)
    new_state = {"seen": model_state["seen"] + 1, "running": running}
    return jnp.square(residual).mean(), (new_state, {"largest": jnp.abs(residual).max()})


def batches(of: Layout, start: int, steps: int) -> dict[str, np.ndarray]:
    """Leaves [steps, D, N, BATCH, ...], a function of the step alone."""

    def draw(step, size):
        shape = (*of.shape, BATCH, size)
        return np.random.default_rng((step, size)).normal(size=shape).astype(np.float32)

    span = range(start, start + steps)
    return {name: np.stack([draw(t, n) for t in span]) for name, n in (("x", 3), ("y", 2))}
