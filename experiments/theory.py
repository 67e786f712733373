"""Theory beside practice: the bound of MLL-SGD, exact moments and measured runs on hub graphs.

Trains least squares with gradient noise on 10 hubs × 4 workers of several hub graphs. Writes
OUTPUT.csv and OUTPUT.png. docs/theory_mll.md derives the bound.
"""

from absl import flags
from absl.flags import FLAGS

from experiments.bounding.figure import draw, write_table
from experiments.bounding.least_squares import GRAPHS, compare
from experiments.building.files import local_path
from experiments.launching.command_line import run_command
from jaxlocal import ConfigurationError


def main() -> int:
    """Compare theory and practice on every graph; returns the exit status."""
    output = local_path("--output", FLAGS.output)
    if not output.absolute().parent.is_dir():
        raise ConfigurationError(f"--output={output} is in a folder that does not exist")
    found = []
    for graph in GRAPHS:
        found.append(compare(graph, FLAGS.seeds))
        one = found[-1]
        print(
            f"{graph}: ζ = {one.zeta:.3f}, bound {one.bound.total:.4g}, exact "
            f"{one.exact.gradient:.4g}, measured {sum(one.measured) / len(one.measured):.4g}",
            flush=True,
        )
    found.sort(key=lambda one: one.zeta)
    write_table(output.with_name(output.name + ".csv"), found)
    draw(output.with_name(output.name + ".png"), found)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("output", "theory_mll", "Files that are written, without .csv and .png.")
    flags.DEFINE_integer("seeds", 3, "Runs on each graph.", lower_bound=1)
    run_command(main, __doc__)
