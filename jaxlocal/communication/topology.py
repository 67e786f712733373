"""Hub graphs, and the matrices by which hubs mix over them.

Source: Castiglia, Das, Patterson, "Multi-Level Local SGD: Distributed SGD for Heterogeneous
Hierarchical Networks", ICLR 2021, https://arxiv.org/abs/2007.13819.
"""

from pathlib import Path
from typing import NamedTuple

import networkx as nx
import numpy as np

from jaxlocal.errors import ConfigurationError, unknown

GRAPHS = ("complete", "ring", "path", "star", "erdos_renyi")


def hub_graph(spec: str, hubs: int, seed: int = 0) -> np.ndarray:
    """The adjacency matrix, bool [D, D], of a connected hub graph.

    Args:
      spec: `complete`, `ring`, `path`, `star` (hub 0 in the middle), `erdos_renyi:PROBABILITY:SEED`
        (by default 0.5 and `seed`), or a file with a row of 0s and 1s for each hub.
      hubs: D.
      seed: of a random graph whose spec names none.

    Raises:
      ConfigurationError: an unknown graph, a file that is not such a matrix, or a graph that is not
        connected.

    >>> hub_graph("path", 3).astype(int)
    array([[0, 1, 0],
           [1, 0, 1],
           [0, 1, 0]])
    """
    name, *options = spec.split(":")
    if name in ("complete", "ring", "path", "star") and not options:
        make = {"complete": nx.complete_graph, "ring": nx.cycle_graph, "path": nx.path_graph}
        graph = nx.star_graph(hubs - 1) if name == "star" else make[name](hubs)
        adjacency = nx.to_numpy_array(graph) > 0
    elif name == "erdos_renyi":
        adjacency = _erdos_renyi(spec, options, hubs, seed)
    elif Path(spec).is_file():
        adjacency = read_graph(spec)
    else:
        raise unknown("hub graph (and no such file)", spec, GRAPHS)
    return check_graph(adjacency, hubs, spec)


def _erdos_renyi(spec: str, options: list[str], hubs: int, seed: int) -> np.ndarray:
    try:
        probability = float(options[0]) if options else 0.5
        seed = int(options[1]) if len(options) > 1 else seed
        if len(options) > 2 or not 0 <= probability <= 1:
            raise ValueError
    except ValueError:
        raise ConfigurationError(
            f"hub graph {spec!r} is not erdos_renyi:PROBABILITY:SEED with a probability in [0, 1] "
            f"and an integer seed"
        ) from None
    return nx.to_numpy_array(nx.gnp_random_graph(hubs, probability, seed=seed)) > 0


def read_graph(path: str | Path) -> np.ndarray:
    """The adjacency matrix in a text file: a row of 0s and 1s for each hub; # starts a comment.

    A 1 on the diagonal means nothing: every hub keeps a part of its own model.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the hub graph file {path} cannot be read: {error}") from None
    lines = [line.split("#")[0] for line in text.splitlines()]
    rows = ["".join(line.replace(",", " ").split()) for line in lines]
    rows = [row for row in rows if row]
    wrong = [row for row in rows if len(row) != len(rows) or set(row) - {"0", "1"}]
    if wrong or not rows:
        raise ConfigurationError(
            f"the hub graph file {path} must hold a square of 0s and 1s: {len(rows)} rows"
            + (f", one of them {wrong[0][:60]!r}" if wrong else "")
        )
    return np.array([[value == "1" for value in row] for row in rows])


def check_graph(adjacency: np.ndarray, hubs: int, name: str) -> np.ndarray:
    """The adjacency as a bool matrix without diagonal, or an error that says what is wrong with
    it."""
    adjacency = np.array(adjacency, bool)
    if adjacency.shape != (hubs, hubs):
        raise ConfigurationError(
            f"hub graph {name!r} has {len(adjacency)} hubs, the layout has {hubs}"
        )
    np.fill_diagonal(adjacency, False)
    if (adjacency != adjacency.T).any():
        i, j = np.argwhere(adjacency != adjacency.T)[0]
        raise ConfigurationError(
            f"hub graph {name!r} is not symmetric: entries ({i}, {j}) and ({j}, {i}) differ"
        )
    parts = list(nx.connected_components(nx.from_numpy_array(adjacency)))
    if len(parts) > 1:
        raise ConfigurationError(
            f"hub graph {name!r} is not connected: {len(parts)} parts, hub {min(parts[0])} never "
            f"hears of hub {min(parts[1])}"
        )
    return adjacency


def mixing_matrix(adjacency: np.ndarray, hub_weights: np.ndarray) -> np.ndarray:
    """H, float64 [D, D], by which hubs mix: y_d = Σ_j H_jd z_j.

    H_ij = c·b_i on edges and H_jj = 1 − Σ_{i≠j} H_ij, with c = 1 / max_j Σ b_i over the closed
    neighbourhood of j. Columns sum to 1; H b = b, so Σ b_d z_d is kept; on every connected graph
    repeated mixing reaches consensus.

    Args:
      adjacency: bool [D, D], symmetric, connected; the diagonal is ignored.
      hub_weights: b, float [D], positive, summing to 1.

    >>> mixing_matrix(hub_graph("complete", 2), np.array([0.25, 0.75]))
    array([[0.25, 0.25],
           [0.75, 0.75]])
    """
    edges = np.array(adjacency, np.float64)
    np.fill_diagonal(edges, 0.0)
    weights = np.asarray(hub_weights, np.float64)
    if weights.shape != (len(edges),):
        raise ConfigurationError(
            f"{weights.size} hub weights do not fit a graph of {len(edges)} hubs"
        )
    scale = 1 / (edges.T @ weights + weights).max()
    matrix = scale * weights[:, None] * edges
    np.fill_diagonal(matrix, 1 - matrix.sum(axis=0))
    return matrix


def check_mixing(matrix: np.ndarray, hub_weights: np.ndarray | None = None) -> np.ndarray:
    """The matrix as float64 [D, D] if its columns sum to 1 (and, with weights b, if H b = b);
    else an error."""
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ConfigurationError(f"a mixing matrix must be square, got shape {matrix.shape}")
    sums = matrix.sum(axis=0)
    worst = int(np.abs(sums - 1).argmax())
    if not np.abs(sums - 1).max() < 1e-6:
        raise ConfigurationError(
            f"the columns of a mixing matrix must sum to 1; column {worst} sums to {sums[worst]:g}"
        )
    if hub_weights is not None:
        if len(hub_weights) != len(matrix):
            raise ConfigurationError(
                f"a mixing matrix of {len(matrix)} hubs does not fit {len(hub_weights)} hubs"
            )
        kept = matrix @ hub_weights
        worst = int(np.abs(kept - hub_weights).argmax())
        if not np.abs(kept - hub_weights).max() < 1e-6:
            raise ConfigurationError(
                f"the mixing matrix does not keep the weighted average: hub {worst} of weight "
                f"{hub_weights[worst]:g} "
                f"would count {kept[worst]:g}"
            )
    return matrix


def zeta(matrix: np.ndarray) -> float:
    """ζ = max(|λ₂|, |λ_D|) of a mixing matrix: how much of the hubs' disagreement one mixing
    leaves. 0 for one hub.

    >>> round(zeta(mixing_matrix(hub_graph("ring", 4), np.full(4, 1 / 4))), 6)
    0.333333
    """
    values = np.sort(np.abs(np.linalg.eigvals(np.asarray(matrix, np.float64))))
    return float(values[-2]) if len(values) > 1 else 0.0


class Route(NamedTuple):
    """One permutation of a mixing: which devices speak to whom, and of which hubs."""

    pairs: tuple[tuple[int, int], ...]  # (from, to); a device is at most once in each place
    said: np.ndarray  # int [devices, m]: hubs whose models a device says, counted from its first
    heard: np.ndarray  # int [devices, m]: which hubs those are that a device hears; −1 for none


def routes(matrix: np.ndarray, devices: int) -> list[Route]:
    """The fewest permutations by which devices, each with an equal share of the hubs, hear of all
    hubs that theirs mix with: as many as the most devices that one device speaks to or hears.

    On a ring two, from either side. A device that speaks to fewer than others is silent in some.

    Args:
      matrix: H [D, D]; hub d hears hub j where H_jd is not 0.

    >>> ring = mixing_matrix(hub_graph("ring", 6), np.full(6, 1 / 6))
    >>> [(len(route.pairs), route.said.shape) for route in routes(ring, 3)]
    [(3, (3, 1)), (3, (3, 1))]
    """
    own = len(matrix) // devices
    blocks = np.asarray(matrix).reshape(devices, own, devices, own)
    told = {
        (i, j): np.flatnonzero(blocks[i, :, j].any(axis=1))
        for i in range(devices)
        for j in range(devices)
        if i != j and blocks[i, :, j].any()
    }
    found = []
    for pairs in _matchings(set(told), devices):
        most = max(len(told[pair]) for pair in pairs)
        said, heard = np.zeros((devices, most), np.int32), np.full((devices, most), -1, np.int32)
        for i, j in pairs:
            said[i, : len(told[i, j])] = told[i, j]
            heard[j, : len(told[i, j])] = i * own + told[i, j]
        found.append(Route(tuple(pairs), said, heard))
    return found


def _matchings(edges: set[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Directed edges in as few groups as can be in which no end and no beginning is met twice.

    As many as the largest degree (Kőnig): edges are added until every degree is that one, and a
    bipartite graph of equal degrees has a perfect matching, without which it is one again.
    """
    counts = np.zeros((size, size), int)
    for edge in edges:
        counts[edge] = 1
    degree = max([0, *counts.sum(0), *counts.sum(1)])
    for i in range(size):
        for j in range(size):
            counts[i, j] += min(degree - counts[i].sum(), degree - counts[:, j].sum())
    left, groups = set(edges), []
    for _ in range(degree):
        graph = nx.Graph((int(i), int(size + j)) for i, j in np.argwhere(counts))
        partner = nx.bipartite.hopcroft_karp_matching(graph, range(size))
        matching = [(i, partner[i] - size) for i in range(size)]
        for pair in matching:
            counts[pair] -= 1
        groups.append([pair for pair in matching if pair in left])
        left -= set(matching)
    return groups
