"""Which states a round function takes, and what the host knows of them without a device."""

from typing import Any

import jax
from jax.sharding import Mesh

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.collectives import worker_shapes
from jaxlocal.parallel.layout import Layout
from jaxlocal.parallel.leaves import check_same, is_key, path_name
from jaxlocal.training.checks import check_model
from jaxlocal.training.common_state import CommonState, full_shapes, held
from jaxlocal.training.state import States
from jaxlocal.types import TrainState, Tree


class KnownStates:
    """The states of one round function: their form, their devices, and the step of the newest."""

    def __init__(self, states: States, layout: Layout, mesh: Mesh) -> None:
        self._states, self._layout = states, layout
        self._devices = set(mesh.devices.flat)
        self._forms: set[Any] = set()
        self._placements: set[Any] = {None}
        self._newest: tuple[Any, int] = (None, 0)

    def add(self, shapes: TrainState) -> TrainState:
        """Take states of these shapes from now on."""
        self._forms.add(_form(*jax.tree.flatten(shapes)))
        return shapes

    def check(self, state: TrainState) -> None:
        """Raise ConfigurationError where a state is not one of this round function's.

        A form is compared once: what is left for every call is to look it up.
        """
        _check_type(state)
        leaves, structure = jax.tree.flatten(state)
        _check_usable(leaves)
        _check_distinct(leaves, state)
        self._check_devices(state)
        form = _form(leaves, structure)
        if form not in self._forms:
            self._check_grids(state)
            like, given = full_shapes(self._like(state)), full_shapes(state)
            check_same("this state", "one of this method", like, given, False)
            self._forms.add(form)

    def check_models(self, state: TrainState) -> None:
        """Raise ConfigurationError where the models of a state cannot be read here.

        Only its parameters and model state are looked at.
        """
        _check_type(state)
        models = held(state)
        _check_usable(jax.tree.leaves((models.params, models.model_state)))
        self._check_devices(state)
        self._check_grids(state)

    def step_of(self, state: TrainState) -> int | None:
        """The state's step; a device is asked for it only where the state is not the newest.

        None inside `jax.jit`.
        """
        if isinstance(state.step, jax.core.Tracer):
            return None
        if self._newest[0] is not state.step:
            self._newest = state.step, int(state.step)
        return self._newest[1]

    def follow(self, before: TrainState, after: TrainState, steps: int) -> None:
        """Know the step of the state after some steps where it is known before them."""
        step, number = self._newest
        if step is before.step and not isinstance(after.step, jax.core.Tracer):
            self._newest = after.step, number + steps

    def _like(self, state: TrainState) -> TrainState:
        """The shapes of this round function's state of the same model, with keys of any kind."""
        models = held(state)
        check_model(models.params, models.model_state)
        shapes = self._states.shapes(*worker_shapes((models.params, models.model_state)))
        any_kind = is_key(state.key) and not state.key.shape
        return shapes._replace(key=state.key) if any_kind else shapes

    def _check_grids(self, state: TrainState) -> None:
        state = full_shapes(state)
        for part in ("params", "model_state"):
            for path, x in jax.tree_util.tree_leaves_with_path(getattr(state, part)):
                if (shape := getattr(x, "shape", ()))[:2] != self._layout.shape:
                    raise ConfigurationError(
                        f"{'/'.join(filter(None, (part, path_name(path))))} of this state has "
                        f"shape {shape}, and {self._layout.hubs} hubs of "
                        f"{self._layout.workers_per_hub} workers need {self._layout.shape} in "
                        f"front: it is a state of another layout"
                    )

    def _check_devices(self, state: TrainState) -> None:
        placement: Any = getattr(state.step, "sharding", None)  # None inside jax.jit
        if placement in self._placements or not getattr(state.step, "committed", False):
            return
        if placement.device_set != self._devices:
            shapes = "round_fn.shapes(params)"
            if not isinstance(state, CommonState):
                shapes = f"jaxlocal.types.TrainState(*{shapes})"
            raise ConfigurationError(
                f"this state lies on {_names(placement.device_set)}, and the mesh of this round "
                f"function has {_names(self._devices)}; move it by jax.device_put(state, "
                f"jax.tree.map(lambda x: x.sharding, {shapes}))"
            )
        self._placements.add(placement)


def _check_type(state: Any) -> None:
    if not isinstance(state, TrainState):
        raise ConfigurationError(
            f"a round function takes the TrainState that its init makes, got {type(state).__name__}"
        )


def check_not_donated(tree: Tree) -> None:
    """Raise ConfigurationError where arrays were donated: using them may end the process."""
    _check_usable(jax.tree.leaves(tree))


def _check_usable(leaves: list[Any]) -> None:
    if any(x.is_deleted() for x in _on_devices(leaves)):
        raise ConfigurationError(
            "this state was given to the round function before, which donates it: use the state "
            "that it returned"
        )


def _check_distinct(leaves: list[Any], state: TrainState) -> None:
    """Raise ConfigurationError where two leaves are one array: donating it twice may end the
    process."""
    arrays = _on_devices(leaves)
    if len(set(map(id, arrays))) == len(arrays):
        return
    first: dict[int, str] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = path_name(path)
        if _can_be_deleted(type(x)) and first.setdefault(id(x), name) != name:
            raise ConfigurationError(
                f"{first[id(x)]} and {name} of this state are one array, which a round cannot "
                f"donate twice: make one of them a copy, by jax.numpy.copy"
            )


def _on_devices(leaves: list[Any]) -> list[Any]:
    """The leaves that are arrays of JAX, and no tracers."""
    kinds = {kind for kind in set(map(type, leaves)) if _can_be_deleted(kind)}
    return [x for x in leaves if type(x) in kinds]


def _can_be_deleted(kind: type) -> bool:
    return hasattr(kind, "is_deleted") and not issubclass(kind, jax.core.Tracer)


def _form(leaves: list[Any], structure: Any) -> tuple[Any, ...]:
    """What is looked up of every state; the last leaves are the key and the step."""
    types = [getattr(x, "dtype", None) for x in leaves[-2:]]
    return structure, *types, tuple([getattr(x, "shape", ()) for x in leaves])


def _names(devices: set[jax.Device]) -> str:
    some = sorted(devices, key=lambda device: device.id)
    return ", ".join(map(str, some[:4])) + (f" and {len(some) - 4} more" if some[4:] else "")
