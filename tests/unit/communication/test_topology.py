"""Hub graphs have the edges of their names, and mixing matrices keep the weighted mean."""

import re

import numpy as np
import problems
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlocal import ConfigurationError, Layout
from jaxlocal.communication.topology import (
    check_graph,
    check_mixing,
    hub_graph,
    mixing_matrix,
    read_graph,
    zeta,
)

# Sums of at most twelve float64 numbers of size one, in two orders.
EXACT = {"rtol": 0, "atol": 1e-14}


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


@st.composite
def networks(draw):
    """A connected graph, and hub weights that may differ a thousandfold."""
    hubs, seed = draw(st.integers(1, 12)), draw(st.integers(0, 2**32 - 1))
    weights = 10 ** np.random.default_rng(seed).uniform(-3, 0, hubs)
    return problems.connected_graph(hubs, seed), weights / weights.sum()


def edges(graph):
    return {(int(i), int(j)) for i, j in np.argwhere(graph) if i < j}


def test_named_graphs_have_their_edges():
    assert edges(hub_graph("complete", 4)) == {(i, j) for j in range(4) for i in range(j)}
    assert edges(hub_graph("ring", 4)) == {(0, 1), (1, 2), (2, 3), (0, 3)}
    assert edges(hub_graph("path", 4)) == {(0, 1), (1, 2), (2, 3)}
    assert edges(hub_graph("star", 4)) == {(0, 1), (0, 2), (0, 3)}


@pytest.mark.parametrize("spec", ["complete", "ring", "path", "star", "erdos_renyi:0.9:3"])
@pytest.mark.parametrize("hubs", [1, 2, 3, 7])
def test_every_graph_is_symmetric_and_without_a_diagonal(spec, hubs):
    graph = hub_graph(spec, hubs)
    assert graph.shape == (hubs, hubs) and graph.dtype == bool
    assert (graph == graph.T).all() and not graph.diagonal().any()


def test_random_graphs_follow_their_seed_and_their_probability():
    first, second = hub_graph("erdos_renyi:0.5:1", 20), hub_graph("erdos_renyi:0.5:2", 20)
    assert (first != second).any()
    assert (hub_graph("erdos_renyi:0.5:1", 20, seed=5) == first).all()
    assert (hub_graph("erdos_renyi:0.5", 20, seed=1) == first).all()
    assert (hub_graph("erdos_renyi", 20, seed=1) == first).all()
    assert hub_graph("erdos_renyi:1", 5).sum() == 20
    # 780 edges of probability 0.3: the mean number is 234, its standard deviation 13.
    assert abs(hub_graph("erdos_renyi:0.3:0", 40).sum() / 2 - 234) < 4 * 13


@pytest.mark.parametrize(
    "spec",
    ["erdos_renyi:1.5", "erdos_renyi:x", "erdos_renyi:0.5:1.5", "erdos_renyi:0.5:1:2"],
)
def test_a_wrong_spec_of_a_random_graph_is_refused(spec):
    with refused(f"hub graph {spec!r} is not erdos_renyi:PROBABILITY:SEED"):
        hub_graph(spec, 4)


@pytest.mark.parametrize(("spec", "near"), [("rign", "ring"), ("complet", "complete")])
def test_an_unknown_graph_is_refused_with_the_nearest_name(spec, near):
    with refused(f"unknown hub graph (and no such file) {spec!r}; did you mean {near!r}"):
        hub_graph(spec, 4)


def test_a_named_graph_takes_no_options():
    with refused("unknown hub graph (and no such file) 'ring:3'"):
        hub_graph("ring:3", 4)


@pytest.mark.parametrize(
    "text",
    [
        "010\n101\n010\n",
        "0 1 0\n1 0 1\n0 1 0",
        "0,1,0\n1,0,1\n0,1,0\n",
        "# a path of three\n\n0, 1, 0  # the first hub\n1\t0 1\n\n010\n",
        "110\n111\n011\n",
    ],
    ids=["dense", "spaces", "commas", "comments", "self loops"],
)
def test_graph_files(text, tmp_path):
    file = tmp_path / "graph.txt"
    file.write_text(text)
    np.testing.assert_array_equal(hub_graph(str(file), 3), hub_graph("path", 3))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("01\n10\n01\n", "3 rows, one of them '01'"),
        ("010\n101\n", "2 rows, one of them '010'"),
        ("02\n10\n", "2 rows, one of them '02'"),
        ("0 .5\n.5 0\n", "2 rows, one of them '0.5'"),
        ("# nothing\n", "0 rows"),
        ("", "0 rows"),
    ],
)
def test_a_file_that_is_not_a_square_of_0s_and_1s_is_refused(text, complaint, tmp_path):
    file = tmp_path / "graph.txt"
    file.write_text(text)
    with refused(f"the hub graph file {file} must hold a square of 0s and 1s: {complaint}"):
        hub_graph(str(file), 3)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with refused(f"the hub graph file {tmp_path / 'none'} cannot be read"):
        read_graph(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe01")
    with refused(f"the hub graph file {tmp_path / 'binary'} cannot be read"):
        hub_graph(str(tmp_path / "binary"), 2)


def test_graphs_of_another_size_asymmetric_or_not_connected_are_refused(tmp_path):
    file = tmp_path / "graph.txt"
    file.write_text("01\n10\n")
    with refused(f"hub graph {str(file)!r} has 2 hubs, the layout has 3"):
        hub_graph(str(file), 3)
    one_way = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 0]])
    with refused("hub graph 'mine' is not symmetric: entries (1, 2) and (2, 1) differ"):
        check_graph(one_way, 3, "mine")
    apart = np.kron(np.eye(2), np.ones((2, 2)))
    message = "it has 2 parts, and no path leads from hub 0 to hub 2"
    with refused(f"hub graph 'mine' is not connected: {message}"):
        check_graph(apart, 4, "mine")
    with refused("hub graph 'erdos_renyi:0' is not connected: it has 3 parts"):
        hub_graph("erdos_renyi:0", 3)


def test_checking_a_graph_does_not_change_the_callers_matrix():
    mine = np.ones((3, 3), bool)
    check_graph(mine, 3, "mine")
    assert mine.all()


@given(networks())
@settings(deadline=None)
def test_mixing_keeps_the_weighted_mean_and_uses_only_the_edges(network):
    graph, weights = network
    matrix = mixing_matrix(graph, weights)
    assert (matrix >= -1e-15).all() and (matrix.diagonal() > 0).all()
    np.testing.assert_allclose(matrix.sum(axis=0), 1, **EXACT)
    np.testing.assert_allclose(matrix @ weights, weights, **EXACT)
    assert ((matrix - np.diag(matrix.diagonal()) > 0) == graph).all()
    np.testing.assert_array_equal(
        matrix, mixing_matrix(graph | np.eye(len(graph), dtype=bool), weights)
    )
    assert check_mixing(matrix, weights) is not None


@given(networks())
@settings(deadline=None)
def test_repeated_mixing_reaches_the_weighted_mean(network):
    """ζ < 1 on every connected graph, and no mixing leaves more than ζ of the disagreement."""
    graph, weights = network
    matrix = mixing_matrix(graph, weights)
    # H is similar to a symmetric matrix: its eigenvalues are those of B^(-1/2) H B^(1/2).
    root = np.sqrt(weights)
    values = np.linalg.eigvalsh(matrix / root[:, None] * root)
    second = np.sort(np.abs(values))[-2] if len(values) > 1 else 0.0
    np.testing.assert_allclose(zeta(matrix), second, rtol=0, atol=1e-7)
    assert zeta(matrix) < 1
    # This holds in the norm in which H is symmetric.
    hubs = np.random.default_rng(0).normal(size=len(weights))
    before = hubs - weights @ hubs
    after = matrix.T @ before
    assert weights @ after**2 <= (second**2 + 1e-9) * (weights @ before**2) + 1e-18


@pytest.mark.parametrize("graph", ["ring", "path", "star"])
def test_uniform_weights_give_the_laplacian_step(graph):
    adjacency = hub_graph(graph, 6)
    degrees = adjacency.sum(axis=0)
    laplacian = np.diag(degrees) - adjacency
    expected = np.eye(6) - laplacian / (degrees.max() + 1)
    np.testing.assert_allclose(mixing_matrix(adjacency, np.full(6, 1 / 6)), expected, **EXACT)


def test_zeta_of_graphs_whose_eigenvalues_are_known():
    uniform = lambda graph, hubs: mixing_matrix(hub_graph(graph, hubs), np.full(hubs, 1 / hubs))
    # 1 − μ / (largest degree + 1); μ = 2 − 2 cos 2πk/D for a ring, and 0, 1 and D for a star.
    assert zeta(uniform("ring", 8)) == pytest.approx(1 - 2 * (1 - np.cos(np.pi / 4)) / 3)
    assert zeta(uniform("star", 6)) == pytest.approx(1 - 1 / 6)
    assert zeta(uniform("path", 2)) == pytest.approx(0, abs=1e-12)
    assert zeta(uniform("complete", 5)) == pytest.approx(0, abs=1e-7)  # a multiple eigenvalue
    assert zeta(np.eye(1)) == 0
    # Two hubs that almost swap their models: λ is negative, and its modulus counts.
    assert zeta(np.array([[0.05, 0.95], [0.95, 0.05]])) == pytest.approx(0.9)


def test_the_ten_hubs_of_the_paper_are_a_connected_graph():
    graph = check_graph(problems.TEN_HUBS, 10, "ten hubs")
    matrix = mixing_matrix(graph, Layout(10, 10).hub_weight)
    assert graph.sum(axis=0).max() == 8 and 0.1 < zeta(matrix) < 0.9


def test_matrices_that_do_not_keep_the_mean_are_refused():
    with refused("a mixing matrix must be square, got shape (2, 3)"):
        check_mixing(np.ones((2, 3)))
    with refused("the columns of a mixing matrix must sum to 1; column 1 sums to 0.8"):
        check_mixing(np.array([[1.0, 0.3], [0.0, 0.5]]))
    with refused("the columns of a mixing matrix must sum to 1; column 0 sums to nan"):
        check_mixing(np.array([[np.nan, 0.5], [0.5, 0.5]]))
    with refused("a mixing matrix of 2 hubs does not fit 3 hubs"):
        check_mixing(np.full((2, 2), 0.5), np.full(3, 1 / 3))
    with refused("hub 0 has weight 0.25, and 0.5 after mixing"):
        check_mixing(np.full((2, 2), 0.5), np.array([0.25, 0.75]))
    with refused("3 hub weights do not fit a graph of 2 hubs"):
        mixing_matrix(np.ones((2, 2)), np.full(3, 1 / 3))
