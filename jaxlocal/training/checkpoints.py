"""Save and resume runs by checkpoints, and export the trained model.

The TrainState is all that a checkpoint needs: parameters, optimizer and model state of every
worker, memories of the stages, the anchor, the root key and the step. Rounds, messages and the
order of the data follow from the step, so a resumed run has the same bits as one that was not
stopped. Orbax writes a checkpoint in the background, completely or not at all. A manifest of
digests is saved with it, so that a damaged checkpoint is never taken for a good one.
"""

import gc
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import is_key
from jaxlocal.training.common_state import CommonState, as_saved, held
from jaxlocal.training.disk import (
    SavingError,
    advice,
    agreed,
    cause,
    free_path,
    local_folder,
    of_machine,
    quietly,
    remove_unfinished,
    require,
)
from jaxlocal.training.export import export
from jaxlocal.training.known_states import check_not_donated
from jaxlocal.training.manifest import (
    Manifest,
    changed,
    check_read,
    check_whole,
    difference,
    exact,
    manifest_of,
)
from jaxlocal.training.names import named_leaves
from jaxlocal.types import TrainState

__all__ = ["Checkpoints", "SavingError", "export"]


class Checkpoints:
    """Save and restore the newest states of a run, in a folder with a subfolder for each step.

    Use it as a context manager, which waits for the writes at its end.

    Args:
      folder: the folder; it is created if it is missing.
      keep: number of newest checkpoints to keep, 1 or more.

    Raises:
      ConfigurationError: the folder cannot be created, or `keep` is less than 1.

    >>> import jaxlocal, numpy as np, optax, tempfile
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1), period=5)
    >>> round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=2))
    >>> state = round_fn.init(np.float32(0), jax.random.key(0))
    >>> state, _ = round_fn(state, np.ones((5, 1, 2), np.float32))
    >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(state, {"best": 0.5})
    ...     checkpoints.wait()
    ...     restored, notes = checkpoints.restore(round_fn.shapes(np.float32(0)))
    >>> int(restored.step), notes
    (5, {'best': 0.5})
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigurationError(f"at least 1 checkpoint must be kept, got {keep}")
        require("orbax", "checkpoints")
        import orbax.checkpoint as ocp

        self.folder = local_folder(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=False,  # who only reads would remove what another saves
            enable_async_checkpointing=True,
            # If a folder cannot be created in the background, Orbax waits for it for five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._state, self._json = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
            handlers = {
                "state": ocp.StandardCheckpointHandler(),
                "notes": ocp.JsonCheckpointHandler(),
                "manifest": ocp.JsonCheckpointHandler(),
            }
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except Exception as error:  # also what Orbax raises at a file that it cannot parse
            why = getattr(error, "strerror", None) or cause(error)
            raise ConfigurationError(
                f"checkpoints cannot be kept in {self.folder}: {why}"
            ) from None
        self._args, self._has_saved = ocp.args, False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None and jax.process_count() > 1:
            return  # closing would wait for the other processes, which have no error
        try:
            self._guarded(self._manager.close)
        except SavingError:
            if error is None:  # an error of the caller is more informative
                raise

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints in the folder, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, notes: Mapping[str, Any] | None = None) -> None:
        """Save a state in the background.

        It returns when the state may be donated. The next `save`, `wait` or the end of the context
        raises an error that occurs in the background.

        Args:
          state: the state.
          notes: values to save with it, which JSON can hold.

        Raises:
          ConfigurationError: there is a checkpoint of this step already, the state was donated, or
            a leaf or a note cannot be saved so that the same is restored.
          SavingError: this checkpoint or the one before it could not be written.
        """
        check_not_donated(state)
        if int(state.step) in self.steps:
            raise ConfigurationError(
                f"there is a checkpoint of step {int(state.step)} in {self.folder} already"
            )
        _check_kinds(state)
        kept = exact(dict(notes or {}))
        self._guarded(lambda: self._save(state, kept))

    def _save(self, state: TrainState, notes: dict[str, Any]) -> None:
        if not self._has_saved:
            remove_unfinished(self.folder)
            self._has_saved = True
        arguments = self._args.Composite(
            state=self._args.StandardSave(_without_empty(held(state))),
            notes=self._args.JsonSave(notes),
            manifest=self._args.JsonSave(manifest_of(state, notes)),
        )
        self._manager.save(int(state.step), args=arguments, force=True)

    def wait(self) -> None:
        """Wait until all checkpoints are on disk.

        Raises:
          SavingError: a checkpoint could not be written.
        """
        self._guarded(self._manager.wait_until_finished)

    def restore(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest checkpoint that is what was saved.

        A newer one that is damaged, whatever byte or file of it, is set aside with a warning: its
        folder is renamed, and nothing of it is deleted.

        Args:
          shapes: the shapes of the state, as `RoundFn.shapes` gives them. They hold the shardings
            of this run's devices, which may differ from those of the run that saved.

        Returns:
          (state, notes).

        Raises:
          ConfigurationError: there is no checkpoint, all of them are damaged, or the newest one
            that is not belongs to another run, or cannot be read with this user's permissions or
            this machine's memory.
        """
        self.wait()
        self._manager.reload()
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            restored, problem = self._read(step, shapes)
            if restored:
                self._set_aside(damaged, step)
                return restored
            damaged[step] = problem
        if not damaged:
            raise ConfigurationError(f"there is no checkpoint in {self.folder}")
        newest = max(damaged)
        raise ConfigurationError(
            f"no checkpoint in {self.folder} can be used; the newest, {newest}, is damaged "
            f"({damaged[newest]}); delete {self.folder} to start again"
        )

    def _read(
        self, step: int, shapes: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """A state and its notes, or on all processes None and what is wrong with them."""
        folder, problem, here = self.folder / str(step), "", ""
        with quietly():
            try:
                manifest, notes, state = self._items(folder, step, shapes)
            except ConfigurationError:
                raise
            except Exception as error:  # Orbax and TensorStore raise their own classes
                problem = cause(error)
                here = problem if of_machine(error) else ""
            if problem:
                gc.collect()  # what is left of the tasks that read
        if here := agreed(here):
            raise ConfigurationError(
                f"the checkpoint {folder} cannot be read here ({here}); it is left as it is"
            )
        if problem := agreed(problem) or changed(manifest, state):
            return None, problem
        return (state, notes), ""

    def _items(
        self, folder: Path, step: int, shapes: TrainState
    ) -> tuple[Manifest, dict[str, Any], TrainState]:
        check_whole(folder)
        manifest, notes = (self._json.restore(folder / item) for item in ("manifest", "notes"))
        check_read(manifest, notes, step)
        shapes = as_saved(shapes, manifest["leaves"])
        _check_same(folder, manifest, shapes)
        return manifest, notes, self._read_state(folder / "state", shapes)

    def _read_state(self, folder: Path, shapes: TrainState) -> TrainState:
        like = held(shapes)
        arguments = self._args.StandardRestore(_without_empty(like))
        state = self._state.restore(folder, args=arguments)
        empty = lambda like: jnp.empty(like.shape, like.dtype, device=like.sharding)
        state = jax.tree.map(lambda like, x: x if like.size else empty(like), like, state)
        return CommonState(state, shapes.grid) if isinstance(shapes, CommonState) else state

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        """Rename the folders of damaged checkpoints, so that they are not counted any more."""
        for step, problem in damaged.items():
            folder, failed = self.folder / str(step), ""
            aside = free_path(folder.with_name(f"{step}.damaged"))
            if jax.process_index() == 0:
                try:
                    folder.rename(aside)
                except OSError as error:
                    failed = cause(error)
            if failed := agreed(failed):
                raise ConfigurationError(
                    f"the checkpoint {folder} is damaged ({problem}) and cannot be renamed to "
                    f"{aside.name} ({failed})"
                )
            if jax.process_index() == 0:
                warnings.warn(
                    f"the checkpoint {folder} is damaged ({problem}): it is kept as {aside.name}, "
                    f"and the run resumes from step {good}",
                    stacklevel=3,
                )
        self._manager.reload()

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            there = [step for step in self.steps if (self.folder / str(step)).exists()]
            left = f"; that of step {there[-1]} is intact" if there else ""
            raise SavingError(
                f"a checkpoint could not be written to {self.folder} ({cause(error)}){left}"
                f"{advice(error)}"
            ) from error


def _check_same(folder: Path, manifest: Manifest, shapes: TrainState) -> None:
    if other := difference(manifest, shapes):
        raise ConfigurationError(f"the checkpoint {folder} belongs to another run: {other}")


def _check_kinds(state: TrainState) -> None:
    """Refuse leaves that would be lost, or of types that TensorStore does not know."""
    import tensorstore

    for name, x in named_leaves(state).items():
        try:
            if not is_key(x):
                tensorstore.dtype(str(x.dtype))
        except ValueError:
            raise ConfigurationError(
                f"{name} has the dtype {x.dtype}, which a checkpoint cannot hold"
            ) from None


def _without_empty(tree: TrainState) -> TrainState:
    """The tree without arrays of size zero, which Orbax does not write."""
    return jax.tree.map(lambda x: x if x.size else (), tree)
