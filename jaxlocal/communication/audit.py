"""What a compiled program sends: its collectives, read off its text."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.communication.hlo import Instruction, Program, elements
from jaxlocal.errors import ConfigurationError
from jaxlocal.types import Collective

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
# XLA's names of types are NumPy's but for their beginnings.
_TYPES = {"pred": "bool", "bf16": "bfloat16"}
_BEGINNINGS = {"f8": "float8_", "f": "float", "s": "int", "u": "uint", "c": "complex"}


AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Audited(NamedTuple):
    """A collective of a compiled program."""

    kind: str
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group lie
    dtype: str
    nbytes: int  # of the result on one device, each time it runs
    loops: tuple[int | None, ...]  # trips of the loops around it, outermost first; None: unknown
    branches: int  # conditionals around it, by which it may not run
    name: str  # where in the source it comes from, as XLA has it

    @property
    def times(self) -> int | None:
        """How often a run of the program executes it; None where a loop's trips are unknown."""
        return None if None in self.loops else math.prod(n for n in self.loops if n is not None)

    def collective(self) -> Collective:
        """It, as the ledger counts; of a loop of unknown trips, once."""
        times = 1 if self.times is None else self.times
        return Collective(self.kind, self.axes, self.dtype, self.nbytes, times)


def audit(compiled: Any, mesh: AnyMesh) -> list[Audited]:
    """All collectives of a program between devices of a mesh, in loops, calls and conditionals.

    Groups of one device say nothing and are left out. What XLA's CPU backend makes of bfloat16 is
    float32; the types before it did are those of the program's text before it is optimised.

    Args:
      compiled: a compiled program, as `jax.jit(f).lower(...).compile()` gives it, or the text of
        one in XLA's HLO, as `lowered.as_text("hlo")` has it before it is optimised.
      mesh: the mesh that it runs on, or its shape alone.

    Raises:
      ConfigurationError: the program runs on another number of devices.

    >>> text = '''HloModule average, num_partitions=4
    ... ENTRY average {
    ...   x = f32[3] parameter(0)
    ...   ROOT y = f32[3] all-reduce(x), replica_groups=[2,2]<=[4], to_apply=add
    ... }'''
    >>> audit(text, jax.sharding.AbstractMesh((2, 2), ("hubs", "workers")))
    [Audited(kind='all-reduce', axes=('workers',), dtype='float32', nbytes=12, loops=(),
             branches=0, name='')]
    """
    program = Program(compiled if isinstance(compiled, str) else compiled.as_text())
    if program.devices not in (None, mesh.size):
        raise ConfigurationError(
            f"the program runs on {program.devices} devices, and the mesh has {mesh.size}"
        )
    return list(_walk(program, program.entry, mesh, (), 0))


def _walk(
    program: Program, name: str, mesh: AnyMesh, loops: tuple[int | None, ...], branches: int
) -> Iterator[Audited]:
    for instruction in program.computations[name]:
        yield from _found(instruction, mesh, loops, branches)
        trips, conditional = instruction.trips, instruction.op == "conditional"
        for called in instruction.called:
            inner = loops
            if instruction.op == "while":  # whose condition is asked once more
                last = called == instruction.condition
                inner = (*loops, None if trips is None else trips + last)
            yield from _walk(program, called, mesh, inner, branches + conditional)


def _found(
    instruction: Instruction, mesh: AnyMesh, loops: tuple[int | None, ...], branches: int
) -> Iterator[Audited]:
    kind = instruction.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    axes = _axes(_groups(instruction, mesh), mesh)
    result = instruction.type
    if instruction.op in ("all-gather-start", "collective-permute-start"):
        result = elements(result)[1]  # beside the operand, which the result is waited for with
    for dtype, nbytes in _sizes(result).items():
        if axes and nbytes:
            yield Audited(kind, axes, dtype, nbytes, loops, branches, instruction.source)


def _sizes(types: str) -> dict[str, int]:
    """The bytes of each element type in the text of a type."""
    sizes: dict[str, int] = {}
    for word, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", types):
        begins = next((b for b in _BEGINNINGS if re.match(rf"{b}(?=[a-z])|{b}(?=\d+$)", word)), "")
        named = _BEGINNINGS.get(begins, "") + word.removeprefix(begins)
        dtype = jnp.dtype(_TYPES.get(word, named))
        count = math.prod(int(n) for n in shape.split(",") if n)
        sizes[dtype.name] = sizes.get(dtype.name, 0) + count * dtype.itemsize
    return sizes


def _axes(groups: list[list[int]], mesh: AnyMesh) -> tuple[str, ...]:
    """Along which axes of the mesh the devices of a group differ."""
    places = [
        np.unravel_index(group, tuple(mesh.shape.values())) for group in groups if len(group) > 1
    ]
    return tuple(
        name
        for axis, name in enumerate(mesh.axis_names)
        if any(len(set(place[axis].tolist())) > 1 for place in places)
    )


def _groups(instruction: Instruction, mesh: AnyMesh) -> list[list[int]]:
    """The devices, by their places in the mesh, that speak with each other, in each of the ways in
    which XLA writes them."""
    text, everyone = instruction.attributes, np.arange(mesh.size)
    numbers = lambda word: [int(n) for n in word.split(",")]
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return [numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return [numbers(g) for g in re.findall(r"\{([\d,]+)\}", listed[1])] or [everyone.tolist()]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        grid = everyone.reshape(numbers(iota[2]))
        grid = grid.transpose(numbers(iota[3])) if iota[3] else grid
        return grid.reshape(numbers(iota[1])).tolist()
    if named := re.search(r"replica_groups=@?mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        inner = re.findall(r"'([^']+)'", named[2])
        if "(" not in named[2] and math.prod(sizes.values()) == mesh.size:
            order = [name for name in sizes if name not in inner] + inner
            grid = everyone.reshape(list(sizes.values()))
            grid = grid.transpose([list(sizes).index(name) for name in order])
            return grid.reshape(-1, math.prod(sizes[name] for name in inner)).tolist()
    raise ValueError(f"no known spelling of the devices of a collective: {text}")
