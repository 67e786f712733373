"""Mixers that a user writes from public names alone: they average as defined, and their rounds send
what they list."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax import lax

from jaxlocal import Layout, Method, RoundFn, make_mesh, mixing, periods, stages
from jaxlocal.communication import by_kind
from jaxlocal.communication.audit import audit
from jaxlocal.parallel import AXES, fuse_leaves, psum, weighted_sum
from jaxlocal.types import MessageBits, Mixer

LAYOUT = Layout(workers_per_hub=8)
MESHES = [(1, 1), (1, 2), (1, 8)]
RANDOM = np.random.default_rng(0)
TREE = {name: RANDOM.normal(size=(1, 8, n)).astype(np.float32) for name, n in (("a", 3), ("b", 1))}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # sums of at most 8 float32 numbers of size one


def ring_gossip():
    """Every worker of a hub takes the average with the workers before and after it."""

    def average(tree, context):
        n = lax.axis_size("workers")
        shift = lambda x, by: lax.ppermute(x, "workers", [(i, (i + by) % n) for i in range(n)])

        def one(x):
            padded = jnp.concatenate([shift(x[:, -1:], 1), x, shift(x[:, :1], -1)], axis=1)
            return (padded[:, :-2] + x + padded[:, 2:]) / 3

        return fuse_leaves(one, tree, ["workers"])

    def collectives(layout, mesh, gathered):
        return [("collective-permute", ("workers",), layout.hubs // mesh["hubs"])] * 2

    return Mixer(average, (), lambda bits, layout: MessageBits(workers=2 * bits), collectives)


def clipped_mean(radius):
    """The average of all workers, each scaled down to a norm of at most `radius`."""

    def average(tree, context):
        square = lambda x: jnp.square(x).reshape(*x.shape[:2], -1).sum(-1)
        norm = jnp.sqrt(sum(square(x) for x in jax.tree.leaves(tree)))
        weight = context.weight * jnp.minimum(1, radius / norm)
        sums = jax.tree.map(lambda x: weighted_sum(weight, x, "all"), tree)
        return fuse_leaves(lambda x: psum(x, AXES), sums, AXES)

    return mixing.mean()._replace(average=average, gather=None)


@pytest.mark.parametrize("mesh", MESHES)
def test_ring_gossip_averages_three_workers(mesh):
    mixed = problems.mix(ring_gossip(), TREE, LAYOUT, mesh)
    for name, x in TREE.items():
        expected = (np.roll(x, 1, axis=1) + x + np.roll(x, -1, axis=1)) / 3
        np.testing.assert_allclose(mixed[name], expected, **CLOSE)


@pytest.mark.parametrize("mesh", MESHES)
def test_clipped_means_bound_the_norm_of_each_worker(mesh):
    mixed = problems.mix(clipped_mean(1.5), TREE, LAYOUT, mesh)
    norm = np.sqrt(sum((x**2).sum(2, keepdims=True) for x in TREE.values()))
    assert 0 < (norm < 1.5).sum() < 8
    for name, x in TREE.items():
        expected = (x * np.minimum(1, 1.5 / norm)).mean(1, keepdims=True)
        np.testing.assert_allclose(mixed[name], np.broadcast_to(expected, x.shape), **CLOSE)


@pytest.mark.parametrize(
    ("mixer", "bits"),
    [
        (ring_gossip(), 2),
        (clipped_mean(1.0), 1),
    ],
    ids=["ring", "clipped"],
)
def test_a_round_of_an_own_mixer_sends_what_the_mixer_lists(mixer, bits):
    optimizer = optax.sgd(0.1)
    inner, outer = stages.local_step(problems.grad_fn, optimizer), stages.sync(mixer)
    method = Method(inner, outer, optimizer, periods.constant(4))
    round_fn = RoundFn(method, LAYOUT, make_mesh(LAYOUT))
    state, batches = round_fn.shapes(problems.START), problems.make_batches(LAYOUT, 4)
    programs = [program.compile() for _, program in round_fn.lower(state, batches)]
    sent = [one.collective() for program in programs for one in audit(program, round_fn.mesh)]
    assert sent and by_kind(sent) == by_kind(round_fn.collectives(state, 4))
    assert round_fn.message_bits(state, steps=4, rounds=1).workers == bits * 4 * 32
    state, _ = round_fn(round_fn.init(problems.START, jax.random.key(0)), batches)
    assert np.isfinite(problems.vectors(state.params)).all()
