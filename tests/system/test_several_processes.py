"""One program on several processes, joined on loopback, gives what it gives in one."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import several_processes as program

from jaxlocal import ConfigurationError, Layout, make_mesh
from jaxlocal.parallel.mesh import balanced_devices

# Float32 rounds at 6e-8; losses of size ten after fifty contracting steps differ by a few of it.
ROUNDING = {"rtol": 2e-6, "atol": 2e-6}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run_joined(processes, devices, folder, what):
    """The program in so many processes of so many devices; nothing of it stays behind."""
    port, places = free_port(), [str(Path(program.__file__).parent), str(Path.cwd())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "XLA_FLAGS": ""}
    command = [sys.executable, program.__file__, str(processes)]
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(processes):
            arguments = [str(number), str(port), str(devices), str(folder), what]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            one = subprocess.Popen([*command, *arguments], env=environment, **pipes)
            stack.callback(one.wait)
            stack.callback(one.kill)
            started.append(one)
        for one in started:
            _, error = one.communicate(timeout=300)
            assert one.returncode == 0, error[-2000:]


@pytest.fixture(scope="module")
def alone():
    """Of one process on one device, the losses of every method."""
    return {name: program.losses(name, jax.devices()[:1]) for name in program.METHODS}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_joined(2, 2, folder, "all")
    return folder


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", ["cser_grbs", "cser_top_k", "diloco"])
def test_losses_do_not_depend_on_the_number_of_devices(name, devices, alone):
    spread_out = program.losses(name, jax.devices()[:devices])
    np.testing.assert_allclose(spread_out, alone[name], **ROUNDING)


def test_two_processes_give_the_losses_of_one(two, alone):
    for number in range(2):
        joined = np.load(two / f"losses{number}.npz")
        for name in program.METHODS:
            np.testing.assert_allclose(joined[name], alone[name], **ROUNDING, err_msg=name)


def test_four_processes_give_the_losses_of_one(tmp_path, alone):
    run_joined(4, 1, tmp_path, "losses")
    for number in (0, 3):
        joined = np.load(tmp_path / f"losses{number}.npz")
        for name in program.METHODS:
            np.testing.assert_allclose(joined[name], alone[name], **ROUNDING, err_msg=name)


def test_a_run_over_processes_reads_its_own_and_tells_all_the_same(two, tmp_path):
    first, second = (json.loads((two / f"told{number}.json").read_text()) for number in range(2))
    halves = [list(range(32)), list(range(32, 64))]
    for told, half, workers in zip((first, second), halves, (range(4), range(4, 8)), strict=True):
        assert told.pop("workers") == list(workers)
        # Of examples that are sorted, worker i holds 8 i to 8 i + 7: four of them a step.
        assert told.pop("streamed") == told.pop("evaluated") == half
    assert first == second
    assert first["source"] == first["pool"] == first["again"]
    assert first["notes"] == {"written by": 0} and first["step"] == 8
    assert first["exported"] == list(range(8))
    assert first["diverged"] == "the loss of worker 6 is inf at step 5"
    # Of worker i the batches are i and i + 8, of which the mean is i + 4; weighted as the workers.
    share = program.FLAT.weight.ravel()
    assert first["mean"] == pytest.approx(share @ (np.arange(8.0) + 4), rel=1e-5)
    alone = program.whole_run(tmp_path)
    for name in ("loss", "distance", "mean"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5)
    assert first["pool"]["square"] == pytest.approx(alone["pool"]["square"], rel=1e-5)
    assert first["diverged"] == alone["diverged"]


class Device:
    def __init__(self, number, process):
        self.id, self.process_index = number, process


def test_every_process_gives_as_many_devices_to_the_mesh():
    devices = [Device(number, number // 4) for number in range(8)]
    chosen = balanced_devices(devices, (1, 6))
    assert [device.id for device in chosen] == [0, 1, 2, 4, 5, 6]
    assert [device.id for device in balanced_devices(devices, (2, 4), (2, 2))] == [0, 1, 4, 5]
    with pytest.raises(ConfigurationError, match="1 hubs × 7 workers .* 2 processes"):
        balanced_devices(devices, (1, 7))
    with pytest.raises(ConfigurationError, match="a mesh of 3 devices .* 2 processes"):
        balanced_devices(devices, (1, 6), (1, 3))
    assert make_mesh(Layout(1, 6)).size == 6  # in one process, all that divide
