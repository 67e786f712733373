"""Train one model on many workers that communicate rarely.

Without flags: Local SGD with the Quadratic Synchronization Rule, 8 workers, a small CNN on
scikit-learn's digits. The same command again resumes a run that was stopped.
`python -m experiments.plan` takes the same flags, and predicts what a run does and sends.
"""

from experiments.launching.command_line import config_help, define_flags, from_flags, run_command
from experiments.launching.joining import find_group, joined
from experiments.launching.starting import start
from experiments.running.training import train


def main() -> int:
    """Train by the flags; returns the exit status."""
    config = from_flags()
    group = find_group(config)
    processes = group.place.processes if group else 1
    start([config], processes if group and group.place.loopback else 1, processes)
    with joined(config, group):
        return train(config)


if __name__ == "__main__":
    define_flags()
    run_command(main, config_help(__doc__))
