"""Augmentation of images, by its spec.

| spec | augmentation |
|---|---|
| `none` | none |
| `resized_crop`, `resized_crop:AREA` | a window of AREA (0.08) of the image or more, resized |
| `crop`, `crop:PAD` | a random window of the image's size, out of the image padded by PAD zeros |
| `flip` | each image is mirrored left to right with probability 1/2 |
| `randaugment`, `randaugment:N:M` | N (2) random operations of the magnitude M (10); streams only |
| `jitter`, `jitter:STRENGTH` | random brightness, contrast and saturation, within STRENGTH (0.4) |
| `pca`, `pca:STRENGTH` | multiples, about STRENGTH (0.1), of the principal colours are added |

Commas combine them, as in `crop,flip`. They are applied in the order of this table, in whichever
order they are named.

The host draws the random numbers, and the images are changed where they are: on the device or on
the host. The numbers are a pure function of (seed, step), and the changes are computed with
integers, so a run with all examples on the device and a streamed run see the same images.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxlocal.data.augmentation import Augmentation, Composed
from jaxlocal.data.checks import check_name
from jaxlocal.data.colour import ColourJitter, PcaNoise
from jaxlocal.data.crop_flip import LARGEST_PAD, CropFlip
from jaxlocal.data.randaugment import RandAugment
from jaxlocal.data.resized_crop import ResizedCrop
from jaxlocal.errors import ConfigurationError, unknown

# The kinds with the numbers that each takes at most.
_ARGUMENTS = {"crop": 1, "resized_crop": 1, "randaugment": 2, "jitter": 1, "pca": 1}
AUGMENTATIONS = ("none", "flip", *_ARGUMENTS)

T = TypeVar("T", int, float)


def parse_augmentation(spec: str) -> Augmentation | None:
    """Parse the spec of an augmentation, such as "crop:4,flip".

    Args:
      spec: see `jaxlocal.data.augment`.

    Returns:
      The augmentation; None for "none".

    Raises:
      ConfigurationError: a name is unknown or repeated, two of them exclude each other, or a number
        is out of range.

    >>> parse_augmentation("crop:2,flip")
    CropFlip(pad=2, flip=True)
    >>> parse_augmentation("pca,resized_crop:0.25")
    Composed(ResizedCrop(smallest=0.25), PcaNoise(strength=0.1))
    >>> parse_augmentation("none")
    """
    check_name("an augmentation", spec)
    given = _read(spec)
    if "none" in given:
        return None
    parts: list[Augmentation] = []
    if "resized_crop" in given:
        parts.append(ResizedCrop(*_numbers(spec, given["resized_crop"], float)))
    if "crop" in given or "flip" in given:
        parts.append(CropFlip(_padding(spec, given.get("crop")), "flip" in given))
    if "randaugment" in given:
        operations = _numbers(spec, given["randaugment"][:1], int) or [RandAugment.operations]
        magnitude = _numbers(spec, given["randaugment"][1:], float)
        parts.append(RandAugment(*operations, *magnitude))
    if "jitter" in given:
        parts.append(ColourJitter(*_numbers(spec, given["jitter"], float)))
    if "pca" in given:
        parts.append(PcaNoise(*_numbers(spec, given["pca"], float)))
    return parts[0] if len(parts) == 1 else Composed(*parts)


def _read(spec: str) -> dict[str, list[str]]:
    """The names of a spec, each with its arguments."""
    given: dict[str, list[str]] = {}
    for part in spec.split(","):
        name, *arguments = part.strip().split(":")
        if name not in AUGMENTATIONS:
            raise unknown("augmentation", name, AUGMENTATIONS)
        most = _ARGUMENTS.get(name, 0)
        if len(arguments) > most:
            takes = ("no argument", "one number", "two numbers at most")[most]
            raise ConfigurationError(f"augmentation {name!r} takes {takes}, got {part!r}")
        if name in given:
            raise ConfigurationError(f"augmentation {spec!r} names {name!r} more than once")
        given[name] = arguments
    if "none" in given and len(given) > 1:
        raise ConfigurationError(f"augmentation 'none' cannot be combined, got {spec!r}")
    if "crop" in given and "resized_crop" in given:
        raise ConfigurationError(
            f"augmentation {spec!r} crops twice: take either 'crop' or 'resized_crop'"
        )
    return given


def _numbers(spec: str, texts: Sequence[str], kind: Callable[[str], T]) -> list[T]:
    try:
        return [kind(text) for text in texts]
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigurationError(f"{texts[0]!r} in augmentation {spec!r} is not {what}") from None


def _padding(spec: str, arguments: list[str] | None) -> int:
    if not arguments:
        return 0 if arguments is None else CropFlip.pad
    text = arguments[0]
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST_PAD:
        raise ConfigurationError(
            f"the padding of a crop must be a whole number from 1 to {LARGEST_PAD}, got {text!r} "
            f"in {spec!r}"
        )
    return int(text)
