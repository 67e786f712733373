"""One run in its folder, from its start or from its newest checkpoint to its end."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.building.config import Config
from experiments.building.job import (
    Job,
    initial_state,
    make_round_fn,
    measure_every,
    save_every,
)
from experiments.launching.statuses import FAILED
from experiments.launching.stopping import WORDS, Patience, status_of
from experiments.plotting.display import Display
from experiments.plotting.partition import plot_partition
from experiments.running.compiling import compile_ahead
from experiments.running.feeding import Feed
from experiments.running.locking import locked
from experiments.running.measuring import Measure
from experiments.running.recording import PARTITION, Recorder, check_same_run, record, writing
from experiments.running.reporting import export_model, report, title_of
from experiments.running.saving import Saver
from jaxlocal import RoundFn
from jaxlocal.communication.accounting import model_bits
from jaxlocal.data import StreamError
from jaxlocal.training.ahead import Ahead
from jaxlocal.training.checkpoints import SavingError
from jaxlocal.training.loop import Diverged, Progress, run


def run_job(job: Job, folder: Path, seeds: tuple[Path, Config] | None = None) -> int:
    """Train a job, or resume it from its newest checkpoint, and write its folder.

    Args:
      seeds: folder and config of several seeds, if this job is one of them.

    Returns:
      The exit status.

    Raises:
      ConfigurationError: data that cannot be read, or a folder of another run, or one in which
        another process runs.
    """
    check_same_run(folder, job.config)
    with Feed(job) as feed, locked(folder) as check_held:
        round_fn = make_round_fn(job, feed.pool)
        recorder = record(folder, job.config, check_held, seeds)
        with Saver(job, folder) as saver, Ahead() as ahead:
            return _Run(job, round_fn, feed, recorder, saver, ahead).to_the_end()


class _Run:
    """A run that is under way: its state, and everything that watches it."""

    def __init__(
        self,
        job: Job,
        round_fn: RoundFn,
        feed: Feed,
        recorder: Recorder,
        saver: Saver,
        ahead: Ahead,
    ):
        self.job, self.round_fn, self.feed = job, round_fn, feed
        self.recorder, self.saver = recorder, saver
        self.measure = Measure(job, round_fn, feed.first)
        if not saver.steps:
            compile_ahead(job, round_fn, feed, self.measure, ahead)
        restored = saver.newest(job.state)
        self.state, notes = restored or (initial_state(job, round_fn), {})
        self.measure.start(notes.get("seconds", 0.0))
        self.first = jax.process_index() == 0  # of several processes the one that writes and shows
        uncompressed = model_bits(job.state.params) if job.compressors else 0
        self.display = Display(job.steps, uncompressed, quiet=not self.first)
        self.ended: str | None = notes.get("ended")
        self.measurements: int | None = notes.get("measurements")

    def to_the_end(self) -> int:
        """Train, then write what the run leaves; returns the exit status."""
        begin = int(self.state.step)
        self.recorder.begin(begin, self.measurements)
        self._show_start(begin)
        with Patience() as self.patience:
            status, why = (0, self.ended) if self.ended else self._train()
            self.saver.wait()
        if self.first:
            seconds = self.measure.seconds
            report(self.job, self.round_fn, self.recorder, self.display, seconds, why)
        if self.job.config.export and not status:
            for average in (None, *self.job.running_averages):
                state = self.measure.model(self.state, average)
                export_model(self.round_fn, self.recorder, self.display, state, average or "")
        if status:
            print(f"error: {why if status == FAILED else self._stopped(status)}", file=sys.stderr)
        return status

    def _train(self) -> tuple[int, str]:
        """Take all steps; returns the exit status and the reason of the end."""
        job = self.job
        progresses = run(
            self.round_fn, self.state, self.feed, job.steps, measure_every(job), save_every(job)
        )
        try:
            with self.display.live():
                return self._follow(progresses)
        except Diverged as error:
            return FAILED, f"diverged: {error}"
        except (SavingError, StreamError) as error:
            if jax.process_count() > 1:
                raise  # the other processes end too, and the run resumes from a checkpoint
            number = self.patience.asked()
            if isinstance(error, StreamError) and number:  # it ended the processes that read too
                return self._stop(number)
            if isinstance(error, StreamError) and self.saver.wants(self.round_fn, self.state):
                self._save()
            return FAILED, str(error)

    def _follow(self, progresses: Iterator[Progress]) -> tuple[int, str]:
        """Measure, show and save every progress that is due."""
        for progress in progresses:
            line = self.measure(progress) if progress.due else None
            if line:
                self.recorder.add(line)
            self.state = progress.state  # everything due at its step is measured
            self.display.show(progress, line)
            loss = line["train_loss"] if line else 0.0
            if not math.isfinite(loss):
                where = f"at step {progress.step}"
                return FAILED, f"diverged: the average model's loss is {loss} {where}"
            enough = self.job.config.stop_train_loss
            if line and enough is not None and loss < enough:
                why = f"training loss {loss:.4g} < {enough:g}"
                self._save(why)
                return 0, why
            last = progress.step == self.job.steps
            if progress.save:
                self._save("finished" if last else None)
            if not last and (number := self._asked(progress)):
                return self._stop(number)
        return 0, "finished"

    def _asked(self, progress: Progress) -> int:
        """The signal by which the run is asked to end, or 0; several processes agree on it where a
        measurement or a checkpoint is due."""
        if progress.step == 0:
            return 0  # nothing is lost yet
        number = self.patience.asked()
        if jax.process_count() > 1 and (progress.due or progress.save):
            return int(multihost_utils.process_allgather(np.int32(number)).max())
        return number if jax.process_count() == 1 else 0

    def _stop(self, number: int) -> tuple[int, str]:
        """Save the run where it is; returns the exit status and the reason of the end."""
        if self.saver.wants(self.round_fn, self.state):
            self._save()
        return status_of(number), "interrupted"

    def _stopped(self, status: int) -> str:
        """The sentence about a run that was asked to end."""
        how = next(word for number, word in WORDS.items() if status_of(number) == status)
        sentence = f"{how} at step {int(self.state.step)}; the same command"
        if not self.saver.steps:
            return f"{sentence} starts again, as {self.recorder.folder} has no checkpoint"
        return f"{sentence} resumes from step {self.saver.steps[-1]}, in {self.recorder.folder}"

    def _save(self, ended: str | None = None) -> None:
        self.recorder.flush()
        notes = {"seconds": self.measure.seconds, "measurements": len(self.recorder.lines)}
        self.saver.save(self.state, notes | ({"ended": ended} if ended else {}))

    def _show_start(self, begin: int) -> None:
        """Show what is unusual about the start of the run, and the partition if it is asked for."""
        hubs, workers = self.job.layout.shape
        if self.round_fn.mesh.size < jax.device_count():
            self.display.note(
                f"{hubs} hubs × {workers} workers divide over {self.round_fn.mesh.size} of the "
                f"{jax.device_count()} devices; the others stay idle"
            )
        if self.ended:
            self.display.note(f"this run has ended; delete {self.recorder.folder} to run it again")
        elif begin:
            self.display.note(f"resuming from step {begin}")
        if self.job.config.plot_partition and self.first:
            self._plot_partition()

    def _plot_partition(self) -> None:
        dataset, config = self.job.dataset, self.job.config
        path = self.recorder.folder / PARTITION
        title = f"{config.dataset}, {config.partition}, {title_of(self.job).split(', ')[-1]}"
        targets = self.feed.targets
        classes = dataset.classes if targets.ndim == 1 else 0  # a text has no label
        with writing(path):
            plot_partition(path, targets, self.feed.batches, classes, title)
