"""The table of methods: what it records of each agrees with its code."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import periods
from jaxlocal.compression import parse
from jaxlocal.methods import METHODS, table

SPECS = pytest.mark.parametrize("name", METHODS)
SHARED = ("model_state", "worker_map")
WORKER = (problems.grad_fn, optax.sgd(0.1))


@SPECS
def test_a_method_takes_everything_but_gradient_and_optimizer_by_name(name):
    parameters = list(inspect.signature(METHODS[name].build).parameters.values())
    assert [p.name for p in parameters[:2]] == ["grad_fn", "optimizer"]
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert set(SHARED) <= {p.name for p in parameters[2:]}


@SPECS
def test_a_wrong_argument_is_refused_with_the_nearest(name):
    build = METHODS[name].build
    for slip, near in (("worker_mpa", "worker_map"), ("model_sate", "model_state")):
        with pytest.raises(TypeError, match=f"unknown argument of {name} '{slip}'.*'{near}'"):
            build(problems.grad_fn, optax.sgd(0.1), **{slip: None})
    with pytest.raises(jaxlocal.ConfigurationError, match="unknown argument.*'gradient_mixer'"):
        build(problems.grad_fn, optax.sgd(0.1), gradient_mixer=jaxlocal.mixing.mean())
    with pytest.raises(TypeError, match="by position and all else by name, got 3"):
        build(problems.grad_fn, optax.sgd(0.1), 4)


@SPECS
def test_every_method_is_public_and_documented(name):
    build = METHODS[name].build
    assert getattr(jaxlocal, name) is build and getattr(jaxlocal.methods, name) is build
    assert name in jaxlocal.__all__ and name in table.__all__
    text = inspect.getdoc(build)
    parts = ("Args:", "grad_fn", "optimizer", "Returns:", ">>> ")
    assert all(part in text for part in parts)
    assert "https://" in text or "Source: as" in text or name == "data_parallel"
    arguments = inspect.signature(build).parameters
    assert all(re.search(rf"\b{argument}\b", text) for argument in arguments)


@SPECS
def test_compressors_of_the_table_are_arguments_and_have_specs_that_parse(name):
    spec = METHODS[name]
    for kind, default in spec.compressors.items():
        assert kind in ("gradient", "reset", "sync")
        assert spec.takes(f"{kind}_compressor") or spec.takes("compressor")
        assert default is None or parse(default).name == default
    takes = any("compressor" in argument for argument in inspect.signature(spec.build).parameters)
    assert takes == bool(spec.compressors)


@SPECS
def test_what_else_the_table_records_agrees_with_the_signature(name):
    spec = METHODS[name]
    assert spec.takes("outer_optimizer") == (spec.outer_optimizer is not None)
    assert spec.takes("hub_period") == (spec.network == "hubs")
    assert (spec.takes("period") or spec.takes("hub_period")) != spec.own_period
    assert not spec.every_step or spec.own_period
    for argument in spec.own_options.values():
        assert spec.default(argument) is not inspect.Parameter.empty
    rules = ("constant", "quadratic", "linear", "cubic", "post_local", "swap")
    assert spec.period in rules and spec.network in ("", "hubs", "workers")


@pytest.mark.parametrize("name", ["slowmo", "diloco", "sparse_loco"])
def test_the_default_outer_optimizer_of_the_table_is_that_of_the_method(name):
    """The first two updates of what the table builds, against the documented optax optimizer."""
    documented = {
        "slowmo": optax.sgd(1.0, momentum=0.7),
        "diloco": optax.sgd(0.7, momentum=0.9, nesterov=True),
        "sparse_loco": optax.sgd(1.0),
    }[name]
    built = METHODS[name].outer_optimizer.build()
    states = [optimizer.init(1.0) for optimizer in (built, documented)]
    for gradient in (1.0, -3.0):
        updates, states = zip(
            *(o.update(gradient, s) for o, s in zip((built, documented), states, strict=True)),
            strict=True,
        )
        assert updates[0] == updates[1]


def test_the_table_lists_its_names_in_full():
    assert sorted(table.__all__) == sorted(["METHODS", *METHODS])


def test_a_rule_that_reads_another_schedule_than_the_optimizer_is_refused():
    optimizer = jaxlocal.scheduled(optax.sgd, optax.cosine_decay_schedule(0.5, 200))
    other = periods.qsr(optax.cosine_decay_schedule(0.4, 200), coefficient=1.0, base=4)
    same = periods.qsr(optax.cosine_decay_schedule(0.5, 200), coefficient=1.0, base=4)
    sentence = "the period reads the learning rate 0.4 at step 0, and the optimizer follows 0.5"
    with pytest.raises(jaxlocal.ConfigurationError, match=sentence):
        jaxlocal.local_sgd(problems.grad_fn, optimizer, period=other)
    assert jaxlocal.local_sgd(problems.grad_fn, optimizer, period=same).period is same
    own = periods.qsr(optimizer.learning_rate, coefficient=1.0, base=4)
    assert jaxlocal.local_sgd(problems.grad_fn, optimizer, period=own).period is own


def test_slowmo_reads_the_learning_rate_of_a_scheduled_optimizer_or_asks_for_it():
    with pytest.raises(jaxlocal.ConfigurationError, match="needs the learning rate"):
        jaxlocal.slowmo(problems.grad_fn, optax.sgd(0.1))
    assert jaxlocal.slowmo(problems.grad_fn, jaxlocal.scheduled(optax.sgd, 0.1)).outer.anchored


@pytest.mark.parametrize(
    "build",
    [
        lambda spec: jaxlocal.data_parallel(*WORKER, compressor=spec),
        lambda spec: jaxlocal.ef_sgd(*WORKER, compressor=spec),
        lambda spec: jaxlocal.qsparse_local_sgd(*WORKER, compressor=spec),
        lambda spec: jaxlocal.sparse_loco(*WORKER, compressor=spec),
        lambda spec: jaxlocal.cser(*WORKER, gradient_compressor=spec, reset_compressor=spec),
        lambda spec: jaxlocal.csea(*WORKER, reset_compressor=spec),
        lambda spec: jaxlocal.streaming_diloco(*WORKER, period=4, compressor=spec),
        lambda spec: jaxlocal.hl_sgd(
            *WORKER, layout=jaxlocal.Layout(2, 2), local_steps=2, hub_period=2, compressor=spec
        ),
    ],
)
def test_a_spec_string_is_the_compressor_that_it_stands_for(build):
    layout = jaxlocal.Layout(2, 2)
    params = {"weight": jnp.zeros(64), "bias": jnp.zeros(())}

    def bits(compressor):
        round_fn = problems.on_one_device(build(compressor), layout)
        return [round_fn.stage_bits(round_fn.shapes(params), number) for number in range(2)]

    assert bits("random_k:4") == bits(parse("random_k:4")) != bits("random_k:2")
    with pytest.raises(jaxlocal.ConfigurationError, match="unknown compressor 'topk'"):
        build("topk")
    with pytest.raises(jaxlocal.ConfigurationError, match="is one of jaxlocal.compression or a"):
        build(64)


@SPECS
def test_what_is_no_gradient_function_or_optimizer_is_refused_when_the_method_is_built(name):
    arguments = {
        "matrix": np.full((2, 2), 0.5),
        "layout": jaxlocal.Layout(2, 2),
        "learning_rate": 0.1,
        **dict.fromkeys(("local_steps", "hub_period", "switch_step"), 1),
        **dict.fromkeys(("compressor", "gradient_compressor", "reset_compressor"), "random_k:2"),
        "period": 4,
    }
    build = METHODS[name].build
    own = {key: value for key, value in arguments.items() if METHODS[name].takes(key)}
    if name == "data_parallel":
        own.pop("compressor")
    build(*WORKER, **own)
    for wrong in (problems.loss, lambda params, batch, key: 0.0, None):
        with pytest.raises(jaxlocal.ConfigurationError, match=r"grad_fn must take \(params"):
            build(wrong, optax.sgd(0.1), **own)
    with pytest.raises(jaxlocal.ConfigurationError, match="the optimizer must be one of optax"):
        build(problems.grad_fn, 0.1, **own)


def test_a_loss_of_other_arguments_is_refused():
    with pytest.raises(jaxlocal.ConfigurationError, match="with stateful=False"):
        jaxlocal.gradients(lambda params, model_state, batch, key: 0.0)
    with pytest.raises(jaxlocal.ConfigurationError, match="with stateful=True"):
        jaxlocal.gradients(problems.loss, stateful=True)


def test_a_round_function_is_made_of_a_method_and_a_layout():
    method = jaxlocal.local_sgd(*WORKER)
    with pytest.raises(jaxlocal.ConfigurationError, match="got Layout and Method"):
        jaxlocal.RoundFn(jaxlocal.Layout(), method)
    with pytest.raises(jaxlocal.ConfigurationError, match="got Method and int"):
        jaxlocal.RoundFn(method, 8)


@pytest.mark.parametrize("fragments", ["layers", ["("], [], 0, True, [1]])
def test_fragments_that_are_no_number_or_patterns_are_refused(fragments):
    with pytest.raises(jaxlocal.ConfigurationError, match="fragments must be a number of at least"):
        jaxlocal.streaming_diloco(*WORKER, period=4, fragments=fragments)


def test_schedules_are_compared_far_into_the_run_and_by_slowmo_too():
    falls = lambda step: optax.piecewise_constant_schedule(0.1, {step: 0.1})
    optimizer = jaxlocal.scheduled(optax.sgd, falls(2000))
    rule = periods.qsr(falls(9000), coefficient=0.1, base=2)
    with pytest.raises(jaxlocal.ConfigurationError, match="reads the learning rate 0.1 at step 20"):
        jaxlocal.local_sgd(problems.grad_fn, optimizer, period=rule)
    with pytest.raises(jaxlocal.ConfigurationError, match="slowmo was given the learning rate 0.7"):
        jaxlocal.slowmo(problems.grad_fn, optimizer, learning_rate=0.7)
    with pytest.raises(TypeError, match="momentm"):
        jaxlocal.scheduled(optax.sgd, 0.1, momentm=0.9)
