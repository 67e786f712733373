"""Routes of a mixing: the collective-permutes that bring hubs' models to their neighbours."""

from typing import NamedTuple

import numpy as np


class Route(NamedTuple):
    """One collective-permute of a mixing: who sends to whom, and the models of which hubs."""

    pairs: tuple[tuple[int, int], ...]  # (from, to); each device sends and receives at most once
    sent: np.ndarray  # int [devices, m]: the hubs whose models a device sends, from its first hub
    received: np.ndarray  # int [devices, m]: the hubs whose models a device receives; −1 for none


def routes(matrix: np.ndarray, devices: int) -> list[Route]:
    """Plan the fewest permutations by which devices send hubs' models to the neighbours.

    Every device holds D / devices successive hubs. There are as many permutations as the largest
    number of devices that one device sends to or receives from: on a ring two, one per direction.
    In some of them a device with fewer partners does not send.

    Args:
      matrix: H [D, D]; hub d receives from hub j where H_jd is not 0.
      devices: a divisor of D.

    Returns:
      The permutations, with the hubs' models that each device sends and receives in them.

    >>> from jaxlocal.communication.topology import hub_graph, mixing_matrix
    >>> ring = mixing_matrix(hub_graph("ring", 6), np.full(6, 1 / 6))
    >>> [(len(route.pairs), route.sent.shape) for route in routes(ring, 3)]
    [(3, (3, 1)), (3, (3, 1))]
    """
    own = len(matrix) // devices
    blocks = np.asarray(matrix).reshape(devices, own, devices, own)
    needed = {  # by (from, to): the sender's hubs that a hub of the receiver mixes with
        (i, j): np.flatnonzero(blocks[i, :, j].any(axis=1))
        for i in range(devices)
        for j in range(devices)
        if i != j and blocks[i, :, j].any()
    }
    found = []
    for pairs in _matchings(set(needed), devices):
        most = max(len(needed[pair]) for pair in pairs)
        sent, received = np.zeros((devices, most), np.int32), np.full((devices, most), -1, np.int32)
        for i, j in pairs:
            sent[i, : len(needed[i, j])] = needed[i, j]
            received[j, : len(needed[i, j])] = i * own + needed[i, j]
        found.append(Route(tuple(pairs), sent, received))
    return found


def _matchings(edges: set[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Partition directed edges into the fewest groups in which no start and no end occurs twice.

    The largest degree is enough (Kőnig): with edges added until all degrees are equal, the
    bipartite graph of starts and ends has a perfect matching, and removing it leaves all degrees
    equal again.
    """
    import networkx as nx  # here, since most programs mix over no graph and start without it

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
