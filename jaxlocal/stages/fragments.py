"""Fragments of a model: which tensors are synchronised together."""

import re
from collections.abc import Sequence

import jax

from jaxlocal.errors import ConfigurationError
from jaxlocal.parallel.leaves import path_name
from jaxlocal.types import Tree

Fragments = int | Sequence[str]


def fragments_of(params: Tree, fragments: Fragments) -> Tree:
    """Assign every tensor of a model to a fragment.

    Given a number P, tensors go, from the largest to the smallest, each to the fragment that is
    lightest so far, so that no message is much larger than another. Tensors of one size, such as
    those of the layers of a transformer, so come to lie in strides: layers 0, P, 2P, … are in
    fragment 0.

    Args:
      params: the model, or its shapes.
      fragments: the number of fragments P; or a regular expression for each fragment, in which case
        a tensor belongs to the first one that is found in its path, such as "layers/0/kernel".

    Returns:
      The number of its fragment for every tensor, a tree like params.

    Raises:
      ConfigurationError: more fragments than tensors, a fragment without tensors, or a tensor that
        no expression matches.

    >>> layer = jax.numpy.ones(8)
    >>> model = {"head": layer[:4], "layers": [layer, layer, layer, layer]}
    >>> fragments_of(model, 2)
    {'head': 0, 'layers': [0, 1, 0, 1]}
    >>> fragments_of(model, ["layers/[01]", "layers|head"])
    {'head': 1, 'layers': [0, 0, 1, 1]}
    """
    if isinstance(fragments, int):
        return _by_size(params, fragments)
    return _by_path(params, fragments)


def count_fragments(fragments: Fragments) -> int:
    """The number of fragments P.

    Raises:
      ConfigurationError: neither a number of at least 1 nor a list of regular expressions.
    """
    if isinstance(fragments, int):
        count = 0 if isinstance(fragments, bool) else fragments
    elif not isinstance(fragments, list | tuple) or not all(map(_is_pattern, fragments)):
        count = 0
    else:
        count = len(fragments)
    if count < 1:
        raise ConfigurationError(
            f"fragments must be a number of at least 1 or a list of regular expressions, got "
            f"{fragments!r}"
        )
    return count


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


def _by_size(params: Tree, fragments: int) -> Tree:
    leaves, structure = jax.tree.flatten(params)
    if not 1 <= fragments <= len(leaves):
        raise ConfigurationError(
            f"a model of {len(leaves)} tensors does not divide into {fragments} fragments"
        )
    sizes = [x.size * x.dtype.itemsize for x in leaves]
    weights, numbers = [0] * fragments, [0] * len(leaves)
    for place in sorted(range(len(leaves)), key=lambda place: -sizes[place]):
        numbers[place] = weights.index(min(weights))
        weights[numbers[place]] += sizes[place]
    return jax.tree.unflatten(structure, numbers)


def _by_path(params: Tree, patterns: Sequence[str]) -> Tree:
    def number(path, _):
        name = path_name(path)
        for number, pattern in enumerate(patterns):
            if re.search(pattern, name):
                return number
        raise ConfigurationError(f"none of the fragments {list(patterns)} is found in {name}")

    numbers = jax.tree_util.tree_map_with_path(number, params)
    if empty := sorted(set(range(len(patterns))) - set(jax.tree.leaves(numbers))):
        raise ConfigurationError(
            f"no tensor belongs to the fragment {patterns[empty[0]]!r}: it is found in no path, or "
            f"fragments before it take its tensors"
        )
    return numbers
