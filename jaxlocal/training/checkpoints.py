"""Checkpoints, by which a run goes on as if it had never stopped, and the model that it leaves.

All that a run is lies in its TrainState: parameters, optimizer and model states of every worker,
memories of the stages, the anchor, the root key, the step. Rounds, messages and the order of the
data follow from the step. Orbax writes checkpoints in the background, whole or not at all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.sharding import path_name
from jaxlocal.types import TrainState, Tree


class SavingError(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


class Checkpoints:
    """The newest states of a run, in a folder with a subfolder for each step.

    Args:
      folder: made where it is missing.
      keep: how many of the newest stay.

    Raises:
      ConfigurationError: a folder that cannot be made, fewer than one to keep.

    >>> import jaxlocal, optax, tempfile
    >>> grad_fn = jaxlocal.gradients(lambda w, batch, key: (w - batch) ** 2)
    >>> method = jaxlocal.local_sgd(grad_fn, optax.sgd(0.1))
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

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ConfigurationError(f"at least 1 checkpoint must be kept, got {keep}")
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # Where a folder cannot be made in the background, Orbax waits for it for five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handlers = {
                "state": ocp.StandardCheckpointHandler(),
                "notes": ocp.JsonCheckpointHandler(),
            }
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise ConfigurationError(
                f"checkpoints cannot be kept in {self.folder}: {error.strerror}"
            ) from None
        self._args = ocp.args

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None and jax.process_count() > 1:
            return  # to close is to wait for the other processes, who know of no error
        try:
            self._guarded(self._manager.close)
        except SavingError:
            if error is None:  # else what is under way already tells more
                raise

    @property
    def steps(self) -> list[int]:
        """Of which steps there are checkpoints, the newest last."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, notes: Mapping[str, Any] | None = None) -> None:
        """Save a state and notes, which JSON can hold. Returns when the state may be donated; the
        rest goes on in the background, and what fails there is raised by the next call or `wait`.

        Raises:
          ConfigurationError: there is a checkpoint of this step already.
          SavingError: this checkpoint or the one before it could not be written.
        """
        if int(state.step) in self.steps:
            raise ConfigurationError(
                f"there is a checkpoint of step {int(state.step)} in {self.folder} already"
            )
        arguments = self._args.Composite(
            state=self._args.StandardSave(state), notes=self._args.JsonSave(dict(notes or {}))
        )
        self._guarded(lambda: self._manager.save(int(state.step), args=arguments, force=True))

    def wait(self) -> None:
        """Until all is on disk.

        Raises:
          SavingError: it could not be written.
        """
        self._guarded(self._manager.wait_until_finished)

    def restore(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state and its notes.

        Args:
          shapes: as `RoundFn.shapes` gives them, with the shardings of this run's devices, which
            may be others than those of the run that saved.

        Raises:
          ConfigurationError: there is none; it is damaged; it is that of another run.
        """
        if not self.steps:
            raise ConfigurationError(f"there is no checkpoint in {self.folder}")
        step = self.steps[-1]
        arguments = self._args.Composite(
            state=self._args.StandardRestore(shapes), notes=self._args.JsonRestore()
        )
        self._check_shapes(step, shapes)
        try:
            restored = self._manager.restore(step, args=arguments)
            return restored.state, dict(restored.notes)
        except Exception as error:  # Orbax and TensorStore raise kinds of their own
            raise self._damaged(step, error) from error

    def _check_shapes(self, step: int, shapes: TrainState) -> None:
        try:
            metadata = self._manager.item_metadata(step).state
            saved = _described(metadata.tree if hasattr(metadata, "tree") else metadata)
        except Exception as error:
            raise self._damaged(step, error) from error
        wanted = _described(shapes)
        names = (saved.keys() | wanted.keys()) - {"key"}  # a typed key has data of its own
        for name in sorted(names):
            if saved.get(name) != wanted.get(name):
                its, ours = saved.get(name, "nothing"), wanted.get(name, "nothing")
                raise ConfigurationError(
                    f"the checkpoint {self.folder / str(step)} is that of another run: it has "
                    f"{its} for {name}, this run {ours}"
                )

    def _damaged(self, step: int, error: Exception) -> ConfigurationError:
        older = [t for t in self.steps if t < step]
        then = f"to go on from step {older[-1]}" if older else "to start anew"
        return ConfigurationError(
            f"the checkpoint {self.folder / str(step)} cannot be read ({_cause(error)}); delete "
            f"that folder {then}"
        )

    def _guarded(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            left = f"; that of step {self.steps[-1]} is whole" if self.steps else ""
            raise SavingError(
                f"a checkpoint could not be written to {self.folder} ({_cause(error)}){left}"
            ) from error


def _cause(error: BaseException) -> str:
    """What an error says at its root, on one line: the end of it, where TensorStore names it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0]
    return ("…" + text[-160:] if len(text) > 160 else text) or type(error).__name__


def _described(tree: Tree) -> dict[str, str]:
    """Shape and dtype of every leaf by its path."""
    return {
        path_name(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(x, "shape") and not _is_key(x.dtype)
    }


def _whole(x: Any) -> np.ndarray:
    """The array on the host, where it may be split over devices of several processes."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _is_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def export(folder: str | Path, params: Tree, model_state: Tree) -> list[Path]:
    """Write one model for use elsewhere; returns what was written. Of several processes all call
    this, with the same.

    `model`: an Orbax checkpoint {"params": ..., "model_state": ...}, which Flax programs restore
    by `orbax.checkpoint.StandardCheckpointer().restore(folder / "model")`. `model.safetensors`:
    the same arrays by names such as "params/first/kernel". What was there before is replaced.
    """
    import orbax.checkpoint as ocp
    from safetensors.flax import save_file

    folder = Path(folder).absolute()
    tree = {"params": params, "model_state": model_state}
    arrays = {
        path_name(path): jax.numpy.asarray(_whole(x))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    checkpoint, single = folder / "model", folder / "model.safetensors"
    part = single.with_name(single.name + ".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            save_file(arrays, part)
            part.replace(single)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(checkpoint, tree, force=True)
    except Exception as error:
        raise SavingError(
            f"the model could not be written to {folder} ({_cause(error)})"
        ) from error
    return [checkpoint, single]
