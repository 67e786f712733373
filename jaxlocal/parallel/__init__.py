"""Workers on devices: their layout and mesh, collectives between them, and sharded workers.

- `layout`: hubs × workers, with their weights and rates.
- `mesh`: the mesh of devices, which may span processes, and the placement of arrays on it.
- `collectives`: programs over the mesh, and sums, averages and distances of workers in them.
- `fusing`: the leaves of a tree in one message.
- `sharding`: rules by which a worker larger than a device is sharded over several.
- `worker_maps`: whether a device runs its workers all at once, in turn, or in blocks.
- `pool`: a pool of examples that stays on the devices.
- `keys`: random keys by purpose, step and worker.
- `leaves`: what kinds of leaves a state may hold.
"""

from jaxlocal.parallel.collectives import (
    broadcast_to_workers,
    consensus_distance,
    mean,
    over_mesh,
    pmax,
    psum,
    vary,
    weighted_sum,
    worker_shapes,
)
from jaxlocal.parallel.fusing import fuse_leaves
from jaxlocal.parallel.keys import own_keys, stream_key
from jaxlocal.parallel.layout import AXES, CONTEXT, MODEL, SINGLE, STACKED, Layout
from jaxlocal.parallel.mesh import largest_mesh, make_mesh
from jaxlocal.parallel.sharding import Rule, by_name, fsdp, unshard
from jaxlocal.parallel.worker_maps import over_workers, worker_map_for

__all__ = [
    "AXES",
    "CONTEXT",
    "MODEL",
    "SINGLE",
    "STACKED",
    "Layout",
    "Rule",
    "broadcast_to_workers",
    "by_name",
    "consensus_distance",
    "fsdp",
    "fuse_leaves",
    "largest_mesh",
    "make_mesh",
    "mean",
    "over_mesh",
    "over_workers",
    "own_keys",
    "pmax",
    "psum",
    "stream_key",
    "unshard",
    "vary",
    "weighted_sum",
    "worker_map_for",
    "worker_shapes",
]
