"""One program on several processes, joined on loopback, gives the numbers of one process."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import several_processes as program
from processes import ROOT, free_port, processes

pytestmark = pytest.mark.slow


def run_joined(count, devices, folder, what):
    """Run the program in some processes of some devices each."""
    paths = os.pathsep.join([str(Path(program.__file__).parent), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "XLA_FLAGS": ""}
    arguments = (program.__file__, count, "NUMBER", free_port(), devices, folder, what)
    with processes(count, *arguments, environment=environment) as started:
        for one in started:
            _, error = one.communicate(timeout=300)
            assert one.returncode == 0, error[-2000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run_joined(2, 2, folder, "all")
    return folder


def test_two_processes_give_the_losses_of_one(two):
    for number in range(2):
        joined = np.load(two / f"losses{number}.npz")
        for name in program.METHODS:
            alone = program.losses_alone(name)
            np.testing.assert_allclose(joined[name], alone, **program.ROUNDING, err_msg=name)


def test_four_processes_give_the_losses_of_one(tmp_path):
    run_joined(4, 1, tmp_path, "losses")
    for number in (0, 3):
        joined = np.load(tmp_path / f"losses{number}.npz")
        for name in program.METHODS:
            alone = program.losses_alone(name)
            np.testing.assert_allclose(joined[name], alone, **program.ROUNDING, err_msg=name)


def test_each_process_of_a_run_reads_its_examples_and_all_get_the_same_results(two, tmp_path):
    first, second = (json.loads((two / f"results{number}.json").read_text()) for number in range(2))
    for number, results in enumerate([first, second]):
        assert results.pop("workers") == list(range(4 * number, 4 * number + 4))
        # The examples are sorted: worker i holds 8 i to 8 i + 7, and takes four of them a step.
        half = list(range(32 * number, 32 * number + 32))
        assert results.pop("streamed") == results.pop("evaluated") == half
    assert first == second
    assert first["source"] == first["pool"] == first["again"]
    assert first["notes"] == {"written by": 0} and first["step"] == 8
    assert first["exported"] == list(range(8))
    assert first["diverged"] == "the loss of worker 6 is inf at step 5"
    # The batches of worker i are i and i + 8, with the mean i + 4; workers are weighted.
    share = program.FLAT.weight.ravel()
    assert first["mean"] == pytest.approx(share @ (np.arange(8.0) + 4), rel=1e-5)
    alone = program.whole_run(tmp_path)
    for name in ("loss", "distance", "mean"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5)
    assert first["pool"]["square"] == pytest.approx(alone["pool"]["square"], rel=1e-5)
    assert first["diverged"] == alone["diverged"]
    assert first["undamaged"] == [*alone["undamaged"]] == [1, ["1", "2.damaged"]]
