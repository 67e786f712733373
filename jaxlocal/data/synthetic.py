"""Synthetic problems, whose examples are computed from the seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlocal.data import seeds
from jaxlocal.data.dataset import Dataset, Request
from jaxlocal.data.examples import ArraySource, Examples
from jaxlocal.errors import ConfigurationError, lookup

_TRAIN, _TEST, _FEATURES = 4096, 1024, 32
_NOISE = 0.1
_MARGIN = "0.5"
_LOSSES = {name: name for name in ("perceptron", "squared_hinge")}


def least_squares(request: Request) -> Dataset:
    def make(
        generator: np.random.Generator, inputs: NDArray[Any], direction: NDArray[Any]
    ) -> Examples:
        targets = inputs @ direction + _NOISE * generator.normal(size=len(inputs))
        return _float32(inputs, targets)

    return _synthetic(request, make, classes=0)


def perceptron(request: Request) -> Dataset:
    """Two classes that a hyperplane through the origin separates, at a distance of 1/2 or more.

    The loss is max(0, -y wᵀx), or, of `perceptron:squared_hinge`, max(0, 1 - y wᵀx)², for the sides
    y = ±1. Some weights have no loss on any example. The perceptron loss is zero at zero weights
    too, from which it makes steps all the same, as every example is a mistake there.
    `perceptron:squared_hinge:0.1` makes the least distance 0.1; with 0 it is that of the Gaussian
    example which is nearest to the hyperplane.

    Raises:
      ConfigurationError: the loss is unknown, or the distance is not a number from 0 to 1,000.
    """
    argument = "perceptron" if request.argument is None else request.argument
    name, colon, distance = argument.partition(":")
    loss = lookup("loss of perceptron", name, _LOSSES)
    margin = _margin(distance if colon else _MARGIN, request.spec)

    def make(
        generator: np.random.Generator, inputs: NDArray[Any], direction: NDArray[Any]
    ) -> Examples:
        sides = np.where(inputs @ direction >= 0, 1.0, -1.0)
        inputs = inputs + margin * sides[:, None] * direction
        return {"inputs": inputs.astype(np.float32), "targets": (sides > 0).astype(np.int32)}

    normal = _direction(request.seed)[1].astype(np.float32)
    return _synthetic(request, make, classes=2)._replace(normal=normal, loss=loss)


def _margin(text: str, spec: str) -> float:
    try:
        margin = float(text)
    except ValueError:
        margin = float("nan")
    if not 0 <= margin <= 1000:
        raise ConfigurationError(f"the distance in {spec!r} must be a number from 0 to 1,000")
    return margin


def _direction(seed: int) -> tuple[np.random.Generator, NDArray[np.float64]]:
    """The generator of a problem, and the unit direction that it draws first, [features]."""
    generator = np.random.default_rng((seed, seeds.SYNTHESIS))
    direction = generator.normal(size=_FEATURES)
    return generator, direction / np.linalg.norm(direction)


def _synthetic(
    request: Request, make: Callable[[Any, NDArray[Any], NDArray[Any]], Examples], classes: int
) -> Dataset:
    """A problem whose examples `make` computes from Gaussian inputs and a unit direction."""

    def read(part: slice) -> ArraySource:
        generator, direction = _direction(request.seed)
        shape = (_TRAIN + _TEST, _FEATURES)
        examples = make(generator, generator.normal(size=shape), direction)
        return ArraySource({key: values[part] for key, values in examples.items()})

    return Dataset(
        name=request.spec,
        train_source=lambda: read(slice(_TRAIN)),
        test_source=lambda: read(slice(_TRAIN, None)),
        train_examples=_TRAIN,
        test_examples=_TEST,
        input_shape=(_FEATURES,),
        classes=classes,
    )


def two_quadratics(request: Request) -> Dataset:
    """Two unit vectors a_1, a_2 with cosine 1 - 1/(R + 1/2); example i has loss (a_i . x)^2 / 2.

    Local SGD on two workers starts at the unit vector along a_1 - a_2. In R rounds, with any number
    of local steps and any step size up to 1, its loss stays above 1/(4e(R + 1/2)). The test set is
    the training set.

    Reference: Qin, Etesami, Uribe, "Faster Convergence of Local SGD for Over-Parameterized Models",
    TMLR 2024, https://arxiv.org/abs/2201.12719 (the instance is derived here)
    """
    text = "1000" if request.argument is None else request.argument
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(f"the rounds in {request.spec!r} must be a positive whole number")
    apart = 1 / (int(text) + 0.5)  # 1 - cosine
    along, across = np.sqrt(1 - apart / 2), np.sqrt(apart / 2)

    def read() -> ArraySource:
        inputs = np.array([[along, across], [along, -across]])
        return ArraySource(_float32(inputs, np.zeros(2)))

    start = np.array([0.0, 1.0], np.float32)
    return Dataset(request.spec, read, read, 2, 2, (2,), classes=0, start=start)


def _float32(inputs: NDArray[Any], targets: NDArray[Any]) -> Examples:
    return {"inputs": inputs.astype(np.float32), "targets": targets.astype(np.float32)}
