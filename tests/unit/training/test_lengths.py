"""How long a round is: what its period says, or what the caller says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, periods
from jaxlocal.training import dispatches, known_states, run, schedule
from jaxlocal.training.checks import check_period
from jaxlocal.types import Period

grad_fn = jaxlocal.gradients(lambda w, batch, key: jnp.square(w - batch).mean())
SGD, LAYOUT = optax.sgd(0.1), Layout(workers_per_hub=2)
COSINE = optax.cosine_decay_schedule(0.5, 300)


def qsr(**options):
    return periods.qsr(COSINE, coefficient=1.0, **({"base": 2} | options))


def hubs(**options):
    return jaxlocal.mll_sgd(grad_fn, SGD, matrix=np.full((2, 2), 0.5), local_steps=4, **options)


def streaming(**options):
    return jaxlocal.streaming_diloco(grad_fn, SGD, **options)


METHODS = {
    "constant": jaxlocal.local_sgd(grad_fn, SGD, period=7),
    "by default": jaxlocal.diloco(grad_fn, SGD),
    "qsr": jaxlocal.local_sgd(grad_fn, SGD, period=qsr()),
    "post-local": jaxlocal.post_local_sgd(grad_fn, SGD, switch_step=5, local_steps=6),
    "swap": jaxlocal.swap(grad_fn, SGD, switch_step=5),
    "hubs": hubs(hub_period=3),
    "qsr on hubs": hubs(hub_period=qsr(base=4, multiple=4)),
    "overlapped": streaming(period=12, fragments=1, delay_steps=4),
    "fragments": streaming(period=12, fragments=3, delay_steps=2),
    "fragments by qsr": streaming(period=qsr(base=9, multiple=3), fragments=3, delay_steps=1),
}


def refused(message):
    return pytest.raises(ConfigurationError, match=message)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_is_as_long_as_the_schedule_of_a_long_run_has_it(name):
    method, step = METHODS[name], 0
    *lengths, _ = schedule(method, 240)
    for length in lengths:
        check_period(method, length, step)
        for other in (length + method.inner.steps, 16 * length):
            with refused(f"hold {other} steps.* H = {length} at step {step}; .* or length={other}"):
                check_period(method, other, step)
        step += length
    assert len(lengths) >= 5


def started(method, layout=LAYOUT):
    round_fn = RoundFn(method, layout, jaxlocal.make_mesh(layout, jax.devices()[:1]))
    return round_fn, round_fn.init(jnp.zeros(()), jax.random.key(0))


def ones(steps):
    return np.ones((steps, 1, 2), np.float32)


def test_another_length_is_refused_with_both_numbers_unless_it_is_given():
    round_fn, state = started(jaxlocal.local_sgd(grad_fn, SGD, period=4))
    message = (
        r"the batches hold 16 steps, and the period of the method \(constant, H = 4\) gives H = 4; "
        r"give batches of 4, or length=16 if you mean it"
    )
    with refused(message):
        round_fn(state, ones(16))
    with refused("length is 4, and the batches hold 16 steps"):
        round_fn(state, ones(16), length=4)
    for wrong in ("16", 16.0):
        with refused(f"a Python integer, got {type(wrong).__name__}"):
            round_fn(state, ones(16), length=wrong)
    assert not state.params.is_deleted()
    state, info = round_fn(state, ones(16), length=16)
    assert info.worker["loss"].shape == (16, 1, 2)
    state, _ = round_fn(state, ones(4))
    assert int(state.step) == 20


def test_where_nothing_ends_a_round_any_number_of_steps_is_one():
    round_fn, state = started(jaxlocal.data_parallel(grad_fn, SGD))
    for steps in (1, 4):
        state, _ = round_fn(state, ones(steps))
    assert int(state.step) == 5


def test_a_rule_is_asked_at_the_step_of_the_state_which_is_not_read_again(monkeypatch):
    lengths, read = {0: 1, 1: 4, 5: 1, 6: 4}, []
    rule = Period(lambda step, remaining: lengths[step], "1, 4, 1, 4")
    round_fn, state = started(jaxlocal.local_sgd(grad_fn, SGD, period=rule))
    monkeypatch.setattr(known_states, "int", lambda x: read.append(x) or int(x), raising=False)
    for step in (0, 1):
        with refused(f"hold 3 steps.*H = {lengths[step]} at step {step}"):
            round_fn(state, ones(3))
        state, _ = round_fn(state, ones(lengths[step]))
    assert len(read) == 1  # before the first round
    state, _ = round_fn.local_steps(state, ones(1))
    state, _ = round_fn.end_round(state)
    assert len(read) == 1
    restored = jax.tree.map(jnp.copy, state)  # as from a checkpoint
    with refused("hold 1 step, .*H = 4 at step 6"):
        round_fn(restored, ones(1))
    assert len(read) == 2


def test_a_round_until_the_end_of_the_run_needs_its_length():
    method = jaxlocal.swap(grad_fn, SGD, switch_step=1)
    round_fn, state = started(method)
    state, _ = round_fn(state, ones(1))
    with refused("SWAP.* lasts from step 1 until the end of the run.*length=4 if"):
        round_fn(state, ones(4))
    state, _ = round_fn(state, ones(4), length=4)
    constant = jaxlocal.local_sgd(grad_fn, SGD, period=periods.qsr(0.0, coefficient=1.0, base=4))
    with refused("lasts from step 7 until the end"):
        check_period(constant, 4, 7)


def test_a_loop_over_the_schedule_runs_to_the_end():
    round_fn, state = started(jaxlocal.local_sgd(grad_fn, SGD, period=4))
    for length in schedule(round_fn.method, 9):
        state, _ = round_fn(state, ones(length), length=length)
    assert int(state.step) == 9


def test_inside_jit_constant_periods_are_checked_and_rules_need_a_length():
    round_fn, state = started(jaxlocal.local_sgd(grad_fn, SGD, period=4))
    jax.eval_shape(round_fn, state, ones(4))
    with refused("hold 3 steps.*gives H = 4;"):
        jax.eval_shape(round_fn, state, ones(3))
    with refused("a Python integer, got"):
        jax.eval_shape(lambda *given: round_fn(*given), state, ones(4), jnp.int32(4))
    round_fn, state = started(METHODS["qsr"])
    with refused(r"quadratic.*not known inside jax.jit; give length=4"):
        jax.eval_shape(round_fn, state, ones(4))
    jax.eval_shape(lambda *given: round_fn(*given, length=4), state, ones(4))
    state, _ = round_fn(state, ones(4))  # no tracer was kept
    assert int(state.step) == 4


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (2**31, "at most 2147483647 steps.*got 2147483648"),
        (10**30, "at most 2147483647 steps"),
        (8.0, "an integer of at least 1 step, got 8.0"),
        ("8", "an integer of at least 1 step, got '8'"),
    ],
)
def test_a_run_of_more_steps_than_an_int32_counts_is_refused_at_once(steps, message):
    round_fn, state = started(METHODS["by default"])
    with refused(message):
        schedule(round_fn.method, steps)
    with refused(message):
        next(dispatches(round_fn, steps))
    with refused(message):
        next(run(round_fn, state, lambda start, steps: ones(steps), steps))
    assert next(schedule(round_fn.method, 2**31 - 1)) == 1
    with refused("of a method, such as round_fn.method, got RoundFn"):
        schedule(round_fn, 8)
    with refused(r"must be a rule, such as jaxlocal.periods.of\(4\), got 4"):
        RoundFn(round_fn.method._replace(period=4), LAYOUT)


@pytest.mark.parametrize("other", [-1, 1])
def test_batches_of_other_steps_than_asked_for_are_refused_with_both_and_the_step(other):
    round_fn, state = started(jaxlocal.local_sgd(grad_fn, SGD, period=4))
    given, seen = lambda start, steps: ones(steps + other * (start == 4)), []
    with refused(rf"batches\(4, 4\) must give .* of 4 steps from step 4 on, and gave {4 + other}"):
        seen.extend(progress.step for progress in run(round_fn, state, given, 12))
    with refused("a function of the start step and the steps, got ndarray"):
        next(run(*started(round_fn.method), ones(4), 12))
    differ = lambda start, steps: (ones(steps), ones(steps + other))
    with refused("batches must lead with"):
        list(run(*started(round_fn.method), differ, 12))
