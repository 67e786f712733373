"""Hub graphs and the mixing matrices of hubs on them.

Source: Castiglia, Das, Patterson, "Multi-Level Local SGD: Distributed SGD for Heterogeneous
Hierarchical Networks", ICLR 2021, https://arxiv.org/abs/2007.13819.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxlocal.errors import ConfigurationError, check_integer, unknown
from jaxlocal.parallel.layout import real_numbers

GRAPHS = ("complete", "ring", "path", "star", "erdos_renyi")


def hub_graph(spec: str, hubs: int, seed: int = 0) -> np.ndarray:
    """Build a connected hub graph, by its name or from a file.

    Args:
      spec: `complete`, `ring`, `path`, `star` (hub 0 in the middle), `erdos_renyi:PROBABILITY:SEED`
        (by default 0.5 and `seed`), or the path of a file that `read_graph` reads.
      hubs: D, the number of hubs.
      seed: seed of a random graph whose spec gives none.

    Returns:
      The adjacency matrix, bool [D, D], symmetric, with a diagonal of False.

    Raises:
      ConfigurationError: the graph is unknown, not connected or not of D hubs, or the file does not
        hold an adjacency matrix.

    >>> hub_graph("path", 3).astype(int)
    array([[0, 1, 0],
           [1, 0, 1],
           [0, 1, 0]])
    """
    check_integer("hubs", hubs)
    name, *options = spec.split(":") if isinstance(spec, str) else (spec,)
    if name in ("complete", "ring", "path", "star") and not options:
        adjacency = _named(name, hubs)
    elif name == "erdos_renyi":
        adjacency = _erdos_renyi(spec, options, hubs, seed)
    elif isinstance(spec, str) and Path(spec).is_file():
        adjacency = read_graph(spec)
    else:
        raise unknown("hub graph (and no such file)", spec, GRAPHS)
    return check_graph(adjacency, hubs, spec)


def _named(name: str, hubs: int) -> np.ndarray:
    import networkx as nx  # here, since most programs mix over no graph and start without it

    make = {"complete": nx.complete_graph, "ring": nx.cycle_graph, "path": nx.path_graph}
    graph = nx.star_graph(hubs - 1) if name == "star" else make[name](hubs)
    return nx.to_numpy_array(graph) > 0


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
    import networkx as nx

    return nx.to_numpy_array(nx.gnp_random_graph(hubs, probability, seed=seed)) > 0


def read_graph(path: str | Path) -> np.ndarray:
    """Read the adjacency matrix of a graph from a text file.

    The file has one row of 0s and 1s per hub, with or without spaces or commas; # starts a comment.
    The diagonal has no meaning, since every hub keeps a part of its model anyway.

    Args:
      path: the file.

    Returns:
      The matrix as the file has it, bool [D, D].

    Raises:
      ConfigurationError: the file cannot be read, or it does not hold a square of 0s and 1s.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
    ...     print("0 1  # two hubs\\n1 0", file=file, flush=True)
    ...     read_graph(file.name)
    array([[False,  True],
           [ True, False]])
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


def check_graph(adjacency: npt.ArrayLike, hubs: int, name: str) -> np.ndarray:
    """Check that a graph of hubs is symmetric and connected.

    Args:
      adjacency: [D, D], true or 1 where two hubs are neighbours; the diagonal is ignored.
      hubs: D, the number of hubs that the graph must have.
      name: what errors call the graph.

    Returns:
      A copy of the adjacency matrix, bool [D, D], with a diagonal of False.

    Raises:
      ConfigurationError: the matrix has another size, is not symmetric or not connected.

    >>> check_graph([[1, 1], [1, 0]], hubs=2, name="pair")
    array([[False,  True],
           [ True, False]])
    """
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
    import networkx as nx

    parts = list(nx.connected_components(nx.from_numpy_array(adjacency)))
    if len(parts) > 1:
        raise ConfigurationError(
            f"hub graph {name!r} is not connected: it has {len(parts)} parts, and no path leads "
            f"from hub {min(parts[0])} to hub {min(parts[1])}"
        )
    return adjacency


def mixing_matrix(adjacency: np.ndarray, hub_weights: np.ndarray) -> np.ndarray:
    """Build the mixing matrix H of a hub graph: hubs mix by y_d = Σ_j H_jd z_j.

        H_ij = c · b_i            on the edges (i, j) of the graph
        H_jj = 1 − Σ_{i≠j} H_ij
        c = 1 / max_j (b_j + Σ b_i over the neighbours i of j)

    The columns of H sum to 1, and H b = b, so that mixing keeps the weighted average Σ b_d z_d. On
    a connected graph repeated mixing reaches consensus.

    Args:
      adjacency: bool [D, D], symmetric and connected; the diagonal is ignored.
      hub_weights: b, float [D], positive, with a sum of 1; see `Layout.hub_weight`.

    Returns:
      H, float64 [D, D].

    Raises:
      ConfigurationError: the number of weights is not D, or they are not positive.

    >>> mixing_matrix(hub_graph("complete", 2), np.array([0.25, 0.75]))
    array([[0.25, 0.25],
           [0.75, 0.75]])
    """
    edges = np.array(adjacency, np.float64)
    np.fill_diagonal(edges, 0.0)
    weights = real_numbers("hub weights", hub_weights)
    if weights.shape != (len(edges),):
        raise ConfigurationError(
            f"{weights.size} hub weights do not fit a graph of {len(edges)} hubs"
        )
    if not (np.isfinite(weights) & (weights > 0)).all():
        raise ConfigurationError(f"hub weights must be > 0 and finite, got {weights}")
    scale = 1 / (edges.T @ weights + weights).max()
    matrix = scale * weights[:, None] * edges
    np.fill_diagonal(matrix, 1 - matrix.sum(axis=0))
    return matrix


def check_mixing(matrix: npt.ArrayLike, hub_weights: np.ndarray | None = None) -> np.ndarray:
    """Check that a mixing matrix keeps the weighted average: columns that sum to 1, and H b = b.

    Args:
      matrix: H [D, D], or W [K, K] of workers.
      hub_weights: b [D], or a [K] of workers; without weights only the columns are checked.

    Returns:
      The matrix as float64.

    Raises:
      ConfigurationError: the matrix is not square, a column does not sum to 1, or a weight changes.

    >>> check_mixing([[0.5, 0.5], [0.5, 0.5]], np.array([0.5, 0.5]))
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    matrix = real_numbers("the entries of a mixing matrix", matrix)
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
                f"the mixing matrix does not keep the weighted average: hub {worst} has weight "
                f"{hub_weights[worst]:g}, and {kept[worst]:g} after mixing"
            )
    return matrix


def zeta(matrix: np.ndarray) -> float:
    """Second largest modulus of a mixing matrix's eigenvalues, ζ = max(|λ₂|, |λ_D|).

    One mixing leaves a fraction ζ of the hubs' disagreement, or less: 0 means consensus at once, 1
    none ever. 1 − ζ is the spectral gap.

    Args:
      matrix: H [D, D], as `mixing_matrix` gives it.

    Returns:
      ζ; 0 for one hub.

    >>> round(zeta(mixing_matrix(hub_graph("ring", 4), np.full(4, 1 / 4))), 6)
    0.333333
    """
    values = np.sort(np.abs(np.linalg.eigvals(np.asarray(matrix, np.float64))))
    return float(values[-2]) if len(values) > 1 else 0.0
