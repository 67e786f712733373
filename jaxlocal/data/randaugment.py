"""RandAugment, by the operations of Pillow, where images are read."""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.data.augmentation import Augmentation, check_pixels
from jaxlocal.errors import ConfigurationError

OPERATIONS = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "colour", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)
_MOST, _LARGEST = 10, 30  # operations of an image, magnitude
_UNIT = 10  # the magnitude of an operation at its full strength
_GREY = 128  # of pixels from outside of the image


@dataclass(frozen=True)
class RandAugment(Augmentation):
    """RandAugment(n, m): n operations with the magnitude m, drawn uniformly from 14 for each image.

    With s = m / 10 and a random sign ±:

    | operation | |
    |---|---|
    | `identity`, `autocontrast`, `equalize` | no magnitude |
    | `rotate` | by ± 30 s degrees |
    | `shear_x`, `shear_y` | by ± 0.3 s |
    | `translate_x`, `translate_y` | by ± 0.45 s of the width or height |
    | `colour`, `contrast`, `brightness`, `sharpness` | by the factor max(0, 1 ± 0.9 s) |
    | `posterize` | to max(1, 8 - round(4 s)) bits |
    | `solarize` | values from max(0, round(256 (1 - s))) on are inverted |

    Pixels from outside of the image are grey. Pillow computes the operations on the host, so that
    it serves streams only.

    Its draws are "operation", int8 [..., n], numbers of `OPERATIONS`, and "opposite", bool
    [..., n], whether the sign is negative.

    Args:
      operations: n, 1 to 10.
      magnitude: m, 0 to 30; 10 is the full strength.

    Raises:
      ConfigurationError: a number is out of range, or Pillow is not installed.

    >>> RandAugment(2, 10).draw(0, 0, 5, 1, 2, 8)["operation"].shape
    (5, 1, 2, 8, 2)

    Reference: Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a
    reduced search space", NeurIPS 2020, https://arxiv.org/abs/1909.13719

    Differs from the paper in: the code released with it solarizes and posterizes less at larger
    magnitudes, and draws no sign for the factors of `colour` to `sharpness`; here every operation
    grows with the magnitude.
    """

    operations: int = 2
    magnitude: float = 10

    seed_entry: ClassVar[int] = seeds.RANDAUGMENT
    only_on_host: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.operations <= _MOST:
            raise ConfigurationError(
                f"RandAugment takes 1 to {_MOST} operations, got {self.operations}"
            )
        if not 0 <= self.magnitude <= _LARGEST:
            raise ConfigurationError(
                f"the magnitude of RandAugment must be 0 to {_LARGEST}, got {self.magnitude}"
            )
        if not importlib.util.find_spec("PIL"):
            raise ConfigurationError(
                "RandAugment needs Pillow, which is not installed: "
                "pip install 'jaxlocal[experiments]'"
            )

    def check(self, shape: Sequence[int], dtype: Any = np.uint8) -> None:
        super().check(shape, dtype)
        check_pixels(self, dtype, shape[-1])

    def _draw(
        self, generator: np.random.Generator, shape: tuple[int, int]
    ) -> dict[str, NDArray[Any]]:
        size = (*shape, self.operations)
        return {
            "operation": generator.integers(len(OPERATIONS), size=size, dtype=np.int8),
            "opposite": generator.integers(2, size=size, dtype=np.uint8).astype(bool),
        }

    def _apply(self, xp: Any, images: Any, draws: Mapping[str, Any]) -> Any:
        if xp is not np:
            raise ConfigurationError(f"{self} is computed where images are read, by a stream")
        out = np.empty_like(images)
        for place in np.ndindex(images.shape[:-3]):
            numbers, opposite = (draws[name][place].tolist() for name in ("operation", "opposite"))
            out[place] = self._changed(images[place], numbers, opposite)
        return out

    def _changed(
        self, pixels: NDArray[np.uint8], numbers: list[int], opposite: list[bool]
    ) -> NDArray[np.uint8]:
        from PIL import Image

        image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        for number, negative in zip(numbers, opposite, strict=True):
            image = apply_operation(OPERATIONS[number], image, self.magnitude, negative)
        return np.asarray(image).reshape(pixels.shape)


def apply_operation(name: str, image: Any, magnitude: float, opposite: bool = False) -> Any:
    """Apply an operation of RandAugment to an image of Pillow.

    Args:
      name: one of `OPERATIONS`.
      image: of the mode "RGB" or "L".
      magnitude: 0 to 30.
      opposite: whether the sign of the magnitude is negative.

    Returns:
      An image of the same mode and size.

    >>> from PIL import Image
    >>> apply_operation("solarize", Image.new("L", (1, 1), 100), magnitude=10).getpixel((0, 0))
    155
    """
    strength = magnitude / _UNIT
    return _operations()[name](image, strength, -strength if opposite else strength)


@functools.cache
def _operations() -> dict[str, Callable[[Any, float, float], Any]]:
    """Each operation, a function of the image, the strength, and the strength with its sign."""
    from PIL import Image, ImageEnhance, ImageOps

    def affine(image: Any, *matrix: float) -> Any:
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, fillcolor=_outside(image)
        )

    def enhanced(kind: Any) -> Callable[[Any, float, float], Any]:
        return lambda image, s, signed: kind(image).enhance(max(0.0, 1 + 0.9 * signed))

    return {
        "identity": lambda image, s, signed: image,
        "autocontrast": lambda image, s, signed: ImageOps.autocontrast(image),
        "equalize": lambda image, s, signed: ImageOps.equalize(image),
        "rotate": lambda image, s, signed: image.rotate(30 * signed, fillcolor=_outside(image)),
        "solarize": lambda image, s, signed: ImageOps.solarize(image, max(0, round(256 * (1 - s)))),
        "colour": enhanced(ImageEnhance.Color),
        "posterize": lambda image, s, signed: ImageOps.posterize(image, max(1, 8 - round(4 * s))),
        "contrast": enhanced(ImageEnhance.Contrast),
        "brightness": enhanced(ImageEnhance.Brightness),
        "sharpness": enhanced(ImageEnhance.Sharpness),
        "shear_x": lambda image, s, signed: affine(image, 1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": lambda image, s, signed: affine(image, 1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": lambda image, s, signed: affine(
            image, 1, 0, 0.45 * signed * image.width, 0, 1, 0
        ),
        "translate_y": lambda image, s, signed: affine(
            image, 1, 0, 0, 0, 1, 0.45 * signed * image.height
        ),
    }


def _outside(image: Any) -> tuple[int, ...]:
    return (_GREY,) * len(image.getbands())
