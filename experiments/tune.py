"""Compare settings fairly: each at its best learning rate of a common grid, with several seeds.

python -m experiments.tune --settings=FILE --learning_rates=0.02,0.05,0.1 --seeds=3, and flags of
experiments.train, which all settings share. A line of the file is NAME: --flag=value --flag=value.

Each setting is run at every learning rate with --seed. The best by final test accuracy (by test
loss if there is no accuracy) is run again with the next --seeds seeds, whose mean and standard
error are reported. The same command again resumes a search that was stopped.
"""

from pathlib import Path

from absl import flags
from absl.flags import FLAGS

from experiments.launching.command_line import config_help, define_flags, from_flags, run_command
from experiments.tuning.search import tune
from jaxlocal import ConfigurationError


def main() -> int:
    """Tune the settings of the flags; returns the exit status."""
    if FLAGS.settings is None or not FLAGS.learning_rates:
        raise ConfigurationError("give --settings=FILE and --learning_rates, as in 0.02,0.05,0.1")
    try:
        rates = sorted({float(text) for text in FLAGS.learning_rates})
    except ValueError:
        given = ",".join(FLAGS.learning_rates)
        raise ConfigurationError(
            f"--learning_rates={given} must be numbers separated by commas"
        ) from None
    return tune(from_flags(), Path(FLAGS.settings), rates, FLAGS.jobs)


if __name__ == "__main__":
    define_flags()
    flags.DEFINE_string("settings", None, "File with a line NAME: --flag=value … per setting.")
    flags.DEFINE_list("learning_rates", [], "Learning rates of the grid, separated by commas.")
    flags.DEFINE_integer("jobs", 1, "Runs at once, each in a process.", lower_bound=1)
    run_command(main, config_help(__doc__))
