"""Export a trained model for other programs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import is_key, path_name
from jaxlocal.training.disk import SavingError, advice, agreed, cause, local_folder, require
from jaxlocal.training.known_states import check_not_donated
from jaxlocal.training.names import named_leaves, on_host
from jaxlocal.types import Tree

_NAMES = ("model", "model.safetensors")


def export(folder: str | Path, params: Tree, model_state: Tree) -> list[Path]:
    """Export a model as an Orbax checkpoint and as a safetensors file.

    - `model`: an Orbax checkpoint {"params": ..., "model_state": ...}, which Flax programs restore
      by `orbax.checkpoint.StandardCheckpointer().restore(folder / "model")`.
    - `model.safetensors`: the same arrays with names such as "params/first/kernel".

    Existing files are replaced when both new ones are complete. If there are several processes, all
    of them make this call with the same arguments.

    Args:
      folder: the folder; it is created if it is missing.
      params: parameters of one model, such as those of `RoundFn.mean`.
      model_state: model state of one model; {} if it has none.

    Returns:
      The two paths.

    Raises:
      ConfigurationError: a leaf that was donated, or that one of the formats cannot hold, or two
        with one name.
      SavingError: a file could not be written; an earlier export is intact.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in export(folder, {"w": np.ones(3)}, {})]
    ['model', 'model.safetensors']
    """
    check_not_donated((params, model_state))
    require("orbax", "exports")
    require("safetensors", "exports")
    as_array = lambda x: x if isinstance(x, jax.Array) else np.asarray(x)
    tree = jax.tree.map(as_array, {"params": params, "model_state": model_state})
    _check_kinds(tree)
    folder = local_folder(folder)
    part = folder / "model.part"  # where both are written
    _together(folder, lambda: _start(folder, part))
    try:
        _together(folder, lambda: _write(part, tree))
    except SavingError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _together(folder, lambda: _replace(folder, part))
    return [folder / name for name in _NAMES]


def _check_kinds(tree: Tree) -> None:
    """Refuse what one of the formats cannot hold, before anything is written."""
    from safetensors.numpy import save

    for name, x in named_leaves(tree).items():
        problem = ""
        if is_key(x):
            problem = "holds random keys, which an exported model cannot hold"
        elif not x.size:
            problem = f"of shape {list(x.shape)} has no values, which Orbax does not write"
        else:
            try:
                save({name: np.empty(0, x.dtype)})
            except Exception:  # safetensors has errors of its own
                problem = f"has the dtype {x.dtype}, which safetensors cannot hold"
        if problem:
            raise ConfigurationError(f"the model cannot be exported: {name} {problem}")


def _together(folder: Path, act: Callable[[], None]) -> None:
    """Act on all processes; raise an error on all of them if one fails."""
    problem = ""
    try:
        act()
    except Exception as error:  # Orbax and safetensors raise their own classes
        problem = cause(error) + advice(error)
    if problem := agreed(problem):
        raise SavingError(f"the model could not be written to {folder}: {problem}")


def _start(folder: Path, part: Path) -> None:
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if (part / "old").exists() and not (folder / _NAMES[0]).exists():
            (part / "old").rename(folder / _NAMES[0])  # a kill came between two renames
        shutil.rmtree(part, ignore_errors=True)


def _write(part: Path, tree: Tree) -> None:
    import orbax.checkpoint as ocp
    from safetensors.numpy import save_file

    arrays = {  # safetensors writes memory as it is, so it must be in the order of the indices
        path_name(path): np.asarray(on_host(x), order="C")
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(part / _NAMES[0], tree)
    if jax.process_index() == 0:
        save_file(arrays, part / _NAMES[1])
        with (part / _NAMES[1]).open("rb") as file:
            os.fsync(file.fileno())


def _replace(folder: Path, part: Path) -> None:
    if jax.process_index() == 0:
        model, single = _NAMES
        (part / single).replace(folder / single)
        if (folder / model).exists():
            (folder / model).rename(part / "old")
        (part / model).rename(folder / model)
        shutil.rmtree(part)
