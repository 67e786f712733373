"""Streaming: the same batches as a pool on the device, read ahead, and clear errors."""

import functools
import os
import re
import signal
import subprocess
import sys
import time

import cloudpickle
import jax
import numpy as np
import pytest

from jaxlocal.data import make_batches
from jaxlocal.data.crop_flip import CropFlip, crop_and_flip
from jaxlocal.data.reading import StreamError
from jaxlocal.data.streaming import Stream
from jaxlocal.errors import ConfigurationError

# Reading processes import neither this file nor pytest's folders.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

GRID = (2, 3)  # hubs, workers
BATCH, SEED = 4, 7


class Images:
    """Examples in memory; with a folder, it notes the reading process and the examples read."""

    def __init__(self, examples=50, folder=None):
        self.images = np.random.default_rng(0).integers(1, 256, (examples, 6, 5, 3), np.uint8)
        self.folder, self.broken = folder, ()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        if self.folder:
            (self.folder / str(os.getpid())).touch()
            (self.folder / f"example{number}").touch()
        if number in self.broken:
            raise Unpicklable(f"example{number}.jpg is truncated")
        return {"inputs": self.images[number], "targets": number}


class AtOnce(Images):
    def __getitem__(self, number):
        raise AssertionError("one by one")

    def __getitems__(self, numbers):
        return [Images.__getitem__(self, number) for number in numbers]


class Unpicklable(OSError):
    """An error that another process cannot send."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


def batches(spec="iid", examples=50):
    return make_batches(spec, np.arange(examples) % 5, *GRID, BATCH, SEED).indices


def one_by_one(start, steps):
    """Example numbers without repeats, so that each example belongs to one step."""
    first = np.arange(start, start + steps) * 6
    return (first[:, None] + np.arange(6)).reshape(steps, 1, 2, 3)


crop_and_flip_compiled = jax.jit(crop_and_flip)


def resident(source, indices, augmentation, start, steps):
    """The same batches from a pool: a look-up, then the augmentation of the device."""
    numbers = indices(start, steps)
    draws = augmentation.draw(SEED, start, steps, *GRID, BATCH)
    images = source.images[numbers]
    for step, moves in enumerate(zip(draws["shift"], draws["flip"], strict=True)):
        images[step] = crop_and_flip_compiled(images[step], *moves)
    return {"inputs": images, "targets": numbers}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name].dtype == values.dtype and type(got[name]) is np.ndarray
        np.testing.assert_array_equal(got[name], values)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def readers(folder):
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


@pytest.mark.parametrize("spec", ["iid", "fresh", "sorted"])
@pytest.mark.parametrize("kind", [Images, AtOnce])
def test_threads_give_the_batches_of_a_pool(spec, kind):
    source, indices, augmentation = kind(), batches(spec), CropFlip(2)
    with Stream(source, indices, SEED, augmentation) as stream:
        expected = functools.partial(resident, source, batches(spec), augmentation)
        for start, steps in [(3, 4), (7, 1), (8, 0), (8, 13), (2, 5), (7, 3)]:
            assert_equal(stream(start, steps), expected(start, steps))


def test_processes_give_the_same_resume_like_grain_and_a_death_is_an_error(tmp_path):
    source, indices, augmentation = Images(folder=tmp_path), batches(), CropFlip(2)
    expected = functools.partial(resident, source, indices, augmentation)
    stream = Stream(source, indices, SEED, augmentation, processes=2, buffer_bytes=4096)
    (tmp_path / str(os.getpid())).unlink()  # the first example is read here
    for start, steps in [(5, 3), (8, 1), (9, 12)]:
        assert_equal(stream(start, steps), expected(start, steps))
    [iterator] = stream._running
    state = iterator.get_state()
    after = stream(21, 2)
    iterator.set_state(state)  # by Grain's interface, back to before step 21
    for step in range(2):
        again = next(iterator)
        assert_equal(
            {name: np.array(x) for name, x in again.items()},
            {k: v[0] for k, v in expected(21 + step, 1).items()},
        )
    del again
    assert_equal(after, expected(21, 2))
    pids = readers(tmp_path)
    assert len(pids) == 2 and all(map(alive, pids))
    os.kill(pids[1], signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(StreamError, match="step .* a reading process was ended by SIGKILL"):
        stream(23, 1000)
    assert time.monotonic() - begin < 15
    assert not any(map(alive, pids))  # the other process was ended too


def test_an_error_in_a_process_is_passed_on_and_no_process_is_left(tmp_path):
    source = Images(folder=tmp_path)
    source.broken = (12,)  # the first example of step 2
    stream = Stream(source, one_by_one, processes=1)
    assert stream(0, 2)["targets"].tolist() == one_by_one(0, 2).tolist()
    message = r"^step 2 could not be read: Unpicklable: example12.jpg is truncated in example 12$"
    with pytest.raises(StreamError, match=message) as raised:
        stream(2, 3)
    assert raised.value.step == 2
    pids = set(readers(tmp_path)) - {os.getpid()}
    assert len(pids) == 1 and not any(map(alive, pids))


def test_an_abandoned_stream_ends_its_processes(tmp_path):
    stream = Stream(Images(folder=tmp_path), one_by_one, processes=1)
    stream(0, 1)
    [pid] = set(readers(tmp_path)) - {os.getpid()}
    assert alive(pid)
    del stream
    assert not alive(pid)


def test_a_transform_is_seeded_by_its_position():
    def transform(example, generator):
        corner = generator.integers(3)
        image = example["inputs"]
        return {"inputs": image[corner : corner + 3, :2], "targets": np.float64(corner)}

    source, indices = Images(), batches()
    with Stream(source, indices, SEED, transform=transform) as stream:
        got = stream(4, 3)
    numbers = indices(4, 3)
    assert got["targets"].dtype == np.float32 and got["inputs"].shape == (3, *GRID, BATCH, 3, 2, 3)
    for at, number in np.ndenumerate(numbers):
        step, hub, worker, position = at
        seed = (SEED, 6, 4 + step, hub * GRID[1] + worker, position)
        corner = np.random.default_rng(seed).integers(3)
        assert got["targets"][at] == corner
        image = source.images[number]
        np.testing.assert_array_equal(got["inputs"][at], image[corner : corner + 3, :2])


def test_it_reads_ahead_and_no_further_than_the_buffer(tmp_path):
    step_bytes = 6 * (6 * 5 * 3 + 4)
    source = Images(10_000, tmp_path)
    with Stream(source, one_by_one, buffer_bytes=3 * step_bytes) as stream:
        stream(0, 1)
        # No call asks for step 2: it is read ahead.
        wait_for((tmp_path / "example12").exists)
        time.sleep(0.3)
        read = max(int(path.name[7:]) for path in tmp_path.glob("example*")) // 6
    # Step 0, the buffer, one step before the buffer and one step in each thread.
    assert read <= 3 + 1 + min(3, os.cpu_count())


def test_a_call_after_an_error_restarts_the_reading():
    source = Images()
    source.broken = (13,)
    with Stream(source, one_by_one) as stream:
        with pytest.raises(StreamError, match="example13.jpg is truncated") as raised:
            stream(0, 5)
        assert raised.value.step == 2
        assert isinstance(raised.value.__cause__, Unpicklable)
        assert stream(3, 1)["targets"].tolist() == one_by_one(3, 1).tolist()


def test_examples_that_differ_and_transforms_that_exit_are_errors():
    def other_shape(example, _):
        return {"inputs": example["inputs"][: 5 if example["targets"] == 8 else 6]}

    def leaves(example, _):
        return sys.exit(0) if example["targets"] == 8 else example

    shapes = r"inputs uint8\[5, 5, 3\], but .* inputs uint8\[6, 5, 3\] in example 8"
    for transform, message in [(other_shape, shapes), (leaves, "SystemExit: 0")]:
        stream = Stream(Images(), one_by_one, transform=transform)
        with pytest.raises(StreamError, match="step 1 could not be read: .*" + message):
            stream(0, 2)


def test_mistakes_are_errors_of_the_constructor(monkeypatch):
    source = Images()
    with pytest.raises(ConfigurationError, match="processes must not be negative, got -1"):
        Stream(source, one_by_one, processes=-1)
    with pytest.raises(ConfigurationError, match=r"needs inputs .* got x uint8\[3\]"):
        Stream([{"x": np.zeros(3, np.uint8)}], one_by_one, augmentation=CropFlip())
    with pytest.raises(ConfigurationError, match="first example .* IndexError.* in example 0"):
        Stream([], one_by_one)
    with pytest.raises(ConfigurationError, match="must pickle: TypeError.*; processes=0"):
        Stream(source, one_by_one, processes=1, transform=lambda e, _, f=sys.stdout: e)
    vast = [{"inputs": np.broadcast_to(np.uint8(0), (2**22, 2**20))}]
    with pytest.raises(ConfigurationError, match="3 processes .* MiB in /dev/shm, which has"):
        Stream(vast, one_by_one, processes=3)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ConfigurationError, match="needs grain, which is not installed"):
        Stream(source, one_by_one)


# Background jobs of a shell and their children ignore SIGINT; this script does not.
SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import numpy as np
from jaxlocal.data.streaming import Stream

class Numbers:
    def __getitem__(self, number):
        return {"inputs": np.float32(number), "targets": os.getpid()}

def indices(start, steps):
    return np.ones((steps, 1, 1, 1), int)

def main():
    global stream
    stream = Stream(Numbers(), indices, processes=1, buffer_bytes=1)
    print(stream(0, 1)["targets"].item(), flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)

if sys.argv[1] == "unguarded" or __name__ == "__main__":
    main()
"""


@pytest.mark.slow  # four programs and their processes
def test_every_end_of_a_program_ends_its_processes(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    start = functools.partial(
        subprocess.Popen,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    modes = {"end": None, "wait": signal.SIGINT, "unguarded": None}
    programs = {mode: start([sys.executable, str(path), mode]) for mode in modes}
    orphan = start([sys.executable, str(path), "wait"])
    pids = {mode: programs[mode].stdout.readline().strip() for mode in ("end", "wait")}
    pids["orphan"] = orphan.stdout.readline().strip()
    os.killpg(programs["wait"].pid, signal.SIGINT)  # to the whole group, as Ctrl-C does
    os.kill(orphan.pid, signal.SIGKILL)
    errors = {mode: program.communicate(timeout=60)[1] for mode, program in programs.items()}
    orphan.communicate(timeout=60)
    assert programs["end"].returncode == 0 and errors["end"] == ""
    assert re.fullmatch(r"Traceback[^\0]*\nKeyboardInterrupt\n", errors["wait"])
    last = errors["unguarded"].strip().splitlines()[-1]
    assert re.search(r"StreamError: step 0 .* status 1, .* main module has no `if __name__", last)
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.values()))
