"""Compare runs of experiments.train: a picture over steps, communication and time, and a table.

Takes folders of runs: python -m experiments.compare WORKDIR... [--output=compare.png]. A folder of
several seeds, with runs in its subfolders seed_0, seed_1, ..., counts as one run: the mean over the
seeds, in a band of one standard error. A run that is not finished is shown up to its last
measurement.
"""

import math

from absl import flags
from absl.flags import FLAGS

from experiments.building.files import local_path
from experiments.comparing.compare import compare
from experiments.launching.command_line import run_command
from jaxlocal import ConfigurationError


def main(*folders: str) -> int:
    """Compare the runs in some folders; returns the exit status."""
    places = [local_path("the folder", folder) for folder in folders]
    target = FLAGS.target_accuracy
    if target is not None and math.isnan(target):
        raise ConfigurationError("--target_accuracy must be a number from 0 to 1, got nan")
    compare(places, local_path("--output", FLAGS.output), target)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("output", "compare.png", "File of the picture: png, pdf or svg.")
    flags.DEFINE_float(
        "target_accuracy",
        None,
        "Test accuracy to which costs are compared. By default the largest that all runs reach.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    run_command(main, __doc__, operands=True)
