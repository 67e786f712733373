"""Save and resume runs by checkpoints, and export the trained model.

The TrainState is all that a checkpoint needs: parameters, optimizer and model state of every
worker, memories of the stages, the anchor, the root key and the step. Rounds, messages and the
order of the data follow from the step, so a resumed run has the same bits as one that was not
stopped. Orbax writes a checkpoint in the background, completely or not at all.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.sharding import path_name
from jaxlocal.types import TrainState, Tree


class SavingError(RuntimeError):
    """A checkpoint or a model could not be written; earlier checkpoints are intact."""


class Checkpoints:
    """Save and restore the newest states of a run, in a folder with a subfolder for each step.

    Use it as a context manager, which waits for the writes at its end.

    Args:
      folder: the folder; it is created if it is missing.
      keep: number of newest checkpoints to keep, 1 or more.

    Raises:
      ConfigurationError: the folder cannot be created, or `keep` is less than 1.

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

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigurationError(f"at least 1 checkpoint must be kept, got {keep}")
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # If a folder cannot be created in the background, Orbax waits for it for five minutes.
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
        """Wait until all checkpoints are on disk.

        Raises:
          SavingError: a checkpoint could not be written.
        """
        self._guarded(self._manager.wait_until_finished)

    def restore(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest checkpoint.

        Args:
          shapes: the shapes of the state, as `RoundFn.shapes` gives them. They hold the shardings
            of this run's devices, which may differ from those of the run that saved.

        Returns:
          (state, notes).

        Raises:
          ConfigurationError: there is no checkpoint, or the newest one is damaged or belongs to
            another run.
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
        except Exception as error:  # Orbax and TensorStore raise their own classes
            raise self._damaged(step, error) from error

    def _check_shapes(self, step: int, shapes: TrainState) -> None:
        try:
            metadata = self._manager.item_metadata(step).state
            saved = _described(metadata.tree if hasattr(metadata, "tree") else metadata)
        except Exception as error:
            raise self._damaged(step, error) from error
        wanted = _described(shapes)
        names = (saved.keys() | wanted.keys()) - {"key"}  # Orbax saves a typed key in its own form
        for name in sorted(names):
            if saved.get(name) != wanted.get(name):
                in_file, in_run = saved.get(name, "nothing"), wanted.get(name, "nothing")
                raise ConfigurationError(
                    f"the checkpoint {self.folder / str(step)} belongs to another run: it has "
                    f"{in_file} for {name}, this run {in_run}"
                )

    def _damaged(self, step: int, error: Exception) -> ConfigurationError:
        older = [t for t in self.steps if t < step]
        then = f"resume from step {older[-1]}" if older else "start again"
        return ConfigurationError(
            f"the checkpoint {self.folder / str(step)} cannot be read ({_cause(error)}); delete "
            f"that folder to {then}"
        )

    def _guarded(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            left = f"; that of step {self.steps[-1]} is intact" if self.steps else ""
            raise SavingError(
                f"a checkpoint could not be written to {self.folder} ({_cause(error)}){left}"
            ) from error


def _cause(error: BaseException) -> str:
    """The root cause of an error in one line; of a long text, the end, where TensorStore has it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0]
    return ("…" + text[-160:] if len(text) > 160 else text) or type(error).__name__


def _described(tree: Tree) -> dict[str, str]:
    """Shape and dtype of every leaf, by its path."""
    return {
        path_name(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(x, "shape") and not _is_key(x.dtype)
    }


def _on_host(x: Any) -> NDArray[Any]:
    """The whole array on the host; it may be sharded over devices of several processes."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _is_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def export(folder: str | Path, params: Tree, model_state: Tree) -> list[Path]:
    """Export a model as an Orbax checkpoint and as a safetensors file.

    - `model`: an Orbax checkpoint {"params": ..., "model_state": ...}, which Flax programs restore
      by `orbax.checkpoint.StandardCheckpointer().restore(folder / "model")`.
    - `model.safetensors`: the same arrays with names such as "params/first/kernel".

    Existing files are replaced. If there are several processes, all of them make this call with the
    same arguments.

    Args:
      folder: the folder; it is created if it is missing.
      params: parameters of one model, such as those of `RoundFn.mean`.
      model_state: model state of one model; {} if it has none.

    Returns:
      The two paths.

    Raises:
      SavingError: a file could not be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in export(folder, {"w": np.ones(3)}, {})]
    ['model', 'model.safetensors']
    """
    import orbax.checkpoint as ocp
    from safetensors.flax import save_file

    folder = Path(folder).absolute()
    tree = {"params": params, "model_state": model_state}
    arrays = {
        path_name(path): jax.numpy.asarray(_on_host(x))
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
