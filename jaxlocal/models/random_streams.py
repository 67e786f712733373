"""Random streams of an NNX module: seeding them, and whether a call drew from them."""

from typing import Any

import jax
from flax import nnx

from jaxlocal.errors import ConfigurationError


def stream_keys(streams: Any, key: jax.Array | None) -> dict[str, Any]:
    """A separate key for each name of a random stream, so that no two draw the same numbers."""
    leaves = [leaf for _, leaf in nnx.to_flat_state(streams)]
    names = sorted({leaf.tag for leaf in leaves if isinstance(leaf, nnx.RngKey)})
    if not names:
        return {}
    key = jax.random.key(0) if key is None else key
    return {name: jax.random.fold_in(key, number) for number, name in enumerate(names)}


def counts_of(streams: Any) -> dict[str, Any]:
    """How often each random stream of a module was drawn from, by name."""
    counts = (leaf for _, leaf in nnx.to_flat_state(streams) if isinstance(leaf, nnx.RngCount))
    return {f"{leaf.tag} ({number})": leaf.get_value() for number, leaf in enumerate(counts)}


def check_nothing_drawn(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise ConfigurationError where these counts, which may be traced, are not the same arrays."""
    for name, count in before.items():
        if after[name] is not count:
            raise ConfigurationError(
                f"the module draws from its random stream {name} in training, and apply was given "
                "no key"
            )
