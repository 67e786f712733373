"""Programs that are compiled in threads before they are called."""

import threading

import compilations
import jax
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal.training.ahead import Ahead, Compiling
from jaxlocal.training.evaluation import Evaluation

STEPS, WORKERS = 4, 2
POOL = {"x": np.arange(12, dtype=np.float32).reshape(6, 2)}


def problem():
    """A round function and an evaluation whose programs are new to JAX."""
    loss = lambda params, batch, key: ((params - 1) ** 2).sum() * batch.mean()
    method = jaxlocal.local_sgd(jaxlocal.gradients(loss), optax.sgd(0.01), period=STEPS)
    round_fn = jaxlocal.RoundFn(method, jaxlocal.Layout(workers_per_hub=WORKERS))
    metrics = lambda params, _, batch: {"loss": ((params[None] - batch["x"]) ** 2).sum(1)}
    return round_fn, Evaluation(round_fn, metrics, POOL)


def batches():
    return np.ones((STEPS, 1, WORKERS, 3), np.float32)


def trained(round_fn, evaluation):
    """A run of one round, and the programs that its calls compile."""
    state = round_fn.init(np.zeros(2, np.float32), jax.random.key(0))
    with compilations.counted() as compiled:
        first = evaluation(state)
        state, _ = round_fn.local_steps(state, batches())
        distances = round_fn.consensus_distance(state)
        state, _ = round_fn.end_round(state)
        return jax.device_get((state.params, distances, first, evaluation(state))), compiled


@pytest.fixture(autouse=True, scope="module")
def strict():
    """Not in JAX's strict modes, which hold in one thread alone."""


@pytest.fixture
def shapes():
    round_fn, evaluation = problem()
    return round_fn, evaluation, round_fn.shapes(np.ones(2, np.float32))


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)


def test_what_was_compiled_ahead_is_not_compiled_again_and_gives_the_same_bits(shapes, one_thread):
    round_fn, evaluation, state = shapes
    expected, alone = trained(*problem())
    with compilations.counted() as compiled, Ahead() as ahead:
        evaluation.compile_ahead(state, ahead)
        round_fn.compile_ahead(state, batches()[:1], STEPS, False, ahead)
        round_fn.compile_ahead(state, (), 0, True, ahead)
        round_fn.compile_ahead(state, batches()[:1], STEPS, False, ahead)  # known already
        ahead.submit(list).result()  # after everything before it
        found, later = trained(round_fn, evaluation)
    programs = [names.count("jit(mapped)") for names in (compiled, alone)]
    assert not later and programs[0] == programs[1] > 0
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class Lowered:
    """A lowered program whose compilation waits, or fails."""

    def __init__(self, error=None):
        self.error, self.begun, self.may_end = error, threading.Event(), threading.Event()
        self.done = False

    def compile(self):
        self.begun.set()
        assert self.may_end.wait(60)
        if self.error:
            raise self.error
        self.done = True


def test_a_call_waits_for_its_own_program():
    compiling, program = Compiling(), Lowered()
    with Ahead() as ahead:
        compiling.begin("program", program, ahead)
        assert program.begun.wait(60) and not program.done
        threading.Timer(0.05, program.may_end.set).start()
        compiling.finished("another")
        assert not program.done
        compiling.finished("program")
        assert program.done


def test_an_error_of_a_thread_is_left_to_the_call():
    compiling, program = Compiling(), Lowered(RuntimeError("out of memory"))
    program.may_end.set()
    with Ahead() as ahead:
        compiling.begin("program", program, ahead)
        compiling.finished("program")
        assert program.begun.is_set()


def test_the_end_waits_for_what_is_being_compiled_alone(one_thread):
    compiling, first, second = Compiling(), Lowered(), Lowered()
    with pytest.raises(ZeroDivisionError), Ahead() as ahead:
        compiling.begin("first", first, ahead)
        compiling.begin("second", second, ahead)
        assert first.begun.wait(60)
        threading.Timer(0.05, first.may_end.set).start()
        raise ZeroDivisionError
    assert first.done and not second.begun.is_set()
    compiling.finished("second")  # which was dropped


def test_an_error_of_the_model_is_raised_before_anything_is_compiled(shapes):
    round_fn, _, state = shapes
    with Ahead() as ahead, pytest.raises(TypeError, match="strings"):
        method = round_fn.method._replace(inner=failing(round_fn.method.inner))
        other = jaxlocal.RoundFn(method, round_fn.layout)
        other.compile_ahead(state, batches()[:1], STEPS, False, ahead)


def failing(stage):
    def apply(*_):
        raise TypeError("the loss takes no strings")

    return stage._replace(apply=apply)
