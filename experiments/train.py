"""Train one model on many workers that rarely talk.

Without flags: Local SGD with the quadratic synchronization rule, 8 workers, a small CNN on
scikit-learn's digits. The same command again goes on where it stopped. `python -m experiments.plan`
takes the same flags and says beforehand what a run would do and say.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.building.config import Config, default_workdir
from experiments.building.job import Job, build_job, make_round_fn, measure_every, save_every
from experiments.launching.command_line import FAILED, INTERRUPTED, define_flags, run_binary
from experiments.launching.joining import find_group, joined
from experiments.launching.starting import start
from experiments.plotting.display import Display
from experiments.plotting.partition import plot_partition
from experiments.running.feeding import Feed
from experiments.running.measuring import Measure, check_model
from experiments.running.recording import CHECKPOINTS, PARTITION, Recorder, record
from experiments.running.reporting import export_model, leave, title_of
from experiments.running.seeds import train_several
from jaxlocal import ConfigurationError, RoundFn
from jaxlocal.communication.accounting import model_bits
from jaxlocal.data import StreamError
from jaxlocal.training.checkpoints import Checkpoints, SavingError
from jaxlocal.training.loop import Diverged, Progress, run, schedule
from jaxlocal.types import TrainState


def train(config: Config) -> int:
    """Run a config to its end, leaving its folder behind; returns the exit status."""
    folder = Path(config.workdir) if config.workdir else default_workdir(config)
    if config.seeds > 1:
        return train_several(config, folder, train)
    job = build_job(config)
    if job.dataset is None or job.model is None:
        raise ConfigurationError(
            f"--parameters={config.parameters} is for experiments.plan; training needs a model"
        )
    next(schedule(job.method, job.steps))
    with Feed(job) as feed:
        check_model(job)
        round_fn = make_round_fn(job, feed.pool)
        recorder = record(folder, config)
        with _checkpoints(job, folder) as checkpoints:
            return _Run(job, round_fn, feed, recorder, checkpoints).to_the_end()


def _checkpoints(job: Job, folder: Path) -> Any:
    """Those of the folder, from which a run goes on even where it is not to be saved."""
    if not save_every(job) and not (folder / CHECKPOINTS).exists():
        return contextlib.nullcontext()
    return Checkpoints(folder / CHECKPOINTS, job.config.keep)


class _Run:
    """One run in its folder, from its start or from its newest checkpoint."""

    def __init__(
        self,
        job: Job,
        round_fn: RoundFn,
        feed: Feed,
        recorder: Recorder,
        checkpoints: Checkpoints | None,
    ):
        self.job, self.round_fn, self.feed = job, round_fn, feed
        self.recorder, self.checkpoints = recorder, checkpoints
        self.state, notes = self._start()
        said = model_bits(self.state.params) if job.compressors else 0
        self.first = jax.process_index() == 0  # of several processes the one that writes and shows
        self.display = Display(job.steps, said, quiet=not self.first)
        self.ended: str | None = notes.get("ended")
        self.measurements: int | None = notes.get("measurements")
        self.measure = Measure(job, round_fn, feed.first, notes.get("seconds", 0.0))

    def _start(self) -> tuple[TrainState, dict]:
        """The newest state of the folder, or a fresh one."""
        assert self.job.model is not None
        key = jax.random.key(self.job.config.seed)
        if self.checkpoints and self.checkpoints.steps:
            shapes = self.round_fn.shapes(*jax.eval_shape(self.job.model.init, key))
            return self.checkpoints.restore(shapes)
        params, model_state = jax.jit(self.job.model.init)(key)
        return self.round_fn.init(params, key, model_state), {}

    def to_the_end(self) -> int:
        config, display = self.job.config, self.display
        begin = int(self.state.step)
        self.recorder.begin(begin, self.measurements)
        self._say_what_is_unusual(begin)
        if config.plot_partition and self.first:
            self._plot_partition()
        status, why = (0, self.ended) if self.ended else self._train()
        if self.checkpoints:
            self.checkpoints.wait()
        if self.first:
            seconds = self.measure.seconds
            leave(self.job, self.round_fn, self.recorder, display, seconds, why)
        if config.export and not status:
            export_model(self.round_fn, self.recorder, display, self.measure, self.state)
        if status:
            print(f"error: {why}", file=sys.stderr)
        return status

    def _train(self) -> tuple[int, str]:
        """Take the steps to their end; returns the exit status and how it ended."""
        job, config = self.job, self.job.config
        progresses = run(
            self.round_fn, self.state, self.feed, job.steps, measure_every(job), save_every(job)
        )
        try:
            with self.display.live():
                return self._follow(progresses, config.stop_train_loss)
        except Diverged as error:
            return FAILED, f"diverged: {error}"
        except (SavingError, StreamError, KeyboardInterrupt) as error:
            if jax.process_count() > 1:
                raise  # the others, who do not know, end too: the run goes on from a checkpoint
            if not isinstance(error, SavingError):
                self._save_where_it_stands()
            interrupted = isinstance(error, KeyboardInterrupt)
            return (INTERRUPTED, "interrupted") if interrupted else (FAILED, str(error))

    def _follow(self, progresses: Iterator[Progress], enough: float | None) -> tuple[int, str]:
        why = "finished"
        for progress in progresses:
            line = self.measure(progress) if progress.due else None
            if line:
                self.recorder.measured(line)
            self.state = progress.state  # of which all that is due has been measured
            self.display.show(progress, line)
            loss = line["train_loss"] if line else math.inf
            if line and not math.isfinite(loss):
                return (
                    FAILED,
                    f"diverged: the average model's loss is {loss} at step {progress.step}",
                )
            stop = enough is not None and loss < enough
            if stop:
                why = f"training loss {loss:.4g} < {enough:g}"
            if progress.save or (stop and save_every(self.job)):
                self._save(why if stop or progress.step == self.job.steps else None)
            if stop:
                break
        return 0, why

    def _save(self, ended: str | None = None) -> None:
        assert self.checkpoints is not None
        self.recorder.settle()
        notes = {"seconds": self.measure.seconds, "measurements": len(self.recorder.lines)}
        self.checkpoints.save(self.state, notes | ({"ended": ended} if ended else {}))

    def _save_where_it_stands(self) -> None:
        """Unless the device was at work on the state, or nothing is new."""
        alive = not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
        if self.checkpoints and save_every(self.job) and alive:
            step = int(self.state.step)
            finite = math.isfinite(float(self.round_fn.consensus_distance(self.state)))
            if finite and step and step not in self.checkpoints.steps:
                self._save()

    def _say_what_is_unusual(self, begin: int) -> None:
        hubs, workers = self.job.layout.shape
        if self.round_fn.mesh.size < jax.device_count():
            self.display.say(
                f"{hubs} hubs × {workers} workers divide over {self.round_fn.mesh.size} of the "
                f"{jax.device_count()} devices; the others stay idle"
            )
        if self.ended:
            self.display.say(f"this run has ended; delete {self.recorder.folder} to run it again")
        elif begin:
            self.display.say(f"going on from step {begin}")

    def _plot_partition(self) -> None:
        dataset, config = self.job.dataset, self.job.config
        assert dataset is not None
        path = self.recorder.folder / PARTITION
        title = f"{config.dataset}, {config.partition}, {title_of(self.job).split(', ')[-1]}"
        targets = self.feed.targets
        classes = dataset.classes if targets.ndim == 1 else 0  # a text has no label
        plot_partition(path, targets, self.feed.batches, classes, title)


def main_on(config: Config) -> int:
    group = find_group(config)
    place = group.place if group else None
    count = place.processes if place else 1
    start([config], count if place and place.loopback else 1, count)
    with joined(config, group):
        return train(config)


def main() -> None:
    define_flags()
    run_binary(main_on, __doc__ or "")


if __name__ == "__main__":
    main()
