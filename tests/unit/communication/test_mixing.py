"""Every mixer multiplies by its matrix, on any mesh: it keeps the weighted mean and consensus."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import registry
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxlocal import ConfigurationError, Layout, make_mesh
from jaxlocal.communication import mixing
from jaxlocal.communication.topology import hub_graph, mixing_matrix, zeta
from jaxlocal.parallel.layout import CONTEXT, STACKED
from jaxlocal.types import MessageBits

# Float32 rounds at 6e-8; a mixing sums at most 24 numbers of size one.
ROUNDING = {"rtol": 2e-6, "atol": 1e-6}
WEIGHTS = np.random.default_rng(0).uniform(0.5, 4, (2, 8))
GRID = Layout(4, 2, weights=WEIGHTS[0])
LINE = Layout(8, 1, weights=WEIGHTS[1])


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


def tree_of(layout, seed=0):
    """Leaves of several shapes, a scalar per worker among them."""
    random = np.random.default_rng(seed)
    shapes = {"scalar": (), "vector": (5,), "matrix": (3, 2)}
    return {
        name: random.normal(size=layout.shape + shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def hub_matrix(graph, layout):
    adjacency = hub_graph(graph, layout.hubs) if isinstance(graph, str) else graph
    return mixing_matrix(adjacency, layout.hub_weight)


def worker_matrix(layout, hubs):
    """W_ij = H_{d(i)d(j)} v_i, [K, K]: a hub average and then a mixing of hubs."""
    hub_of_worker = np.repeat(np.arange(layout.hubs), layout.workers_per_hub)
    shares = layout.weight.reshape(-1) / layout.hub_weight[hub_of_worker]
    return hubs[np.ix_(hub_of_worker, hub_of_worker)] * shares[:, None]


def by_hand(matrix, tree, layout):
    """Σ_j W_ji x_j in float64."""

    def one(leaf):
        rows = leaf.reshape(layout.workers, -1).astype(np.float64)
        return (matrix.T @ rows).reshape(leaf.shape)

    return jax.tree.map(one, tree)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)


@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (2, 2), (4, 2)])
def test_mean_gives_every_worker_the_weighted_mean(mesh):
    tree, weights = tree_of(GRID), GRID.weight.reshape(-1)
    expected = by_hand(np.tile(weights[:, None], (1, 8)), tree, GRID)
    assert_close(problems.mix(mixing.mean(), tree, GRID, mesh), expected)


@pytest.mark.parametrize("mesh", [(1, 1), (1, 2), (4, 2)])
def test_hub_mean_gives_every_worker_its_hubs_mean(mesh):
    tree = tree_of(GRID)
    expected = by_hand(worker_matrix(GRID, np.eye(4)), tree, GRID)
    assert_close(problems.mix(mixing.hub_mean(), tree, GRID, mesh), expected)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("graph", ["complete", "ring", "path", "star"])
def test_hub_diffusion_multiplies_by_its_matrix(graph, mesh):
    matrix = hub_matrix(graph, GRID)
    hubs = jax.tree.map(lambda x: np.repeat(x[:, :1], 2, axis=1), tree_of(GRID))
    # The workers of a hub agree, so that their weights in the hub do not matter.
    expected = by_hand(worker_matrix(GRID, matrix), hubs, GRID)
    assert_close(problems.mix(mixing.hub_diffusion(matrix), hubs, GRID, mesh), expected)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("graph", ["ring", "irregular"])
def test_hub_diffusion_over_devices_with_one_or_several_hubs(graph, devices):
    graph = problems.connected_graph(8, seed=4) if graph == "irregular" else graph
    matrix, tree = hub_matrix(graph, LINE), tree_of(LINE)
    got = problems.mix(mixing.hub_diffusion(matrix), tree, LINE, (devices, 1))
    assert_close(got, by_hand(matrix, tree, LINE))


def test_a_ring_of_three_and_a_matrix_that_favours_one_direction():
    layout = Layout(hubs=3)
    one_way = np.array([[0.5, 0.2, 0.3], [0.3, 0.5, 0.2], [0.2, 0.3, 0.5]])
    tree = tree_of(layout)
    for devices in (1, 3):
        got = problems.mix(mixing.hub_diffusion(one_way), tree, layout, (devices, 1))
        assert_close(got, by_hand(one_way, tree, layout))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2), (4, 2)])
def test_from_matrix_multiplies_by_any_matrix(mesh):
    layout = Layout(4, 2)
    # The rows and columns of a mean of permutations sum to one; it is not symmetric.
    random = np.random.default_rng(1)
    matrix = np.mean([np.eye(8)[random.permutation(8)] for _ in range(5)], axis=0)
    tree = tree_of(layout)
    got = problems.mix(mixing.from_matrix(matrix), tree, layout, mesh)
    assert_close(got, by_hand(matrix, tree, layout))


MIXERS = {
    **{name: lambda layout, make=make: make() for name, make in registry.MIXERS.items()},
    "mean": lambda layout: mixing.mean(),
    "hub_mean": lambda layout: mixing.hub_mean(),
    "ring": lambda layout: mixing.hub_diffusion(hub_matrix("ring", layout)),
    "complete": lambda layout: mixing.hub_diffusion(hub_matrix("complete", layout)),
    "from_matrix": lambda layout: mixing.from_matrix(
        worker_matrix(layout, hub_matrix("path", layout))
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_the_weighted_mean_is_kept_and_consensus_is_a_fixed_point(name):
    layout = LINE if name in ("ring", "complete") else GRID
    tree, mixer = tree_of(layout), MIXERS[name](layout)
    mean = lambda leaf: np.einsum("dn,dn...->...", layout.weight, leaf)
    mixed = problems.mix(mixer, tree, layout, (2, 1))
    assert_close(jax.tree.map(mean, mixed), jax.tree.map(mean, tree))
    assert any(np.abs(mixed[leaf] - tree[leaf]).max() > 0.1 for leaf in tree)
    alike = jax.tree.map(lambda x: np.broadcast_to(x[:1, :1], x.shape), tree)
    assert_close(problems.mix(mixer, alike, layout, (2, 1)), alike)


@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_hubs_mix_as_their_matrix_on_any_weighted_graph(hubs, workers, seed):
    layout = Layout(hubs, workers, 10 ** np.random.default_rng(seed).uniform(-2, 0, hubs * workers))
    matrix = hub_matrix(problems.connected_graph(hubs, seed), layout)
    tree = {"vector": np.repeat(tree_of(Layout(hubs))["vector"], workers, axis=1)}
    mixed = problems.mix(mixing.hub_diffusion(matrix), tree, layout)
    assert_close(mixed, by_hand(worker_matrix(layout, matrix), tree, layout))
    mean = lambda leaf: np.einsum("dn,dn...->...", layout.weight, leaf)
    assert_close(mean(mixed["vector"]), mean(tree["vector"]))


@pytest.mark.parametrize("graph", ["ring", "star", "irregular"])
def test_disagreement_shrinks_by_zeta(graph):
    """The slope of log ‖x − u‖ per mixing, after so many that only the slowest mode remains."""
    graph = problems.connected_graph(8, seed=4) if graph == "irregular" else graph
    matrix = hub_matrix(graph, LINE)
    mixer, weights = mixing.hub_diffusion(matrix), LINE.weight[:, 0]

    def disagreement(x):
        apart = x[:, 0] - np.einsum("d,d...->...", weights, x[:, 0])
        return np.sqrt(weights @ apart**2)

    with jax.enable_x64(True):  # float32 cannot resolve the disagreement after many mixings
        early = problems.mix(
            mixer, np.random.default_rng(2).normal(size=LINE.shape), LINE, (4, 1), times=120
        )
        late = problems.mix(mixer, early, LINE, (4, 1), times=10)
    slope = (disagreement(late) / disagreement(early)) ** 0.1
    # The other modes shrink by at least 3 % more, to a relative weight of 0.97^240 < 1e-3.
    moduli = np.abs(np.linalg.eigvals(matrix))
    others = moduli[moduli < zeta(matrix) - 1e-9]
    assert others.size == 0 or others.max() < 0.97 * zeta(matrix)
    assert slope == pytest.approx(zeta(matrix), rel=1e-3)


@pytest.mark.parametrize("name", MIXERS)
def test_half_precision_is_summed_in_float32(name):
    # In bfloat16 shares of 1/36 and 1/3 are off by 0.2 %, half a unit in the last place.
    sizes = {"hub_mean": (2, 36), "ring": (36, 1), "complete": (36, 1)}
    layout = Layout(*sizes.get(name, (6, 6)))
    exact = np.random.default_rng(2).normal(1.5, 0.03, layout.shape + (50,))
    half = np.asarray(jnp.asarray(exact, jnp.bfloat16))
    wide = problems.mix(MIXERS[name](layout), half.astype(np.float32), layout, (2, 1))
    mixed = problems.mix(MIXERS[name](layout), half, layout, (2, 1))
    assert mixed.dtype == jnp.bfloat16 and wide.min() > 1 and wide.max() < 2
    # One rounding at the end: half a unit in the last of 8 significant bits, for [1, 2).
    error = np.abs(mixed.astype(np.float64) - wide)
    assert error.max() <= 2**-8 + 1e-6


def test_averages_have_size_1_along_the_axes_over_which_they_are_common():
    def shapes(mixer, layout, mesh):
        def program(x, context):
            out = mixer.average(x, context)
            seen.append((out.shape, jax.typeof(out).manual_axis_type.varying))
            return jnp.zeros(())

        seen = []
        mapped = jax.shard_map(
            program, mesh=make_mesh(layout, shape=mesh), in_specs=(STACKED, CONTEXT), out_specs=P()
        )
        jax.eval_shape(mapped, np.zeros(layout.shape + (3,), np.float32), layout.context())
        return seen[0]

    sizes = {"mean": (1, 1), "hub_mean": (2, 1), "ring": (4, 1), "complete": (1, 1)}
    sizes["from_matrix"] = (2, 2)
    for name, size in sizes.items():
        layout = LINE if name in ("ring", "complete") else Layout(4, 4)
        mesh = (2, 1) if layout is LINE else (2, 2)
        mixer = MIXERS[name](layout)
        shape, varying = shapes(mixer, layout, mesh)
        assert shape == size + (3,), name
        # An average may vary only over axes that the mixer does not list.
        assert set(varying).isdisjoint(mixer.axes), name


def test_message_bits_of_mixers():
    star = mixing.hub_diffusion(hub_matrix("star", GRID))
    count = lambda mixer, layout: mixer.message_bits(100, layout)
    assert count(mixing.mean(), GRID) == MessageBits(workers=100, hubs=300)
    assert count(mixing.mean(), Layout(1, 8)) == MessageBits(workers=100, hubs=0)
    assert count(mixing.mean(), Layout(8, 1)) == MessageBits(workers=0, hubs=700)
    assert count(mixing.mean(), Layout(1, 1)) == MessageBits(workers=0, hubs=0)
    assert count(mixing.hub_mean(), GRID) == MessageBits(workers=100, hubs=0)
    assert count(mixing.hub_mean(), LINE) == MessageBits(workers=0, hubs=0)
    assert count(star, GRID) == MessageBits(workers=0, hubs=300)  # the middle has three neighbours
    assert count(MIXERS["ring"](GRID), GRID) == MessageBits(workers=0, hubs=200)
    assert count(MIXERS["complete"](GRID), GRID) == MessageBits(workers=0, hubs=300)
    path = worker_matrix(GRID, hub_matrix("path", GRID))
    # A worker in the middle sends to the other one of its hub and to two in each of two hubs.
    assert count(mixing.from_matrix(path), GRID) == MessageBits(workers=500, hubs=0)
    huge = mixing.mean().message_bits(10**15, GRID)
    assert huge.hubs == 3 * 10**15 and isinstance(huge.hubs, int)


def test_mixers_that_do_not_fit_the_layout_are_refused():
    matrix = hub_matrix("ring", Layout(4))
    with refused("a mixing matrix of 4 hubs does not fit 3 hubs"):
        mixing.hub_diffusion(matrix).message_bits(1, Layout(3))
    with refused("the mixing matrix does not keep the weighted average: hub"):
        mixing.hub_diffusion(matrix).message_bits(1, GRID)
    with refused("a mixing matrix of 4 workers does not fit 8 workers"):
        mixing.from_matrix(matrix).message_bits(1, GRID)
    with refused("the mixing matrix does not keep the weighted average"):
        mixing.from_matrix(np.full((8, 8), 1 / 8)).message_bits(1, GRID)
    for make in (mixing.hub_diffusion, mixing.from_matrix):
        with refused("column 0 sums to 2"):
            make(2 * np.eye(3))
        with refused("must be square, got shape (2, 3)"):
            make(np.ones((2, 3)) / 2)
