"""Parse the text of an XLA program (HLO), as far as an audit needs it."""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(?:body|condition|calls|true_computation|false_computation)=%?([\w.-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """One operation of a program."""

    op: str  # "all-reduce", "while", ...
    type: str  # of its result
    attributes: str  # operands and all that follows

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs, except the function of a reduction."""
        found = _CALLED.findall(self.attributes)
        names = [name for one, many in found for name in (one, *re.findall(r"[\w.-]+", many))]
        if self.op == "call":
            names += re.findall(r"\bto_apply=%?([\w.-]+)", self.attributes)
        return [name for name in names if name]

    @property
    def condition(self) -> str | None:
        """The name of the computation that decides whether a loop continues."""
        match = re.search(r"\bcondition=%?([\w.-]+)", self.attributes)
        return match[1] if match else None

    @property
    def trips(self) -> int | None:
        """How often the body of a loop runs; None if XLA does not know."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(match[1]) if match else None

    @property
    def source(self) -> str:
        """Where in the source it comes from, as XLA writes it; "" if it does not."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


class Program:
    """The computations of a program.

    Args:
      text: the program in HLO.

    Raises:
      ValueError: the text has no entry computation.
    """

    entry: str  # the name of the computation that a run starts with
    computations: dict[str, list[Instruction]]  # by name
    devices: int | None  # that the program runs on; None if the text does not give it

    def __init__(self, text: str):
        self.computations = {}
        self.entry = name = ""
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                name = start[2]
                self.computations[name] = []
                self.entry = name if start[1] else self.entry
            elif name and (found := _INSTRUCTION.match(line)):
                type_, op, attributes = found.groups()
                self.computations[name].append(Instruction(op, type_, attributes))
        header = re.search(r"^HloModule .*?\bnum_partitions=(\d+)", text, re.MULTILINE)
        self.devices = int(header[1]) if header else None
        if not self.entry:
            raise ValueError("the text has no entry computation: it is not a program in HLO")


def tuple_elements(type_: str) -> list[str]:
    """Split the type of a tuple into the types of its elements.

    >>> tuple_elements("((f32[2]{0}, s8[3]), (f32[4], s8[6]), u32[])")
    ['(f32[2]{0}, s8[3])', '(f32[4], s8[6])', 'u32[]']
    """
    parts, depth, inner = [""], 0, type_.strip()[1:-1]
    for letter in inner:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
