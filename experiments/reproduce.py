"""Reproduce a figure of a paper: python -m experiments.reproduce NAME [--scale=full].

Runs the settings of the figure with several seeds, and writes the measurements (CSV), a picture in
the manner of the paper's, and a table in Markdown with the published values beside the measured
ones. --list names all figures, with what they cost. The same command again resumes what was
stopped, and runs nothing that has ended.
"""

from pathlib import Path

from absl import flags
from absl.flags import FLAGS

from experiments.building.files import local_path
from experiments.launching.command_line import run_command
from experiments.reproducing.reproduce import list_figures, reproduce
from jaxlocal import ConfigurationError


def main(*names: str) -> int:
    """Reproduce the figure of the command line; returns the exit status."""
    if FLAGS.list:
        if names:
            raise ConfigurationError(
                f"--list names all figures, and takes no name, got {names[0]!r}"
            )
        print(list_figures())
        return 0
    if len(names) != 1:
        raise ConfigurationError(
            f"give the name of one figure, got {len(names)}; --list names all of them"
        )
    folder, data = _path("workdir"), _path("data_dir")
    return reproduce(names[0], FLAGS.scale, folder, None if data is None else str(data), FLAGS.jobs)


def _path(flag: str) -> Path | None:
    given = FLAGS[flag].value
    return None if given is None else Path(local_path(f"--{flag}", given))


if __name__ == "__main__":
    flags.DEFINE_string("scale", None, "small: on a CPU; full: as in the paper.")
    flags.DEFINE_integer("jobs", 1, "Runs at once, each in a process.", lower_bound=1)
    flags.DEFINE_bool("list", False, "Name all figures, with what they cost.")
    flags.DEFINE_string("workdir", None, "Folder; by default runs/reproduce/NAME-SCALE.")
    flags.DEFINE_string("data_dir", None, "Folder of prepared TensorFlow Datasets.")
    run_command(main, __doc__, operands=True)
