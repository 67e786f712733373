"""Images of varying size, which are decoded, cut to squares and resized while they are read."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data.augmentation import Augmentation, Composed
from jaxlocal.data.examples import Examples
from jaxlocal.data.prepared import PreparedSplit, in_one_sentence
from jaxlocal.data.resized_crop import ResizedCrop, random_windows
from jaxlocal.errors import ConfigurationError

_MIDDLE = 7 / 8  # of the shorter side, as 224 of 256 pixels


@dataclass(frozen=True)
class ResizedImages:
    """The examples of a split by number, for evaluation: the middle square of each image, resized.

    The shorter side is resized to 8/7 of `size`, and the middle `size` x `size` pixels are taken.

    Args:
      encoded: the split, whose inputs are the bytes of encoded images.
      size: height and width of the images in pixels.
    """

    encoded: PreparedSplit
    size: int

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        examples = self.encoded.__getitems__(numbers)
        with in_one_sentence(self.encoded.name, self.encoded.folder):
            return [{**one, "inputs": self._middle(one["inputs"])} for one in examples]

    def examples(self) -> Examples:
        """Images of varying size are too many, and too large, to be read at once.

        Raises:
          ConfigurationError: always.
        """
        raise ConfigurationError(
            f"the images of {self.encoded.name} vary in size: they are read by a stream "
            "(--stream), which resizes them, not all at once"
        )

    def targets(self) -> NDArray[np.int32]:
        """Read all labels [n], without decoding an image."""
        return self.encoded.targets()

    def streamed(
        self, augmentation: Augmentation | None
    ) -> tuple[PreparedSplit, "RandomCrop", Augmentation | None]:
        """What a stream trains on: its source, its transform, and the rest of the augmentation.

        Every image takes a random resized crop, that of the augmentation if it has one.
        """
        parts = augmentation.parts if isinstance(augmentation, Composed) else (augmentation,)
        crops = [part for part in parts if isinstance(part, ResizedCrop)]
        rest = [part for part in parts if part is not None and part not in crops]
        [crop] = crops or [ResizedCrop()]
        transform = RandomCrop(self.size, self.encoded.shape[-1], crop.smallest)
        return self.encoded, transform, Composed(*rest) if rest else None

    def _middle(self, encoded: bytes) -> NDArray[np.uint8]:
        image = _opened(encoded)
        side = _MIDDLE * min(image.size)
        left, top = ((extent - side) / 2 for extent in image.size)
        box = (left, top, left + side, top + side)
        return _resized(image, box, self.size, self.encoded.shape[-1])


@dataclass(frozen=True)
class RandomCrop:
    """A transform of a stream: decodes an image, and resizes a random window of it.

    Args:
      size: height and width of the result in pixels.
      channels: 1 for grey, 3 for red, green and blue.
      smallest: the smallest area of the window, as a part of the image's.
    """

    size: int
    channels: int
    smallest: float = ResizedCrop.smallest

    def __call__(
        self, example: Mapping[str, Any], generator: np.random.Generator
    ) -> dict[str, Any]:
        image = _opened(example["inputs"])
        width, height = image.size
        window = random_windows(generator, self.smallest, aspect=width / height)
        rows, columns = (
            max(1, round(part * extent))
            for part, extent in zip(window[:2].tolist(), (height, width), strict=True)
        )
        top, left = int(window[2] * (height - rows + 1)), int(window[3] * (width - columns + 1))
        box = (left, top, left + columns, top + rows)
        return {**example, "inputs": _resized(image, box, self.size, self.channels)}


def _opened(encoded: bytes) -> Any:
    """An image whose size is known, and whose pixels are not decoded yet."""
    from PIL import Image

    return Image.open(io.BytesIO(encoded))


def _resized(
    image: Any, box: tuple[float, float, float, float], size: int, channels: int
) -> NDArray[np.uint8]:
    """The pixels of a box (left, top, right, bottom), resized to a square [size, size, channels].

    A JPEG file is decoded at a half, a quarter or an eighth of its size where the box is so large.
    """
    from PIL import Image

    width, height = image.size
    wanted = (size * width / (box[2] - box[0]), size * height / (box[3] - box[1]))
    drafted = image.draft(None, tuple(int(np.ceil(extent)) for extent in wanted))
    scale = drafted[1][2] / width if drafted else 1.0  # what is decoded is rounded up
    scaled = tuple(edge * scale for edge in box)
    pixels = image.convert("RGB" if channels == 3 else "L")
    square = pixels.resize((size, size), Image.Resampling.BILINEAR, box=scaled)
    return np.asarray(square).reshape(size, size, channels)
