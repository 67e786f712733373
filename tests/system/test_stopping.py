"""SIGINT and SIGTERM: when they end a process at once, ask it to end, or are raised."""

import signal
import subprocess
import sys
import time

import pytest
from processes import ROOT

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORD = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
SCRIPT = """
import os, signal, sys, time
from experiments.launching import stopping
assert "jax" not in sys.modules  # a signal is handled before slow imports
stopping.watch()
ready = lambda: print("ready", flush=True)
"""


def send(number, script, times=1, ignored=False):
    """Run a script, send it signals when it is ready; returns exit status, output and errors."""
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # an ignored signal is one in a child too
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", SCRIPT + script], cwd=ROOT, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout.readline() == "ready\n"
        out = ""
        for _ in range(times):
            process.send_signal(number)
            out += process.stdout.readline()  # the script prints a line, or has ended
        out, error = out + process.stdout.read(), process.stderr.read()
    return process.returncode, out, error


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(60)",
        "import threading; threading.Lock().acquire(); threading.Event().wait(60)",
        "import ctypes; [ctypes.CDLL(None).sleep(60) for _ in range(9)]",  # long calls of C
        "with stopping.Patience(): time.sleep(60)",  # nothing is lost before the first `asked`
    ],
)
def test_a_signal_ends_a_process_at_once_where_nothing_is_lost(number, busy):
    status, _, error = send(number, f"ready()\n{busy}")
    assert (status, error) == (STATUS[number], f"error: {WORD[number]}\n")


PATIENT = """
with stopping.Patience() as patience:
    patience.asked()
    ready()
    while not patience.asked():
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(SECONDS)
    print("saved", flush=True)
sys.exit(128 + patience.asked())
"""


@pytest.mark.parametrize("number", STATUS)
def test_a_patient_process_ends_when_it_has_saved(number):
    status, out, error = send(number, PATIENT.replace("SECONDS", "0.1"))
    assert (status, out, error) == (STATUS[number], "asked\nsaved\n", "")


@pytest.mark.parametrize("number", STATUS)
def test_a_second_signal_ends_it_at_once(number):
    status, out, error = send(number, PATIENT.replace("SECONDS", "60"), times=2)
    assert (status, out, error) == (STATUS[number], "asked\n", f"error: {WORD[number]}\n")


def test_a_signal_is_raised_where_a_command_cleans_up():
    script = """
with stopping.raising():
    try:
        ready()
        time.sleep(60)
    except stopping.Interrupted as error:
        print(error, error.status, flush=True)
time.sleep(0.1)
print("cleaned")
"""
    status, out, error = send(signal.SIGTERM, script)
    assert (status, out, error) == (0, "terminated 143\ncleaned\n", "")


def test_a_process_that_another_one_started_ends_only_when_it_has_saved():
    """Also where a signal comes twice, from a terminal or a scheduler and from that process."""
    script = PATIENT.replace("SECONDS", "os.kill(os.getpid(), signal.SIGTERM) or 0.1")
    script = "stopping.watch_patiently()\n" + script
    status, out, error = send(signal.SIGTERM, script)
    assert (status, out, error) == (143, "asked\nsaved\n", "")


def test_a_pool_ends_with_the_process_that_has_started_it():
    script = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
spawn = multiprocessing.get_context("spawn")
pool = ProcessPoolExecutor(1, spawn, initializer=stopping.watch_patiently)
pool.submit(signal.alarm, 60).result()
pool.submit(time.sleep, 100)
ready()
time.sleep(100)
"""
    began = time.monotonic()
    status, _, _ = send(signal.SIGKILL, script)  # which reads until the last process has gone
    assert status == -signal.SIGKILL and time.monotonic() - began < 50


def test_an_ignored_interrupt_stays_ignored():
    script = "ready(); time.sleep(0.3); print('done', flush=True)"
    assert send(signal.SIGINT, script, ignored=True) == (0, "done\n", "")


def test_a_signal_of_a_forked_child_is_not_one_of_its_parent():
    script = """
signal.alarm(60)
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
os.waitpid(child, 0)
time.sleep(0.2)
print("alive", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", SCRIPT + script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, input=b"")
    assert done.returncode == 0 and b"alive" in done.stdout and not done.stderr


ENDING = """
signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))  # also where it was ignored
class Last:
    def __del__(self, kill=os.kill, own=os.getpid()):
        for number in (signal.SIGINT, signal.SIGTERM):
            kill(own, number)
last = Last()  # deleted when Python has given its handlers up
"""


def test_a_process_that_is_ending_ends_with_its_own_status():
    command = [sys.executable, "-c", SCRIPT + ENDING + "sys.exit(7)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (7, b"")
