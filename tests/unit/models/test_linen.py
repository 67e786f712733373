"""A Linen module becomes two pure functions, with all kinds of state and transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxlocal.errors import ConfigurationError
from jaxlocal.models import from_linen

KEY = jax.random.key(0)
INPUTS = jax.random.normal(jax.random.key(1), (8, 5))


class Users(linen.Module):
    """Dropout, batch statistics, and a count of calls in another collection."""

    @linen.compact
    def __call__(self, inputs, train):
        calls = self.variable("calls", "count", lambda: jnp.zeros((), jnp.int32))
        calls.value += int(train)
        hidden = linen.BatchNorm(use_running_average=not train, momentum=0.9)(inputs)
        hidden = linen.Dropout(0.5, deterministic=not train)(linen.Dense(16)(hidden))
        return linen.Dense(3)(hidden)


@pytest.fixture(scope="module")
def model():
    return from_linen(Users(), INPUTS)


@pytest.fixture(scope="module")
def variables(model):
    return model.init(KEY)


def assert_close(ours, theirs):
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32, a few layers

    jax.tree.map(one, ours, theirs)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_variables_are_those_of_the_module(variables):
    params, model_state = variables
    own = Users().init(KEY, INPUTS, train=False)  # operation by operation, which rounds otherwise
    assert_close({"params": params, **model_state}, dict(own))
    assert set(model_state) == {"batch_stats", "calls"}


def test_a_shape_may_stand_for_inputs(variables):
    model = from_linen(Users(), jax.ShapeDtypeStruct((1, 5), jnp.float32))
    assert_same(model.init(KEY), variables)


def test_in_evaluation_it_is_the_module_in_evaluation(model, variables):
    outputs, model_state = model.apply(*variables, INPUTS, None, False)
    own = {"params": variables[0], **variables[1]}
    assert_same(outputs, Users().apply(own, INPUTS, train=False, mutable="calls")[0])
    assert_same(model_state, variables[1])


def test_in_training_the_model_state_moves(model, variables):
    _, state = model.apply(*variables, INPUTS, KEY, True)
    assert state["calls"]["count"] == 1
    moved = jax.tree.map(lambda x: 0.1 * x, (INPUTS.mean(0), INPUTS.var(0)))
    kept = state["batch_stats"]["BatchNorm_0"]
    assert_close((kept["mean"], kept["var"] - 0.9), moved)
    assert jax.tree.structure(state) == jax.tree.structure(variables[1])


def test_dropout_depends_on_the_key_and_is_off_in_evaluation(model, variables):
    def outputs(key, train):
        return np.asarray(model.apply(*variables, INPUTS, key, train)[0])

    other = jax.random.key(7)
    assert_same(outputs(KEY, True), outputs(KEY, True))
    assert (outputs(KEY, True) != outputs(other, True)).any()
    assert_same(outputs(KEY, False), outputs(other, False))


def returning(keyword):
    """A module that returns the value of this keyword."""
    scope = {}
    exec(f"def call(self, inputs, {keyword}): return inputs + int({keyword})", scope)
    return type("Returning", (linen.Module,), {"__call__": scope["call"], "__module__": __name__})()


@pytest.mark.parametrize(
    ("keyword", "in_evaluation"),
    [
        ("train", 0),
        ("training", 0),
        ("is_training", 0),
        ("deterministic", 1),
        ("use_running_average", 1),
    ],
)
def test_train_is_passed_by_the_keyword_of_the_module(keyword, in_evaluation):
    model = from_linen(returning(keyword), jnp.zeros(1))
    assert model.apply({}, {}, jnp.zeros(1), None, False)[0] == in_evaluation
    assert model.apply({}, {}, jnp.zeros(1), None, True)[0] == 1 - in_evaluation


def test_a_keyword_that_a_field_fixes_is_not_passed():
    fixed = from_linen(linen.Dropout(0.5, deterministic=True), INPUTS)
    assert_same(fixed.apply({}, {}, INPUTS, KEY, True)[0], INPUTS)
    free = from_linen(linen.Dropout(0.5), INPUTS)
    assert (np.asarray(free.apply({}, {}, INPUTS, KEY, True)[0]) == 0).any()
    assert_same(free.apply({}, {}, INPUTS, KEY, False)[0], INPUTS)


class Noises(linen.Module):
    """Draws twice from one stream, once from another."""

    @linen.compact
    def __call__(self, inputs):
        keys = [self.make_rng(name) for name in ("dropout", "dropout", "noise")]
        return jnp.stack([jax.random.normal(key, inputs.shape) for key in keys])


@pytest.mark.parametrize("streams", [("dropout",), ("dropout", "noise"), ()])
def test_all_draws_differ(streams):
    model = from_linen(Noises(), INPUTS, streams)
    drawn, _ = model.apply({}, {}, INPUTS, KEY, True)
    assert len({noise.tobytes() for noise in np.asarray(drawn)}) == 3


class Layers(linen.Module):
    """Layers made by `linen.scan`, which splits the stream by its name."""

    @linen.compact
    def __call__(self, inputs, train):
        class Layer(linen.Module):
            @linen.compact
            def __call__(self, carry, _):
                dropped = linen.Dropout(0.5, rng_collection="noise", deterministic=not train)(carry)
                return carry, dropped

        many = linen.scan(Layer, split_rngs={"params": False, "noise": True}, length=2)
        return many()(inputs, None)[1]


def test_a_named_stream_may_be_split_over_layers():
    model = from_linen(Layers(), INPUTS, streams=("noise",))
    first, second = model.apply({}, {}, INPUTS, KEY, True)[0]
    assert (np.asarray(first) != np.asarray(second)).any()


def test_vmap_map_and_shard_map_equal_one_at_a_time(model):
    keys = jax.random.split(KEY, 3)
    variables = jax.jit(jax.vmap(model.init))(keys)
    arguments = (*variables, jax.random.normal(KEY, (3, 8, 5)), keys)
    one = lambda number: jax.tree.map(lambda a: a[number], arguments)
    apply_one = jax.jit(model.apply, static_argnums=4)
    results = [apply_one(*one(number), True) for number in range(3)]
    expected = jax.tree.map(lambda *a: jnp.stack(a), *results)

    def shard(apply):
        mesh = Mesh(np.array(jax.devices()[:1]), ("workers",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": P("workers"), "out_specs": P("workers")}
        return jax.shard_map(partial(lax.map, apply), mesh=mesh, **specs)

    for over in (jax.vmap, lambda apply: partial(lax.map, apply), shard):
        run = jax.jit(over(lambda each: model.apply(*each, True)))
        assert_close(run(arguments), expected)


def test_training_in_a_scan_equals_a_loop(model, variables):
    def step(carry, key):
        params, model_state = carry

        def loss(params):
            outputs, state = model.apply(params, model_state, INPUTS, key, True)
            return (outputs**2).mean(), state

        gradient, model_state = jax.grad(loss, has_aux=True)(params)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), model_state), ()

    keys = jax.random.split(KEY, 3)
    scanned, _ = jax.jit(partial(lax.scan, step))(variables, keys)
    looped, one_step = variables, jax.jit(step)
    for key in keys:
        looped, _ = one_step(looped, key)
    assert_close(scanned, looped)
    assert scanned[1]["calls"]["count"] == 3


class Boxed(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        start = linen.with_partitioning(linen.initializers.ones_init(), (None, "model"))
        self.sow("intermediates", "inputs", inputs)
        return linen.Dense(3, kernel_init=start)(inputs)


def test_parameters_are_plain_arrays_and_sown_values_are_not_part_of_the_model_state():
    model = from_linen(Boxed(), INPUTS)
    params, model_state = model.init(KEY)
    assert type(params["Dense_0"]["kernel"]) is type(INPUTS)
    outputs, after = model.apply(params, model_state, INPUTS, None, True)
    assert model_state == after == {}
    assert_close(outputs, INPUTS @ np.ones((5, 3)))


class Many(linen.Module):
    """Two inputs and two outputs; it sows into collections of its own and reads a constant one."""

    @linen.compact
    def __call__(self, inputs):
        hidden = linen.Dense(3)(inputs["image"]) + inputs["bias"]
        self.sow("losses", "mean", hidden.mean())
        add = lambda total, value: total + value
        self.sow("sums", "mean", hidden.mean(), reduce_fn=add, init_fn=lambda: jnp.zeros(()))
        table = self.variable("constants", "table", lambda: jnp.arange(3.0))
        if self.is_initializing():
            self.put_variable("optional", "shift", jnp.ones(()))
        shift = self.get_variable("optional", "shift", 0.0)
        return hidden, hidden * table.value[None] + shift


@pytest.mark.parametrize("like", [np.zeros, jnp.zeros, jax.ShapeDtypeStruct])
def test_inputs_may_be_a_tree_and_sown_collections_are_not_part_of_the_model_state(like):
    shapes = {"image": like((2, 5), jnp.float32), "bias": like((2, 3), jnp.float32)}
    model = from_linen(Many(), shapes)
    params, model_state = model.init(KEY)
    inputs = {"image": jnp.ones((2, 5)), "bias": jnp.ones((2, 3))}
    (first, second), after = model.apply(params, model_state, inputs, KEY, True)
    assert set(model_state) == {"constants", "optional"}
    assert_same(model_state, after)
    assert_close(second, first * np.arange(3.0)[None] + 1)


class Pair(linen.Module):
    def __call__(self, first, second):
        return first


@pytest.mark.parametrize(
    "module, inputs, sentence",
    [
        (linen.Dense, INPUTS, "and got the class Dense"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), INPUTS, "a Flax Linen module, .* and got Linear"),
        (linen.Module(), INPUTS, "Module has no __call__"),
        (Pair(), INPUTS, r"Pair cannot be called as module\(inputs\).* argument: 'second'"),
        (linen.Dense(2), (1, 5), r"jax.ShapeDtypeStruct\(\(1, 3\), 'float32'\), got int"),
        (linen.Dense(2), [[1.0, 2.0]], "example inputs must be arrays, .* got float"),
        (linen.Dense(2), np.array(["a"]), "example inputs must be arrays, .* got <U1"),
    ],
    ids=["class", "nnx", "no call", "two inputs", "shape", "list", "text"],
)
def test_what_is_no_module_or_no_input_is_an_error(module, inputs, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        from_linen(module, inputs)


def test_layers_whose_gradient_hands_over_values_are_refused():
    """Their scaling factors would stay as they were initialized."""
    model = from_linen(linen.Dense(2, dot_general_cls=linen.Fp8DirectDotGeneralOp), INPUTS)
    with pytest.raises(ConfigurationError, match="float8 layers .* 16 bits at least"):
        jax.eval_shape(model.init, KEY)
