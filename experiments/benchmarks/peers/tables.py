"""The table of the suite `peers`, in Markdown, and what it does not tell."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.peers.contender import PEERS
from experiments.benchmarks.speed.comparison import SAME_LOSS
from experiments.benchmarks.speed.contender import JAXLOCAL
from experiments.benchmarks.speed.fingerprint import relative_difference
from experiments.benchmarks.speed.tables import spread_of_ratio

# Relative difference of what two contenders have learnt in a round. Rounding is 1e-6, but where it
# puts one input of a relu on the other side of zero, a worker goes another way.
SAME_MODEL = 0.03


def markdown_table(parts: Sequence[dict[str, Any]]) -> str:
    """Write the figures of some workloads as one table in Markdown.

    Args:
      parts: figures of each workload, see `compare_commands`.
    """
    names = [name for name in PEERS if any(name in part["contenders"] for part in parts)]
    titles = [
        f"{part['name']}: {part['workers']} × {part['batch_size']}, {part['steps']}"
        for part in parts
    ]
    lines = [["workers × batch, steps", *titles], ["---", *["---:"] * len(parts)]]
    for name in names:
        cells = [_cell(name, part["contenders"].get(name)) for part in parts]
        lines.append([PEERS[name].label, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(name: str, row: dict[str, Any] | None) -> str:
    """The median and range of the ratios to jaxlocal's seconds, and of jaxlocal the seconds."""
    if row is None:
        return ""
    if "seconds" not in row:
        return row["failure"].split(":")[0]
    if name == JAXLOCAL:
        return f"{np.median(row['seconds']):.3g} s"
    return spread_of_ratio(row.get("ratio"))


def different_models(figures: dict[str, Any]) -> Iterator[str]:
    """A sentence for each contender that has not learnt the same in the first round as jaxlocal.

    Args:
      figures: of a workload, see `compare_commands`.
    """
    own = figures["contenders"][JAXLOCAL]
    for name, row in figures["contenders"].items():
        if "moved" not in row or "moved" not in own:
            continue
        if row["moved"] is None:
            yield f"{PEERS[name].label} shows no parameters; its loss is compared alone"
        elif (apart := relative_difference(row["moved"], own["moved"])) > SAME_MODEL:
            yield _not_the_same(name, figures, f"learns another model by {apart:.0%}")
        if row["loss"] is not None and not np.isclose(row["loss"], own["loss"], SAME_LOSS):
            yield _not_the_same(name, figures, f"has a loss of {row['loss']:.6g}")


def _not_the_same(name: str, figures: dict[str, Any], what: str) -> str:
    own = figures["contenders"][JAXLOCAL]["loss"]
    label = PEERS[name].label
    return f"not the same training: on {figures['name']} {label} {what}; here it is {own:.6g}"
