"""A problem large enough for compressors to lose something, runs of it step by step, and the
library's compressors replayed outside of the library's methods."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from problems import steps_of

import jaxlocal
from jaxlocal import Layout
from jaxlocal.compression import parse
from jaxlocal.parallel.keys import stream_key

EXAMPLES, FEATURES, OUTPUTS = 4, 6, 5
_START = np.random.default_rng(7)
START = {
    "bias": _START.normal(size=OUTPUTS),
    "weight": _START.normal(size=(FEATURES, OUTPUTS)),
}
DIM = OUTPUTS + FEATURES * OUTPUTS  # a vector has the bias and then the weight's rows
START_VECTOR = np.concatenate([START["bias"], START["weight"].ravel()])


def loss(params, batch, key):
    """Half the mean squared error of a linear model of five outputs."""
    errors = batch["inputs"] @ params["weight"] + params["bias"] - batch["targets"]
    return 0.5 * jnp.mean(jnp.sum(errors**2, axis=-1))


grad_fn = jaxlocal.gradients(loss)


def make_batches(layout: Layout, steps: int, seed: int = 0) -> dict:
    """Least squares with a different optimum for every worker; leaves [steps, D, N, ...]."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(steps, *layout.shape, EXAMPLES, FEATURES))
    optima = random.normal(size=(*layout.shape, FEATURES, OUTPUTS))
    return {"inputs": inputs, "targets": np.einsum("tdnbf,dnfo->tdnbo", inputs, optima)}


def numpy_gradient(batches: dict):
    """gradient(worker, x, step) of the same loss, by hand."""
    flat = lambda x: x.reshape(len(x), -1, *x.shape[3:])
    inputs, targets = flat(batches["inputs"]), flat(batches["targets"])

    def gradient(worker, x, step):
        bias, weight = x[:OUTPUTS], x[OUTPUTS:].reshape(FEATURES, OUTPUTS)
        errors = inputs[step, worker] @ weight + bias - targets[step, worker]
        slope = inputs[step, worker].T @ errors
        return np.concatenate([errors.sum(axis=0), slope.ravel()]) / EXAMPLES

    return gradient


def vectors(params) -> np.ndarray:
    """All workers' models as the rows of a matrix, [K, DIM]; of an anchor, one row."""
    bias, weight = np.asarray(params["bias"]), np.asarray(params["weight"])
    flat = [bias.reshape(-1, OUTPUTS), weight.reshape(-1, FEATURES * OUTPUTS)]
    return np.concatenate(flat, axis=1)


def trajectory(round_fn, batches, periods):
    """Models [stages + 1, K, DIM] and anchors [stages + 1, DIM] (or None) before the run and after
    every inner stage, or the end of a round there; active bool [steps, K]."""
    state = round_fn.init(START, jax.random.key(0))
    size, start, states, active = round_fn.method.inner.steps, 0, [], []

    def keep(state):
        anchor = vectors(state.anchor)[0] if jax.tree.leaves(state.anchor) else None
        states.append((vectors(state.params), anchor))

    keep(state)
    ending = round_fn.method.outer.steps
    for length in periods:
        for stop in range(start + size, start + length + 1, size):
            ends, fed = stop == start + length, steps_of(batches, stop - size, stop)
            if not (ends and ending):
                state, info = round_fn.local_steps(state, fed)
            if ends:
                state, last = round_fn.end_round(state, fed if ending else ())
                info = last if ending else info
            active.append(np.asarray(info.worker["active"]).reshape(size, -1))
            keep(state)
        start += length
    models, anchors = zip(*states, strict=True)
    anchors = None if anchors[0] is None else np.stack(anchors)
    return np.stack(models), anchors, np.concatenate(active) > 0


def final_state(method, layout, mesh=(1, 1), steps=12):
    """The state after rounds of the method's period; all local steps are one program."""
    mesh = jaxlocal.make_mesh(layout, shape=mesh)
    round_fn = jaxlocal.RoundFn(method, layout, mesh, max_chunk=1)
    batches, start = make_batches(layout, steps), 0
    state = round_fn.init(START, jax.random.key(0))
    for length in jaxlocal.periods.lengths(method.period, steps):
        state, _ = round_fn(state, steps_of(batches, start, start + length), length=length)
        start += length
    return state


def replay(spec, purpose, weights, hub_of_worker=None):
    """A compressor in the form of `reference_compressed`, with the keys of `trajectory`.

    It compresses the tree of one worker after another, without any method, mixer or mesh. The first
    messages of two are averaged over the workers of a hub, by default over all.
    """
    compressor, unravel = parse(spec), ravel_pytree(_zeros())[1]
    weights, memories = np.asarray(weights), [compressor.init(_zeros())] * len(weights)
    hubs = np.zeros(len(weights), int) if hub_of_worker is None else np.asarray(hub_of_worker)
    encode, decode = _programs(spec)

    def average(trees):
        """The averages of the trees over the hub of every worker."""
        means = []
        for hub in hubs:
            shares = weights * (hubs == hub) / weights[hubs == hub].sum()
            combine = lambda *leaves, a=shares: sum(w * x for w, x in zip(a, leaves, strict=True))
            means.append(jax.tree.map(combine, *trees))
        return means

    def answer(vectors, payloads, key):
        """The complete payloads of a compressor that sends a second message."""
        second = compressor.second
        known = [second.settle(first) for first in average(payloads)]
        arguments = zip(vectors, known, strict=True)
        sent = [second.encode(unravel(jnp.asarray(x)), first, key) for x, first in arguments]
        for worker, common in enumerate(average(sent)):
            payload = {**known[worker], **common}
            memories[worker] = second.remember(memories[worker], payload, key)
        return [{**first, **own} for first, own in zip(known, sent, strict=True)]

    def compress(vectors, message):
        shared = stream_key(jax.random.key(0), purpose, message)
        own = lambda worker: stream_key(jax.random.key(0), purpose, message, worker)
        payloads = [
            encode(x, memories[worker], shared if compressor.shared_mask else own(worker))
            for worker, x in enumerate(vectors)
        ]
        if compressor.second is not None:
            payloads = answer(vectors, payloads, shared)
        return np.stack([decode(payload, shared) for payload in payloads])

    return compress


@functools.cache
def _programs(spec):
    """The functions (vector, memory, key) -> payload and (payload, key) -> C(vector), compiled."""
    compressor = parse(spec)

    @jax.jit
    def encode(vector, memory, key):
        return compressor.encode(ravel_pytree(_zeros())[1](vector), memory, key)

    @jax.jit
    def decode(payload, key):
        return ravel_pytree(compressor.decode(payload, key, _zeros(), 1.0))[0]

    return encode, decode


def _zeros():
    return jax.tree.map(jnp.zeros_like, START)
