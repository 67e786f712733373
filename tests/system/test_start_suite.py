"""The suite `start` of the benchmark: the phases of a process up to its first round."""

import json
import time

import pytest
from binaries import call

from experiments.benchmarks.start import program, suite
from experiments.benchmarks.start.program import COMPILATION, PHASES, Clock
from experiments.benchmarks.workloads import WORKLOADS, workload_to_json

TINY = workload_to_json(
    WORKLOADS["softmax"]._replace(workers=2, batch_size=2, steps=2, input_shape=(4, 4, 1))
)


def test_the_phases_of_a_first_round_add_up():
    began = time.monotonic()
    clock = Clock(began)
    program.first_round(TINY, clock)
    passed = time.monotonic() - began
    assert tuple(clock.seconds) == PHASES
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert passed - 0.05 < sum(clock.seconds.values()) <= passed + 1e-6
    assert clock.programs == 1


def test_a_command_that_succeeds_does_not_end_the_process_and_one_that_fails_does():
    def ending(status):
        def run():
            raise SystemExit(status)

        return run

    program._succeed(ending(0))
    with pytest.raises(SystemExit):
        program._succeed(ending(1))


def test_every_repeat_starts_every_case_cold_and_then_warm(monkeypatch, tmp_path):
    started = []

    def reply(case, folder, limit):
        started.append((case, folder))
        cold = started.count((case, folder)) == 1
        return {"seconds": dict.fromkeys(PHASES, 3.0 if cold else 1.0), "programs": 2}

    monkeypatch.setattr(suite, "_started", reply)
    flags = ("--workloads=mlp,train", "--repeats=2", "--wait_idle=0")
    called = call("benchmark", "--suite=start", *flags, f"--output={tmp_path / 'figures.json'}")
    assert called.status == 0, called.error
    assert [case for case, _ in started] == ["mlp", "mlp", "train", "train"] * 2
    assert len({folder for _, folder in started}) == 4
    cases = json.loads((tmp_path / "figures.json").read_text())["cases"]
    for case in ("mlp", "train"):
        assert [r["seconds"]["init"] for r in cases[case]["cold"]] == [3.0, 3.0]
        assert [r["seconds"]["init"] for r in cases[case]["warm"]] == [1.0, 1.0]
    assert "18.00" in called.out and "6.00" in called.out


def test_unknown_cases_are_refused():
    called = call("benchmark", "--suite=start", "--workloads=trian")
    assert called.status == 2 and "did you mean 'train'" in called.error


@pytest.mark.slow
def test_a_warm_start_finds_what_a_cold_one_has_compiled(tmp_path):
    cold, warm = (suite._started(TINY, str(tmp_path), 120.0) for _ in range(2))
    assert cold["programs"] == warm["programs"] == 1
    compiling = [sum(r["seconds"][name] for name in COMPILATION) for r in (cold, warm)]
    assert 0 < compiling[1] < compiling[0]
    assert len(list(tmp_path.glob("*-cache"))) > 1
