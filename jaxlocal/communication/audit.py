"""Audit what a compiled program sends: find its collectives in the text of its HLO."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlocal.communication.hlo import Instruction, Program, tuple_elements
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
# XLA abbreviates the first letters of NumPy's names of types.
_TYPES = {"pred": "bool", "bf16": "bfloat16"}
_PREFIXES = {"f8": "float8_", "f": "float", "s": "int", "u": "uint", "c": "complex"}

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Audited(NamedTuple):
    """A collective that was found in a compiled program."""

    kind: str  # "all-reduce", "all-gather", ... as XLA names it
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group lie
    dtype: str  # "float32", "uint8", ...
    nbytes: int  # of the result on one device, each time it runs
    loops: tuple[int | None, ...]  # trips of the loops around it, outermost first; None: unknown
    branches: int  # conditionals around it: with any, it may not run
    name: str  # XLA's op_name: where in the source it comes from

    @property
    def times(self) -> int | None:
        """How often one run of the program executes it; None if a trip count is unknown."""
        return None if None in self.loops else math.prod(n for n in self.loops if n is not None)

    def collective(self) -> Collective:
        """The collective as `accounting` lists it; once if a trip count is unknown."""
        times = 1 if self.times is None else self.times
        return Collective(self.kind, self.axes, self.dtype, self.nbytes, times)


def audit(compiled: Any, mesh: AnyMesh) -> list[Audited]:
    """List all collectives of a compiled program, those in loops, calls and conditionals included.

    Collectives whose groups have one device send nothing and are left out. XLA's CPU backend turns
    the bfloat16 of a collective into float32 while it optimises; to see the types that an
    accelerator sends, audit the text of the program before it is optimised.

    Args:
      compiled: a compiled program, as `jax.jit(f).lower(...).compile()` gives it, or the text of a
        program in HLO, as `jax.jit(f).lower(...).as_text("hlo")` gives it before optimisation.
      mesh: the mesh that the program runs on, or an `AbstractMesh` of its shape.

    Returns:
      The collectives in the order of the program's text.

    Raises:
      ConfigurationError: the program runs on a number of devices that is not the mesh's.
      ValueError: the text is not HLO, or it describes a group of devices in an unknown form.

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
        yield from _audited(instruction, mesh, loops, branches)
        trips, conditional = instruction.trips, instruction.op == "conditional"
        for called in instruction.called:
            inner = loops
            if instruction.op == "while":
                # A loop evaluates its condition once more than its body.
                extra = called == instruction.condition
                inner = (*loops, None if trips is None else trips + extra)
            yield from _walk(program, called, mesh, inner, branches + conditional)


def _audited(
    instruction: Instruction, mesh: AnyMesh, loops: tuple[int | None, ...], branches: int
) -> Iterator[Audited]:
    kind = instruction.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return
    axes = _axes(_groups(instruction, mesh), mesh)
    result = instruction.type
    if instruction.op in ("all-gather-start", "collective-permute-start"):
        result = tuple_elements(result)[1]  # the type of a -start is (operand, result, ...)
    for dtype, nbytes in _sizes(result).items():
        if axes and nbytes:
            yield Audited(kind, axes, dtype, nbytes, loops, branches, instruction.source)


def _sizes(types: str) -> dict[str, int]:
    """The bytes of an HLO type, such as "(f32[4], u8[3])", by the dtype of its elements."""
    sizes: dict[str, int] = {}
    for word, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", types):
        prefix = next((p for p in _PREFIXES if re.match(rf"{p}(?=[a-z])|{p}(?=\d+$)", word)), "")
        named = _PREFIXES.get(prefix, "") + word.removeprefix(prefix)
        dtype = jnp.dtype(_TYPES.get(word, named))
        count = math.prod(int(n) for n in shape.split(",") if n)
        sizes[dtype.name] = sizes.get(dtype.name, 0) + count * dtype.itemsize
    return sizes


def _axes(groups: list[list[int]], mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = [
        np.unravel_index(group, tuple(mesh.shape.values())) for group in groups if len(group) > 1
    ]
    return tuple(
        name
        for axis, name in enumerate(mesh.axis_names)
        if any(len(set(place[axis].tolist())) > 1 for place in places)
    )


def _groups(instruction: Instruction, mesh: AnyMesh) -> list[list[int]]:
    """The groups of devices that communicate, by their positions in the mesh. XLA writes them in
    four forms: pairs, lists, a reshaped iota, and mesh axes by name."""
    text, devices = instruction.attributes, np.arange(mesh.size)
    numbers = lambda word: [int(n) for n in word.split(",")]
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return [numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text):
        return [numbers(g) for g in re.findall(r"\{([\d,]+)\}", listed[1])] or [devices.tolist()]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        grid = devices.reshape(numbers(iota[2]))
        grid = grid.transpose(numbers(iota[3])) if iota[3] else grid
        return grid.reshape(numbers(iota[1])).tolist()
    if named := re.search(r"replica_groups=@?mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        inner = re.findall(r"'([^']+)'", named[2])
        if "(" not in named[2] and math.prod(sizes.values()) == mesh.size:
            order = [name for name in sizes if name not in inner] + inner
            grid = devices.reshape(list(sizes.values()))
            grid = grid.transpose([list(sizes).index(name) for name in order])
            return grid.reshape(-1, math.prod(sizes[name] for name in inner)).tolist()
    raise ValueError(f"the groups of devices of a collective have an unknown form: {text}")
