"""Random colours of images: jitter of brightness, contrast and saturation, and PCA noise.

Both compute with integers, so that the host and the device give the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.data.augmentation import Augmentation, check_pixels
from jaxlocal.errors import ConfigurationError

_BITS = 16  # factors are multiples of 2^-16
_GREY = (19595, 38470, 7471)  # weights of red, green and blue (ITU-R 601-2), in units of 2^-16

# Eigenvalues and eigenvectors (columns) of the covariance of the pixels of ImageNet, as published
# with the code of AlexNet.
_EIGENVALUES = np.array([55.46, 4.794, 1.148])
_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


@dataclass(frozen=True)
class ColourJitter(Augmentation):
    """Random brightness, contrast and saturation, in a random order.

        x ← g + f (x - g),  f ~ U[1 - strength, 1 + strength]

    where g is 0 for the brightness, the mean grey of the image for the contrast, and the grey of
    the pixel for the saturation. Each result is rounded, and clipped to 0 … 255. Images of one
    channel are grey, and have no saturation to change.

    Its draws are "factor", int32 [..., 3] in units of 2^-16, and "kind", int8 [..., 3]: 0 for
    brightness, 1 for contrast, 2 for saturation, in the order in which they are applied.

    Args:
      strength: above 0, at most 1; 0.4 is usual for ImageNet.

    Raises:
      ConfigurationError: the strength is out of range.

    >>> ColourJitter(0.4).draw(0, 0, 5, 1, 2, 8)["factor"].shape
    (5, 1, 2, 8, 3)

    Reference: Howard, "Some Improvements on Deep Convolutional Neural Network Based Image
    Classification", 2013, https://arxiv.org/abs/1312.5402
    """

    strength: float = 0.4

    seed_entry: ClassVar[int] = seeds.JITTER

    def __post_init__(self) -> None:
        _check_strength("a colour jitter", self.strength)

    def check(self, shape: Sequence[int], dtype: Any = np.uint8) -> None:
        super().check(shape, dtype)
        check_pixels(self, dtype, shape[-1])

    def _draw(
        self, generator: np.random.Generator, shape: tuple[int, int]
    ) -> dict[str, NDArray[Any]]:
        factor = generator.uniform(1 - self.strength, 1 + self.strength, (*shape, 3))
        order = generator.permuted(np.broadcast_to(np.arange(3), (*shape, 3)), axis=-1)
        fixed = np.rint(factor * (1 << _BITS)).astype(np.int32)
        return {"factor": fixed, "kind": order.astype(np.int8)}

    def _apply(self, xp: Any, images: Any, draws: Mapping[str, Any]) -> Any:
        pixels = images.astype(np.int32)
        for turn in range(3):
            kind, factor = (draws[name][..., turn, None, None, None] for name in ("kind", "factor"))
            grey = _grey(pixels)
            towards = xp.where(kind == 1, _mean(grey), xp.where(kind == 2, grey, 0 * grey))
            moved = (towards << _BITS) + (pixels - towards) * factor
            pixels = xp.clip((moved + (1 << (_BITS - 1))) >> _BITS, 0, 255)
        return pixels.astype(np.uint8)


@dataclass(frozen=True)
class PcaNoise(Augmentation):
    """Random multiples of the principal components of ImageNet's colours, added to all pixels.

        x ← x + Σ_k α_k λ_k v_k,  α_k ~ N(0, strength²)

    with the eigenvalues λ_k and eigenvectors v_k of the covariance of red, green and blue. The
    result is rounded, and clipped to 0 … 255.

    Its draws are "noise", int16 [..., 3], what is added to each channel.

    Args:
      strength: above 0, at most 1; AlexNet's is 0.1.

    Raises:
      ConfigurationError: the strength is out of range.

    >>> PcaNoise(0.1).draw(0, 0, 5, 1, 2, 8)["noise"].shape
    (5, 1, 2, 8, 3)

    Reference: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional
    Neural Networks", NeurIPS 2012, section 4.1
    """

    strength: float = 0.1

    seed_entry: ClassVar[int] = seeds.PCA

    def __post_init__(self) -> None:
        _check_strength("PCA noise", self.strength)

    def check(self, shape: Sequence[int], dtype: Any = np.uint8) -> None:
        super().check(shape, dtype)
        check_pixels(self, dtype, shape[-1], known=(3,))

    def _draw(
        self, generator: np.random.Generator, shape: tuple[int, int]
    ) -> dict[str, NDArray[Any]]:
        multiples = generator.normal(0, self.strength, (*shape, 3))
        # Pixels are whole, so rounding what is added is rounding the sum.
        return {"noise": np.rint((multiples * _EIGENVALUES) @ _EIGENVECTORS.T).astype(np.int16)}

    def _apply(self, xp: Any, images: Any, draws: Mapping[str, Any]) -> Any:
        noise = draws["noise"][..., None, None, :].astype(np.int32)
        return xp.clip(images.astype(np.int32) + noise, 0, 255).astype(np.uint8)


def _grey(pixels: Any) -> Any:
    """The grey of each pixel, [..., height, width, 1]."""
    if pixels.shape[-1] == 1:
        return pixels
    parts = [weight * pixels[..., n : n + 1] for n, weight in enumerate(_GREY)]
    return (sum(parts) + (1 << 15)) >> 16


def _mean(grey: Any) -> Any:
    """The mean of a grey image, rounded, [..., 1, 1, 1]."""
    count = grey.shape[-3] * grey.shape[-2]
    return (grey.sum((-3, -2), dtype=np.int32, keepdims=True) + count // 2) // count


def _check_strength(what: str, strength: float) -> None:
    if not 0 < strength <= 1:
        raise ConfigurationError(
            f"the strength of {what} must be above 0 and at most 1, got {strength}"
        )
