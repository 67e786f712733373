"""The manifest of a checkpoint: what was saved, so that another model is never read in its place.

It is a JSON item next to the state and the notes, and holds the step, dtype, shape and digest of
every leaf, the digest of the notes and its own.
"""

from pathlib import Path
from typing import Any

from jaxlocal.errors import ConfigurationError
from jaxlocal.training.digests import digest, digests
from jaxlocal.training.names import described
from jaxlocal.types import TrainState

Manifest = dict[str, Any]  # {"step", "leaves", "digests", "notes", "own"}


class Damaged(Exception):
    """A checkpoint is not what was saved."""


def manifest_of(state: TrainState, notes: dict[str, Any]) -> Manifest:
    """The manifest of a state and its notes, equal on all processes that hold the state."""
    manifest = {
        "step": int(state.step),
        "leaves": described(state),
        "digests": digests(state),
        "notes": digest(notes),
    }
    return manifest | {"own": digest(manifest)}


def check_whole(folder: Path) -> None:
    """Check that a checkpoint has its items.

    Raises:
      Damaged: one is missing, as all checkpoints of earlier versions lack the manifest, or a part
        of one is neither a file nor a folder: reading a pipe would wait without end.
    """
    if not (folder / "manifest").exists():
        raise Damaged("it has no digests, as those of earlier versions")
    for item in ("state", "state/_METADATA", "notes"):
        if not (folder / item).exists():
            raise Damaged(f"it has no {item}")
    for part in folder.rglob("*"):
        if not (part.is_file() or part.is_dir()):
            raise Damaged(f"its {part.relative_to(folder)} is neither a file nor a folder")


def check_read(manifest: Any, notes: Any, step: int) -> None:
    """Check what was read of a checkpoint before its state is.

    Args:
      manifest, notes: as they were read.
      step: the name of its folder.

    Raises:
      Damaged: they are not what was saved, or the folder has another name.
    """
    if not isinstance(manifest, dict) or manifest.get("own") != digest(
        {name: value for name, value in manifest.items() if name != "own"}
    ):
        raise Damaged("its manifest has changed since it was saved")
    if manifest["notes"] != digest(notes):
        raise Damaged("its notes have changed since it was saved")
    if manifest["step"] != step:
        raise Damaged(f"it holds step {manifest['step']}")


def difference(manifest: Manifest, shapes: TrainState) -> str:
    """In what a checkpoint differs from a run's shapes, as the end of a sentence; "" if in nothing.

    >>> import jax, numpy as np
    >>> shapes = TrainState(np.ones((1, 2, 3)), (), {}, (), (), jax.random.key(0), np.int32(0))
    >>> difference({"leaves": described(shapes)}, shapes._replace(params=[np.ones((1, 2, 3))]))
    'it has params and not params/[0], as this run has'
    """
    saved, wanted = manifest["leaves"], described(shapes)
    lacking, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if lacking and extra:
        return f"it has {extra[0]} and not {lacking[0]}, as this run has"
    for name in sorted(saved.keys() | wanted.keys()):
        in_file, in_run = saved.get(name, "nothing"), wanted.get(name, "nothing")
        if in_file != in_run:
            return f"it has {in_file} for {name}, this run {in_run}"
    return ""


def changed(manifest: Manifest, state: TrainState) -> str:
    """What is not what was saved in a restored state, on all processes alike; "" if nothing."""
    try:
        found = digests(state)
    except ValueError as error:
        return str(error)
    saved = manifest["digests"]
    wrong = (name for name, value in found.items() if saved.get(name) != value)
    return next((f"{name} has changed since it was saved" for name in wrong), "")


def exact(notes: dict[str, Any]) -> dict[str, Any]:
    """The notes, if JSON gives back the same values.

    Raises:
      ConfigurationError: it does not, as for tuples or keys that are no strings.

    >>> exact({"best": 0.5})
    {'best': 0.5}
    >>> exact({"size": (2, 3)})
    Traceback (most recent call last):
    ...
    jaxlocal.errors.ConfigurationError: the note 'size' holds a tuple, which JSON does not keep; it
    keeps dict with str keys, list, str, int, float, bool and None
    """
    for name, value in notes.items():
        if strange := _strange({name: value}):
            raise ConfigurationError(
                f"the note {name!r} holds {strange}, which JSON does not keep; it keeps dict with "
                f"str keys, list, str, int, float, bool and None"
            )
    return notes


def _strange(value: Any) -> str:
    """The first part of a note that JSON does not keep; "" if there is none."""
    if isinstance(value, dict):
        keys = [f"the key {key!r}" for key in value if not isinstance(key, str)]
        return next(filter(None, [*keys, *map(_strange, value.values())]), "")
    if isinstance(value, list):
        return next(filter(None, map(_strange, value)), "")
    kept = value is None or isinstance(value, str | int | float)
    return "" if kept else f"a {type(value).__name__}"
