"""Compare runs of experiments.train: a picture over steps, communication and time, and a table.

Takes folders of runs: python -m experiments.compare WORKDIR... [--output=compare.png]. A folder of
several seeds, with runs in its subfolders seed_0, seed_1, ..., counts as one run: the mean over the
seeds, in a band of one standard error. A run that is not finished is shown up to its last
measurement.
"""

from absl import flags
from absl.flags import FLAGS

from experiments.building.files import local_path
from experiments.comparing.compare import compare
from experiments.launching.command_line import run_command


def main(*folders: str) -> int:
    """Compare the runs in some folders; returns the exit status."""
    places = [local_path("the folder", folder) for folder in folders]
    compare(places, local_path("--output", FLAGS.output), FLAGS.target_accuracy)
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
