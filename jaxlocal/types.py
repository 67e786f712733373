"""The words of the library: a worker's state, and the contracts of stages, mixers and rounds.

Shapes: D hubs, N workers a hub, K = D·N workers. A *stacked* leaf leads with the worker grid,
[D, N, ...]; a *single* leaf is [...], one for all. Inside a round a device holds its block of the
grid, [d, n, ...]. A *tick* is one local step of every worker.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

Tree = Any  # a pytree of arrays
Leaf = Any  # an array; in a tree of shapes or of shardings, what stands for one


class Memory(NamedTuple):
    """What a stage keeps from one application to the next; the field says how it is placed."""

    stacked: Tree = ()  # one per worker, leaves [D, N, ...]
    single: Tree = ()  # one for all, leaves [...]


class TrainState(NamedTuple):
    """All that a run carries from tick to tick."""

    params: Tree  # stacked
    opt_state: Tree  # stacked: every worker has an optimizer of its own
    model_state: Tree  # stacked: e.g. batch statistics; {} if none
    anchor: Tree  # single: the model that every worker can rebuild; () where unused
    memory: Tree  # of Memory: a stage is handed its own part and sees () here
    key: Leaf  # single: the root key, never advanced; see `workers.stream`
    tick: Leaf  # single: int32 [], local steps taken


class Info(NamedTuple):
    """What a stage reports and never reads again."""

    worker: Tree = {}  # by name, leaves [times, D, N]
    common: Tree = {}  # by name, leaves [times]


class World(NamedTuple):
    """What a round is told besides its state; arguments of the program, never constants in it."""

    worker: Leaf  # int32 [D, N]: the worker's number, 0 … K − 1
    weight: Leaf  # float32 [D, N]: a_i, its share of the whole; sums to 1
    hub_share: Leaf  # float32 [D, N]: v_i, its share of its hub; sums to 1 in each hub
    rate: Leaf  # float32 [D, N]: p_i, the probability of its step at a tick; None if all are 1
    data: Tree  # single: examples that index batches point into; () for batches of examples


class Messages(NamedTuple):
    """Bits said: what papers count, whatever the mesh.

    Python ints, since a run says more than an int32 holds.
    """

    workers: int = 0  # sent by one worker
    hubs: int = 0  # sent to other hubs by one hub, the one with most neighbours

    def plus(self, other: "Messages", times: int = 1) -> "Messages":
        """self + times · other."""
        return Messages(self.workers + times * other.workers, self.hubs + times * other.hubs)


class Collective(NamedTuple):
    """A collective operation between devices, of which each takes part in one like it."""

    kind: str  # "all-reduce", "all-gather", "collective-permute", ... as XLA names it
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group lie
    dtype: str  # "float32", "uint8", ...
    nbytes: int  # of the result on one device
    times: int = 1


class Mixer(NamedTuple):
    """A linear average over workers: every leaf x_i becomes Σ_j x_j W_ji, with W's columns summing
    to 1.

    `average(tree, world)` takes leaves [d, n, ...] to leaves [d or 1, n or 1, ...] that broadcast
    against them: a size of 1 where the result does not depend on the axis. `axes` are the mesh axes
    over which the result is common. `messages(bits, layout)` says what one average of a message of
    so many bits costs, and raises ConfigurationError where the mixer does not fit the layout.
    `collectives(layout, mesh, gathered)` lists (kind, axes, copies) of those by which a message is
    averaged or gathered on a mesh of {axis: devices}; the result on one device holds so many copies
    of it. `gather(tree, world)` gives what the senders hold, leaves [senders, d or 1, ...], and
    their weights [senders, d or 1], for messages that cannot be averaged as they are.
    """

    average: Callable[[Tree, World], Tree]
    axes: tuple[str, ...]
    messages: Callable[[int, Any], Messages]
    collectives: Callable[[Any, Mapping[str, int], bool], list[tuple[str, tuple[str, ...], int]]]
    gather: Callable[[Tree, World], tuple[Tree, Leaf]] | None = None


class Said(NamedTuple):
    """One exchange between workers: what each of them says, and who hears it."""

    mixer: Mixer
    payload: Tree  # shapes of what one worker says, leaves [...]
    gathered: bool = False  # whether payloads are gathered, which cannot be averaged as they are
    times: int = 1


class SecondMessage(NamedTuple):
    """What a worker says when it has heard the average of the first message."""

    settle: Callable[[Tree], Tree]  # heard -> known, what everyone makes of the average
    encode: Callable[[Tree, Tree, Leaf], Tree]  # (x, known, key) -> payload
    remember: Callable[[Tree, Tree, Leaf], Tree]  # (memory, averaged payload, key) -> memory


class Compressor(NamedTuple):
    """A lossy message C(x), as the arrays that cross the wire.

    All functions are of one worker's tree, leaves [...]; `like` may be arrays or their shapes. The
    key is the same on all workers at one message; where the mask is not shared, `encode` is given
    a key of the worker's own. A compressor of two messages decodes {**known, **payload}.
    """

    name: str  # as `compression.parse` reads it
    init: Callable[[Tree], Tree]  # like -> memory; ConfigurationError where nothing of it fits
    encode: Callable[[Tree, Tree, Leaf], Tree]  # (x, memory, key) -> payload
    decode: Callable[..., Tree]  # (payload, key, onto, scale) -> onto + scale · C(x)
    # like -> δ: E‖C(x) − x‖² ≤ (1 − δ)‖x‖² for every x; of a first message if it keeps a memory
    delta: Callable[[Tree], float]
    ratio: float  # R as papers count it, small tensors and indices left out
    averageable: bool  # the average of payloads is the payload of the average
    shared_mask: bool  # the key alone says what is kept
    unbiased: bool  # E C(x) is x, each value times a positive factor: nothing is lost for good
    granularity: str  # what is compressed by itself: "value", "chunk", "tensor" or "model"
    second: SecondMessage | None = None


class Stage(NamedTuple):
    """A piece of training: a pure function of (state, memory, batches, world), and what has to be
    known of it.

    `init(state)` gives its memory, a tree of Memory. `apply(state, memory, batches, world)` gives
    (state, memory, Info); the batches lead with [ticks, d, n]. `says(state, number)` lists what is
    said in its number-th apply, counted from 0, by the state's shapes, and again after `turns`
    applies; the ledger counts messages and bytes from it.
    """

    init: Callable[[TrainState], Tree]
    apply: Callable[[TrainState, Tree, Tree, World], tuple[TrainState, Tree, Info]]
    ticks: int  # how many ticks of batches one apply consumes
    says: Callable[..., list[Said]]
    anchored: bool = False  # whether it needs the anchor
    turns: int = 1


class Period(NamedTuple):
    """When to synchronise: `length(tick, remaining)` is H, the ticks of the round that starts at
    a tick."""

    length: Callable[[int, int], int]
    description: str


class Rounds(NamedTuple):
    """What a method is: `inner` repeated until the period is over, then `outer`, on workers that
    run `optimizer`."""

    inner: Stage  # the smallest part that repeats: a tick, or τ ticks and a hub average
    outer: Stage  # what ends a round; its ticks, if it takes any, are the last of the round
    optimizer: optax.GradientTransformation
    period: Period
