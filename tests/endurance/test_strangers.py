"""Strangers at every port of a run, at random: it gives its numbers, or ends with one sentence."""

import dataclasses
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import strangers
from binaries import one_sentence
from processes import free_port, joined, listening, processes
from short_runs import SMALL, without_time

from experiments.launching.link import Place
from experiments.launching.meeting import meet
from experiments.launching.secret import Secret
from experiments.running.recording import read_metrics
from jaxlocal import ConfigurationError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the ports of a process in /proc"),
]

RIGHT, WRONG = Secret(b"of this run", "FILE"), Secret(b"of another run", "FILE")
SECONDS = 2.0  # that processes wait for each other


def come(port, number, secret):
    """A process that joins after a time; returns the sentence of the error, or ""."""
    time.sleep(random.uniform(0, 0.5))
    try:
        meet(Place("127.0.0.1", port, 3, number), [], secret, SECONDS)
        return ""
    except ConfigurationError as error:
        return str(error)


@pytest.mark.parametrize("last", ["comes", "is missing", "has another secret"])
def test_processes_meet_among_strangers(times, last):
    with ThreadPoolExecutor() as pool:
        for _ in range(times):
            port, began = free_port(), time.monotonic()
            come_in = [(0, RIGHT), (1, RIGHT)]
            come_in += {"comes": [(2, RIGHT)], "is missing": []}.get(last, [(2, WRONG)])
            with strangers.visited(lambda port=port: [("127.0.0.1", port)]):
                started = [pool.submit(come, port, *one) for one in come_in]
                sentences = [one.result(60) for one in started]
            # A busy machine may make a process late, but nothing starts without all of the three.
            missing = f" of 3 has not connected to 127.0.0.1:{port} within {SECONDS:.0f} s"
            assert all(sentences) or (last == "comes" and not any(sentences)), sentences
            assert last == "comes" or sentences[0].startswith(f"process 2{missing}"), sentences
            assert time.monotonic() - began < 30


RUN = dataclasses.replace(SMALL, local_steps=4, steps=400, eval_every=100, checkpoint_every=100)
ENVIRONMENT = os.environ | {"JAXLOCAL_SECRET": "the secret of the runs among strangers"}


def finished(folder):
    """Train without strangers; returns the metrics."""
    with joined(2, folder, RUN.flag_lines(), ENVIRONMENT) as both:
        for one in both:
            _, error = one.communicate(timeout=120)
            assert one.returncode == 0, error
    return without_time(read_metrics(folder))


def addresses(started):
    return [("127.0.0.1", port) for one in started for port in listening(one)]


EXCHANGED = """
from experiments.building.config import Config
from experiments.launching import joining
config = Config(coordinator_address="127.0.0.1:{port}", process_count=2, process_id=NUMBER)
with joining.joined(config, joining.find_group(config), patience=10.0):
    print("exchanged")
"""


def test_impostors_between_the_processes_end_a_run_within_the_deadline(times):
    for _ in range(times):
        program = EXCHANGED.format(port=free_port())
        with (
            processes(2, "-c", program, environment=ENVIRONMENT) as both,
            strangers.visited(lambda both=both: addresses(both), 2, {"": strangers.impostor}),
        ):
            for one in both:
                out, error = one.communicate(timeout=120)
                assert (one.returncode, out) == (0, "exchanged\n") or (
                    one.returncode in (1, 2) and not out and one_sentence(error)
                ), error


def test_runs_among_strangers_give_their_numbers_or_end(times, tmp_path):
    expected, endings = finished(tmp_path / "alone"), []
    for number in range(times):
        folder = tmp_path / str(number)
        with (
            joined(2, folder, RUN.flag_lines(), ENVIRONMENT) as both,
            strangers.visited(lambda both=both: addresses(both), at_once=2),
        ):
            outputs = [one.communicate(timeout=200) for one in both]
        endings.append(tuple(one.returncode for one in both))
        if endings[-1] == (0, 0):
            assert without_time(read_metrics(folder)) == expected
        else:
            assert 0 not in endings[-1], outputs
            for _, error in outputs:
                assert one_sentence(error), error
    print("exit statuses:", endings)
