"""What every augmentation has: numbers that the host draws, and images that they change.

The numbers are a pure function of (seed, step), so that a run with all examples on the device and a
streamed run see the same images, from whichever step they start. Workers are numbered hub by hub;
the numbers do not depend on the grouping into hubs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlocal.errors import ConfigurationError


class Augmentation:
    """A random change of images, the same on the host and on the device.

    A subclass draws its numbers from its own generators, and computes with integers in `_apply`,
    which is then exact in NumPy and in JAX.
    """

    seed_entry: ClassVar[int]  # of `jaxlocal.data.seeds`
    only_on_host: ClassVar[bool] = False  # whether it is computed only where images are read

    def check(self, shape: Sequence[int], dtype: Any = np.uint8) -> None:
        """Check that it fits examples of a shape and a dtype.

        Raises:
          ConfigurationError: they are not images [height, width, channels] that it can change.
        """
        if len(shape) != 3:
            raise ConfigurationError(
                f"{self} needs inputs [height, width, channels], got {list(shape)}"
            )

    def draw(
        self,
        seed: int,
        start_step: int,
        steps: int,
        hubs: int,
        workers_per_hub: int,
        batch_size: int,
    ) -> dict[str, NDArray[Any]]:
        """Draw the random numbers of each image of some steps, for `apply` and `apply_on_host`.

        Args:
          seed: the run's seed, not negative.
          start_step: the first step.
          steps, hubs, workers_per_hub, batch_size: numbers of steps, of hubs, of workers in a hub,
            and of examples in a batch.

        Returns:
          Arrays by name, [steps, hubs, workers_per_hub, batch_size, ...].
        """
        grid = (hubs * workers_per_hub, batch_size)
        drawn = [
            self._draw(np.random.default_rng((seed, self.seed_entry, step)), grid)
            for step in range(start_step, start_step + max(1, steps))  # one tells the shapes
        ]
        shape = (steps, hubs, workers_per_hub, batch_size)
        return {
            name: np.stack([one[name] for one in drawn])[:steps].reshape(*shape, *first.shape[2:])
            for name, first in drawn[0].items()
        }

    def apply(self, images: Any, draws: Mapping[str, Any]) -> jax.Array:
        """Change images in JAX, on the device.

        Args:
          images: [..., height, width, channels].
          draws: what `draw` gives, as arrays [..., ...]; other entries are ignored.

        Returns:
          Images of the same shape and dtype.
        """
        changed: jax.Array = self._apply(jnp, images, draws)
        return changed

    def apply_on_host(self, images: NDArray[Any], draws: Mapping[str, Any]) -> NDArray[Any]:
        """Change images as `apply` does, in NumPy; the values are the same."""
        changed: NDArray[Any] = self._apply(np, images, draws)
        return changed

    def _draw(
        self, generator: np.random.Generator, shape: tuple[int, int]
    ) -> dict[str, NDArray[Any]]:
        """The numbers of a step, arrays [workers, batch, ...] of the shape [workers, batch]."""
        raise NotImplementedError

    def _apply(self, xp: Any, images: Any, draws: Mapping[str, Any]) -> Any:
        """Change images by the functions of `xp`, which is NumPy or jax.numpy."""
        raise NotImplementedError


class Composed(Augmentation):
    """Several augmentations, one after another.

    Args:
      parts: in their order, of different kinds.
    """

    def __init__(self, *parts: Augmentation) -> None:
        self.parts = parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Composed) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return f"Composed({', '.join(map(repr, self.parts))})"

    @property
    def only_on_host(self) -> bool:  # type: ignore[override]  # a constant of every other kind
        """Whether one of them is computed only where images are read."""
        return any(part.only_on_host for part in self.parts)

    def check(self, shape: Sequence[int], dtype: Any = np.uint8) -> None:
        for part in self.parts:
            part.check(shape, dtype)

    def draw(self, *args: int, **kwargs: int) -> dict[str, NDArray[Any]]:
        drawn = [part.draw(*args, **kwargs) for part in self.parts]
        return {name: values for one in drawn for name, values in one.items()}

    def apply(self, images: Any, draws: Mapping[str, Any]) -> jax.Array:
        for part in self.parts:
            images = part.apply(images, draws)
        return images

    def apply_on_host(self, images: NDArray[Any], draws: Mapping[str, Any]) -> NDArray[Any]:
        for part in self.parts:
            images = part.apply_on_host(images, draws)
        return images


def check_pixels(
    augmentation: Augmentation, dtype: Any, channels: int = 1, known: Sequence[int] = (1, 3)
) -> None:
    """Check that images have whole pixel values from 0 to 255 and known channels.

    Raises:
      ConfigurationError: they have not.
    """
    if dtype != np.uint8:
        raise ConfigurationError(f"{augmentation} needs images of uint8, got {np.dtype(dtype)}")
    if channels not in known:
        wanted = " or ".join(map(str, known))
        raise ConfigurationError(
            f"{augmentation} needs images of {wanted} channels, got {channels}"
        )
