"""`kill -9` at random moments of a run, of one process or of two: the same command resumes it, and
it ends with the same bits as a run that was not stopped."""

import random
import shutil
import time

import pytest
from processes import joined, processes
from short_runs import saved_steps, without_time

from experiments.running.recording import read_metrics

pytestmark = pytest.mark.slow

STEPS = 200
RUN = [
    *("--dataset=least_squares", "--model=linear", "--workers=4", "--batch_size=8"),
    *(f"--steps={STEPS}", "--eval_every=50", "--checkpoint_every=10", "--export"),
]
METHODS = {
    "qsr": ["--local_steps=4", "--period_coefficient=0.08"],
    "mll_sgd": ["--method=mll_sgd", "--hubs=2", "--hub_period=2", "--rates=0.5,1"],
    "cser": [
        *("--method=cser", "--local_steps=8"),
        *("--gradient_compressor=grbs:4", "--reset_compressor=grbs:2"),
    ],
    "diloco": ["--method=diloco", "--local_steps=8", "--optimizer=adamw", "--learning_rate=0.01"],
}
SOON, START = 0.1, 5.0  # seconds: at most after a checkpoint, and that a program takes to start


def started(count, folder, flags):
    """Start a run on some processes."""
    if count > 1:
        return joined(count, folder, [*RUN, *flags])
    return processes(1, "-m", "experiments.train", f"--workdir={folder}", *RUN, *flags)


def to_the_end(count, folder, flags):
    """Run to the end; returns what must be the same in all such runs."""
    with started(count, folder, flags) as all_of_them:
        ended = [one.communicate(timeout=300) for one in all_of_them]
    for one, (_, error) in zip(all_of_them, ended, strict=True):
        assert one.returncode == 0 and not error, error
    model = (folder / "export" / "model.safetensors").read_bytes()
    return without_time(read_metrics(folder)), model


def kill(count, folder, flags, victims, choose):
    """Run, and kill some of the processes at a random step, or before the first step of a run that
    is resumed beyond it; the others end by themselves."""
    step, after = choose.randrange(STEPS), SOON
    with started(count, folder, flags) as all_of_them:
        if newest(folder) > step:
            after = START
        while newest(folder) < step and all_of_them[0].poll() is None:
            time.sleep(0.005)
        time.sleep(choose.uniform(0, after))
        for number in victims:
            all_of_them[number].kill()
        for one in all_of_them:
            one.communicate(timeout=300)


def newest(folder):
    return max(saved_steps(folder), default=0)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_bit_identical(method, count, times, tmp_path):
    choose, flags = random.Random(f"{method} {count} {times}"), METHODS[method]
    whole = to_the_end(count, tmp_path / "whole", flags)
    resumed_from = []
    for number in range(times):
        victims = choose.choice([range(count), [choose.randrange(count)]])
        kill(count, tmp_path / "run", flags, victims, choose)
        resumed_from.append(newest(tmp_path / "run"))
        if resumed_from[-1] == STEPS or number == times - 1:
            assert to_the_end(count, tmp_path / "run", flags) == whole
            shutil.rmtree(tmp_path / "run")
    print(f"{method} on {count}: {times} kills; resumed from steps {resumed_from}")
