"""The compiled round: a method, a layout of workers and a mesh made into one function."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlocal.communication import accounting
from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel import collectives
from jaxlocal.parallel import sharding as placing
from jaxlocal.parallel.layout import CONTEXT, MODEL, Layout
from jaxlocal.parallel.leaves import check_fits
from jaxlocal.parallel.mesh import local_rows, make_mesh, place, place_rows, wait_on_cpu_processes
from jaxlocal.parallel.own_mesh import usable_mesh
from jaxlocal.parallel.pool import check_indices, pool_size
from jaxlocal.stages.compose import NOTHING
from jaxlocal.training import checks
from jaxlocal.training.ahead import Ahead
from jaxlocal.training.bodies import DISTANCE
from jaxlocal.training.common_state import CommonState, full_shapes, models_of
from jaxlocal.training.known_states import KnownStates
from jaxlocal.training.pieces import Fed, Piece, Pieces
from jaxlocal.training.programs import Programs, concatenate, running
from jaxlocal.training.state import States
from jaxlocal.types import Collective, Info, Leaf, MessageBits, Method, TrainState, Tree


class RoundFn:
    """Compile the round of a method: `state, info = round_fn(state, batches)`.

    The leaves of batches are [H, hubs, workers_per_hub, ...], where H is what the method's period
    gives at the state's step; `length=H` chooses another one, such as that of the last round of a
    run. Of a constant period a round is one program, unless it is longer than `max_chunk` or its
    workers are sharded. Where H may change from round to round, rounds run in chunks of powers of
    four, so that all H up to H_max take at most ⌊log₄ H_max⌋ + 2 compilations. The state is
    donated: use the one that is returned. Where all workers have the same model at the end of a
    round, it holds that model once, as a `CommonState`, and a round of one program makes no others.

    Args:
      method: what the workers do, as `jaxlocal.local_sgd` and the others make it.
      layout: the workers, their weights and rates.
      mesh: of axes ('hubs', 'workers'), as `make_mesh` gives it; by default as many of the devices
        as the layout divides over. On a last axis 'model' every worker is sharded over several
        devices. A mesh may span processes (`jax.distributed`): each process then makes the same
        calls, with the same host arrays as batches, of which it moves the rows of its
        `local_workers`, or with `local_batches` of those rows alone.
      data: a pool of examples, a tree of arrays [examples, ...], held whole on every device.
        Batches are then integer indices into it, int32 [H, hubs, workers_per_hub, batch].
      max_chunk: the most steps that are dispatched at once; bounds the memory for batches.
      sharding: how a worker is sharded over 'model': a rule of `jaxlocal.sharding`; by default
        `fsdp`. The examples of its batch, dimension 3, are sharded too where they divide.

    Raises:
      ConfigurationError: the method, the layout and the mesh do not fit together.

    >>> import jax.numpy as jnp, jaxlocal, optax
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.25), period=4)
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> state = round_fn.init(jnp.zeros(()), jax.random.key(0))
    >>> state, info = round_fn(state, jnp.ones((4, 1, 2)))  # four steps, one hub, two workers
    >>> state.params, info.worker["loss"][:, 0, 0]
    (Array([[0.9375, 0.9375]], dtype=float32),
     Array([1. , 0.25 , 0.0625 , 0.015625], dtype=float32))
    """

    def __init__(
        self,
        method: Method,
        layout: Layout,
        mesh: Mesh | None = None,
        data: Tree = (),
        max_chunk: int = 1024,
        sharding: placing.Rule | None = None,
    ):
        checks.check_method(method, layout)
        self.method = method
        self.layout = layout
        self.mesh = make_mesh(layout) if mesh is None else usable_mesh(mesh, layout)
        rule = sharding or placing.fsdp(self.mesh.shape.get(MODEL, 1))
        self._states = States(method, layout, self.mesh, rule)
        self._known = KnownStates(self._states, layout, self.mesh)
        self.local_workers = local_rows(self.mesh, layout.shape)
        if not self.local_workers.size:
            raise ConfigurationError(
                f"process {jax.process_index()} has no device in the mesh of {self.mesh.size}"
            )
        self._examples = pool_size(data)
        self.context = place(layout.context(data), placing.named_shardings(self.mesh, CONTEXT))
        self._pieces = Pieces(method, max_chunk, whole=not placing.is_sharded(self.mesh))
        self._programs = Programs(method, self.mesh, self.context, self._states)

    def init(self, params: Tree, key: jax.Array, model_state: Tree = None) -> TrainState:
        """Make the state before the first step: every worker starts from the same parameters.

        Args:
          params: the parameters of one model, which stay the caller's.
          key: a typed root key, `jax.random.key(seed)`.
          model_state: the model state of one model, such as batch statistics; {} if there is none.

        Raises:
          ConfigurationError: there are no parameters, the key is not one, or the method does not
            fit the layout or the model.
        """
        checks.check_no_shapes((params, key, model_state))
        self.stage_bits(self.shapes(params, model_state))  # checks that the mixers fit the layout
        return self._states.init(params, key, model_state)

    def shapes(self, params: Tree, model_state: Tree = None) -> TrainState:
        """Shapes, dtypes and shardings of the state that `init` makes; parameters may be shapes."""
        checks.check_model(params, model_state)
        return self._known.add(self._states.shapes(params, model_state))

    def __call__(
        self, state: TrainState, batches: Tree, length: int | None = None
    ) -> tuple[TrainState, Info]:
        """Run one round: H steps and its end, which may take the last of the steps.

        Args:
          state: as `init` or the round before gave it; donated.
          batches: leaves [H, hubs, workers_per_hub, ...].
          length: H, where it is not what the period gives for a run without end: in the last round
            of a run, after the switch of `swap`, or by the caller's own choice. In a loop over
            `jaxlocal.training.schedule(method, steps)` give what it yields.

        Returns:
          The state after the round, and what the stages report: `info.worker["loss"]` is [H, hubs,
          workers_per_hub].

        Raises:
          ConfigurationError: the batches do not hold the H steps of the period, or of `length`; the
            state was donated before, or belongs to another round function.
        """
        steps = self._check_batches(batches)
        self.check(state, batches)
        checks.check_length(self.method, steps)
        self._check_length(state, steps, length)
        return self._dispatched(state, self._pieces.of(batches, steps, ends=True))

    def measured_round(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info, Leaf]:
        """Run one round of workers that are alike as one program, where `is_measured` says so;
        returns the consensus distance before its end, [1], too."""
        steps = self._check_batches(batches)
        self.check(state, batches)
        [(piece, *rest)] = self._pieces.of(batches, steps, ends=True)
        state, info = self._dispatched(state, [(piece._replace(measured=True), *rest)])
        return state, info, info.common.pop(DISTANCE)

    def is_measured(self, state: TrainState, steps: int) -> bool:
        """Whether `measured_round` can run a round of so many steps from this state."""
        alike = isinstance(state, CommonState) and self._states.common_leaves(state) is not None
        return alike and self._pieces.is_whole(steps)

    def local_steps(self, state: TrainState, batches: Tree) -> tuple[TrainState, Info]:
        """Run steps of a round without its end, any multiple of those of the inner stage."""
        steps = self._check_batches(batches)
        self.check(state, batches)
        return self._dispatched(state, self._pieces.of(batches, steps, ends=False))

    def end_round(self, state: TrainState, batches: Tree = ()) -> tuple[TrainState, Info]:
        """Run the end of a round; the batches are those of the steps that it takes, if any."""
        takes = self.method.outer.steps
        steps = checks.leading_size(batches, self.layout) if jax.tree.leaves(batches) else 0
        if steps != takes:
            raise ConfigurationError(
                f"the end of a round takes {takes} steps, got batches of {steps}"
            )
        if steps:
            self._check_batches(batches)
        self.check(state, batches)
        end = (Piece(0, True), batches if steps else (), steps)
        return self._dispatched(state, [end] if self.method.outer is not NOTHING else [])

    def check(self, state: TrainState, batches: Tree = ()) -> None:
        """Raise ConfigurationError where a state was donated or is not of this round function."""
        checks.check_no_shapes((state, batches))
        self._known.check(state)

    def check_models(self, state: TrainState) -> None:
        """Raise ConfigurationError where the models of a state cannot be read: for evaluations."""
        checks.check_no_shapes(state)
        self._known.check_models(state)

    def chunks(self, steps: int) -> Iterator[int]:
        """The sizes in which steps are dispatched: powers of four of inner stages, descending, or
        all at once where every round has as many."""
        return self._pieces.chunks(steps)

    def local_batches(self, batches: Tree) -> Tree:
        """Make global batches of host arrays [H, local_workers, ...], the rows of this process."""
        check_fits("batches", batches)
        return place_rows(batches, self.mesh, self.layout.shape, axis=1)

    def mean(self, state: TrainState) -> tuple[Tree, Tree]:
        """The average model u = Σ a_i x_i, and the average model state; leaves [...]."""
        self.check_models(state)
        return self._programs.measure(collectives.mean, models_of(state))

    def consensus_distance(self, state: TrainState) -> jax.Array:
        """The consensus distance √(Σ a_i ‖x_i − u‖²) of the workers' models now."""
        self.check_models(state)
        return self._programs.measure(collectives.consensus_distance, models_of(state)[0])

    def stage_bits(self, state: TrainState, number: int = 0) -> tuple[MessageBits, MessageBits]:
        """Bits sent in one inner stage, and at the end of the number-th round, counted from 0.

        The state may be given as its shapes.
        """
        inner, outer, state = self.method.inner, self.method.outer, full_shapes(state)
        messages = inner.communication(state), outer.communication(state, number)
        return (
            accounting.message_bits(messages[0], self.layout),
            accounting.message_bits(messages[1], self.layout),
        )

    def message_bits(self, state: TrainState, steps: int, rounds: int) -> MessageBits:
        """Bits that one worker and one hub send in some steps, in which `rounds` rounds end.

        The state may be given as its shapes.
        """
        inner, outer = self.method.inner, self.method.outer
        times, turns = (steps - rounds * outer.steps) // inner.steps, outer.turns
        total = MessageBits().plus(self.stage_bits(state)[0], times)
        for turn in range(min(turns, rounds)):
            total = total.plus(self.stage_bits(state, turn)[1], len(range(turn, rounds, turns)))
        return total

    def collectives(self, state: TrainState, steps: int, number: int = 0) -> list[Collective]:
        """The collectives between devices in the number-th round, of `steps` steps.

        The state may be given as its shapes.
        """
        inner, outer, state = self.method.inner, self.method.outer, full_shapes(state)
        times = (steps - outer.steps) // inner.steps
        messages = [m._replace(times=m.times * times) for m in inner.communication(state)]
        messages += outer.communication(state, number)
        return accounting.collectives(messages, self.layout, self.mesh.shape)

    def lower(self, state: TrainState, batches: Tree) -> list[tuple[int, Any]]:
        """Lower the programs of a round without compiling them, each with how often it runs.

        Args:
          state, batches: of one round, or their shapes.

        Returns:
          (times, lowered) pairs; `lowered` is what `jax.jit(f).lower` gives.
        """
        self._known.check(state)
        steps = self._check_batches(batches)
        checks.check_length(self.method, steps)
        pieces = [(piece, own) for piece, _, own in self._pieces.of((), steps, ends=True)]
        return [
            (times, self._programs.lower(piece, state, batches if own else (), own))
            for (piece, own), times in Counter(pieces).items()
        ]

    def compile_ahead(
        self, state: TrainState, batches: Tree, steps: int, ends: bool, ahead: Ahead
    ) -> None:
        """Compile the programs of `local_steps`, of `end_round` where `steps` is 0, or of
        `measured_round`, in threads, before the call.

        Args:
          state, batches: of the call, or their shapes; batches of any number of steps.
          steps: of the call; 0 for those of the end of a round, which are known.
          ends: whether the round ends.
          ahead: the threads.
        """
        outer, programs, measured = self.method.outer, self._programs, bool(steps and ends)
        pieces: list[tuple[Piece, int]] = []
        if steps:
            pieces = [(piece, own) for piece, _, own in self._pieces.of((), steps, ends)]
        elif ends and outer is not NOTHING:
            pieces, state = [(Piece(0, True), outer.steps)], full_shapes(state)
        with running(self.mesh, state):
            for piece, own in pieces:
                piece = piece._replace(measured=measured)
                programs.compile_ahead(piece, state, batches if own else (), own, ahead)
                state = state if measured else full_shapes(state)
            if not measured:
                distance = collectives.consensus_distance
                programs.measure_ahead(distance, models_of(full_shapes(state))[0], ahead)

    def _dispatched(self, state: TrainState, pieces: Iterable[Fed]) -> tuple[TrainState, Info]:
        infos = []
        for piece, batches, steps in pieces:
            program, placed = self._programs.get(piece, state), self._programs.place(batches)
            with running(self.mesh, state):
                done = program(state, placed, self.context)
            self._known.follow(state, done[0], steps)
            state, info = wait_on_cpu_processes(self.mesh, done)
            infos.append(info)
        return state, concatenate(infos)

    def _check_length(self, state: TrainState, steps: int, length: int | None) -> None:
        if length is not None:
            checks.check_given_length(length, steps)
        elif self.method.outer is not NOTHING:  # else a round may end anywhere
            constant = self.method.period.constant
            checks.check_period(
                self.method, steps, None if constant else self._known.step_of(state)
            )

    def _check_batches(self, batches: Tree) -> int:
        """The steps of batches that fit the layout, the inner stage and the pool."""
        steps = checks.steps_of(batches, self.method, self.layout)
        if self._examples is not None:
            check_indices(batches, self._examples)
        return steps
