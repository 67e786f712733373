"""The types of the library: a worker's state, and the contracts of stages, mixers and compressors.

Shapes: D hubs, N workers per hub, K = D·N workers. A *stacked* leaf leads with the worker grid,
[D, N, ...]; a *single* leaf is [...], one for all workers. Inside a round a device holds its block
of the grid, [d, n, ...]. A *step* is one local update of every worker.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

Tree = Any  # a pytree of arrays
Leaf = Any  # an array, or its shape or sharding


class Memory(NamedTuple):
    """What a stage carries from one application to the next, by how it is placed."""

    stacked: Tree = ()  # one per worker, leaves [D, N, ...]
    single: Tree = ()  # one for all workers, leaves [...]


class RoundMemory(NamedTuple):
    """The memories of a method's two stages, trees of Memory."""

    inner: Tree
    outer: Tree


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: Tree  # stacked
    opt_state: Tree  # stacked: every worker has its own optimizer state
    model_state: Tree  # stacked: non-trainable state such as batch statistics; {} if there is none
    anchor: Tree  # single: the model that every worker can rebuild; () where unused
    memory: Any  # RoundMemory; a stage is given its own part and sees () here
    key: Leaf  # single: the root key, never advanced; see `parallel.keys.stream_key`
    step: Leaf  # single: int32 [], local steps taken


class Info(NamedTuple):
    """What a stage reports and never reads again."""

    worker: Tree = {}  # by name, leaves [times, D, N]
    common: Tree = {}  # by name, leaves [times]


class Context(NamedTuple):
    """What is fixed for a round besides its state; arguments of the program, never constants."""

    worker: Leaf  # int32 [D, N]: the worker's number, 0 … K − 1
    weight: Leaf  # float32 [D, N]: a_i, the worker's share of the average; sums to 1
    hub_share: Leaf  # float32 [D, N]: v_i, the worker's share of its hub; sums to 1 in each hub
    rate: Leaf  # float32 [D, N]: p_i, the probability of the worker's step; None if all are 1
    data: Tree  # single: the pool that index batches point into; () for batches of examples


class MessageBits(NamedTuple):
    """Bits of the messages that are sent: what papers count, whatever the mesh.

    Python ints, since a run sends more than an int32 holds.
    """

    workers: int = 0  # sent by one worker
    hubs: int = 0  # sent to other hubs by one hub, the one with most neighbours

    def plus(self, other: "MessageBits", times: int = 1) -> "MessageBits":
        """self + times · other."""
        return MessageBits(self.workers + times * other.workers, self.hubs + times * other.hubs)


class Collective(NamedTuple):
    """A collective operation between the devices of a mesh."""

    kind: str  # "all-reduce", "all-gather", "collective-permute", ... as XLA names it
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group lie
    dtype: str  # "float32", "uint8", ...
    nbytes: int  # of the result on one device
    times: int = 1


class Mixer(NamedTuple):
    """A linear average over workers: x_i becomes Σ_j x_j W_ji, where the columns of W sum to 1.

    - `average(tree, context)` takes leaves [d, n, ...] to leaves [d or 1, n or 1, ...] that
      broadcast against them: a size of 1 where the result does not depend on the axis.
    - `axes` are the mesh axes over which the result is common.
    - `message_bits(bits, layout)` counts the messages of one average whose payload has that many
      bits, and raises ConfigurationError where the mixer does not fit the layout.
    - `collectives(layout, mesh, gathered)` lists (kind, axes, copies) of the collectives by which a
      payload is averaged or gathered on a mesh of {axis: devices}; the result on one device holds
      that many copies of the payload.
    - `gather(tree, context)` gives the payloads of all senders, leaves [senders, d or 1, ...], and
      their weights [senders, d or 1], for payloads that cannot be averaged as they are.
    """

    average: Callable[[Tree, Context], Tree]
    axes: tuple[str, ...]
    message_bits: Callable[[int, Any], MessageBits]
    collectives: Callable[[Any, Mapping[str, int], bool], list[tuple[str, tuple[str, ...], int]]]
    gather: Callable[[Tree, Context], tuple[Tree, Leaf]] | None = None


class Message(NamedTuple):
    """One exchange between workers: what each of them sends, and the mixer that averages it."""

    mixer: Mixer
    payload: Tree  # shapes of what one worker sends, leaves [...]
    gathered: bool = False  # whether payloads are gathered, since they cannot be averaged
    times: int = 1


class SecondMessage(NamedTuple):
    """The second message of a compressor, which depends on the average of its first one."""

    settle: Callable[[Tree], Tree]  # averaged first payload -> known, what all workers make of it
    encode: Callable[[Tree, Tree, Leaf], Tree]  # (x, known, key) -> payload
    remember: Callable[[Tree, Tree, Leaf], Tree]  # (memory, averaged payload, key) -> memory


class Compressor(NamedTuple):
    """A lossy compressor C, whose payload is the arrays that cross the wire.

    All functions take one worker's tree, leaves [...]; `like` may be arrays or their shapes. The
    key is the same on all workers in one message; where the mask is not shared, `encode` is given a
    key of the worker's own. A compressor of two messages decodes {**known, **payload}.
    """

    name: str  # its spec string, as `compression.parse` reads it
    init: Callable[[Tree], Tree]  # like -> memory; ConfigurationError where no tensor fits
    encode: Callable[[Tree, Tree, Leaf], Tree]  # (x, memory, key) -> payload
    decode: Callable[..., Tree]  # (payload, key, onto, scale) -> onto + scale · C(x)
    # like -> δ: E‖C(x) − x‖² ≤ (1 − δ)‖x‖² for every x; of the first message if it has a memory
    delta: Callable[[Tree], float]
    ratio: float  # R as papers count it, without small tensors and indices
    averageable: bool  # the average of payloads is the payload of the average
    shared_mask: bool  # the key alone decides which entries are sent
    unbiased: bool  # E C(x) is x, each value times a positive factor: nothing is lost for good
    granularity: str  # what is compressed as one piece: "value", "chunk", "tensor" or "model"
    second: SecondMessage | None = None


class Stage(NamedTuple):
    """A piece of training: a pure function of (state, memory, batches, context).

    - `init(state)` gives the stage's memory, a tree of Memory.
    - `apply(state, memory, batches, context)` gives (state, memory, Info); batches lead with
      [steps, d, n].
    - `steps` is how many steps of batches one application consumes.
    - `communication(state, number=0)` lists the messages of the number-th application, counted from
      0, by the shapes of the state; the list repeats after `turns` applications.
    - `anchored`: whether the stage needs the anchor.
    - `alike`: the mesh axes along which workers take the same optimizer step, so that their
      optimizers must draw the same noise; None where the stage runs no optimizer of the workers.
    """

    init: Callable[[TrainState], Tree]
    apply: Callable[[TrainState, Tree, Tree, Context], tuple[TrainState, Tree, Info]]
    steps: int
    communication: Callable[..., list[Message]]
    anchored: bool = False
    turns: int = 1
    alike: tuple[str, ...] | None = None


class Period(NamedTuple):
    """When to synchronise: `length(step, remaining)` is H, the steps of the round that starts at a
    step, when `remaining` steps are left."""

    length: Callable[[int, int], int]
    description: str
    learning_rate: optax.ScalarOrSchedule | None = None  # η that the rule reads, if it reads any
    constant: bool = False  # whether H is the same at every step of a run, up to its last round


class Method(NamedTuple):
    """A training method: `inner` repeated until the period is over, then `outer`, on workers that
    run `optimizer`."""

    inner: Stage  # the smallest stage that repeats: a step, or τ steps and a hub average
    outer: Stage  # what ends a round; its steps, if it takes any, are the last of the round
    optimizer: optax.GradientTransformation
    period: Period
