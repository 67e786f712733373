"""Train by a config: one run, or one run for each of several seeds."""

import dataclasses
from pathlib import Path

import jax

from experiments.building.config import Config, default_workdir
from experiments.building.job import build_job
from experiments.running.locking import locked
from experiments.running.recording import check_same_run
from experiments.running.run import run_job
from experiments.running.seeds import report_seeds


def train(config: Config) -> int:
    """Run a config to its end and write its folder; the same config resumes it.

    Returns:
      The exit status; of several seeds, that of the first that fails.

    Raises:
      ConfigurationError: flags that do not fit each other, the data, the devices or the folder; or
        another process runs in the folder.
    """
    folder = Path(config.workdir) if config.workdir else default_workdir(config)
    if config.seeds > 1:
        return _train_seeds(config, folder)
    return run_job(build_job(config), folder)


def _train_seeds(config: Config, folder: Path) -> int:
    """Run the seeds one after another, each in a subfolder, and report their mean."""
    seeds = range(config.seed, config.seed + config.seeds)
    folders = [folder / f"seed_{seed}" for seed in seeds]
    jobs = [
        build_job(dataclasses.replace(config, seed=seed, seeds=1, workdir=str(place)))
        for seed, place in zip(seeds, folders, strict=True)
    ]
    check_same_run(folder, config)
    with locked(folder):
        for job, place in zip(jobs, folders, strict=True):
            if status := run_job(job, place, (folder, config)):
                return status
        if jax.process_index() == 0:  # of several processes the one that writes
            report_seeds(config, folder, seeds, folders)
    return 0
