"""The table of the suite `peers`, in Markdown, and what it does not tell."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.peers.contender import PEERS
from experiments.benchmarks.speed.comparison import SAME_LOSS
from experiments.benchmarks.speed.contender import JAXLOCAL
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
    own = figures["contenders"][JAXLOCAL].get("loss")
    for name, row in figures["contenders"].items():
        who = f"not the same training: on {figures['name']} {PEERS[name].label}"
        if row.get("difference", 0) > SAME_MODEL:
            yield f"{who} has moved elsewhere, by {row['difference']:.0%} of the way of jaxlocal"
        loss = row.get("loss")
        if loss is not None and own is not None and not np.isclose(loss, own, SAME_LOSS):
            yield f"{who} has a loss of {loss:.6g}, jaxlocal one of {own:.6g}"
