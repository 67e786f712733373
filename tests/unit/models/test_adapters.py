"""An NNX module becomes two pure functions, with all kinds of state and in all transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from stacked_layers import Stacked

from jaxlocal.models import from_nnx

KEY = jax.random.key(0)
INPUTS = jax.random.normal(jax.random.key(1), (8, 5))


class Users(nnx.Module):
    """Twelve layers, whose numbers sort differently as strings, dropout and batch statistics."""

    def __init__(self, rngs):
        start = nnx.initializers.constant
        self.layers = nnx.List(
            [nnx.Linear(5, 5, kernel_init=start(n / 50), rngs=rngs) for n in range(12)]
        )
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.logits = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, inputs):
        for layer in self.layers:
            inputs = inputs + jnp.tanh(layer(inputs))
        return self.logits(self.dropout(self.norm(inputs)))


@pytest.fixture(scope="module")
def model():
    return from_nnx(Users)


@pytest.fixture(scope="module")
def variables(model):
    return model.init(KEY)


def assert_close(ours, theirs):
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # float32, a dozen layers

    jax.tree.map(one, ours, theirs)


def test_variables_are_plain_trees_without_random_state(variables):
    params, model_state = variables
    assert set(params) == {"layers", "norm", "logits"}
    assert set(params["layers"]) == {str(number) for number in range(12)}
    assert jax.tree.map(jnp.shape, params["norm"]) == {"bias": (5,), "scale": (5,)}
    assert jax.tree.map(jnp.shape, model_state) == {"norm": {"mean": (5,), "var": (5,)}}
    for leaf in jax.tree.leaves(variables):
        assert type(leaf) is type(INPUTS) and leaf.dtype == jnp.float32


def test_init_gives_the_parameters_of_the_module(variables):
    module = Users(nnx.Rngs(KEY))
    for number, layer in enumerate(module.layers):
        np.testing.assert_array_equal(
            variables[0]["layers"][str(number)]["kernel"], layer.kernel[...]
        )
    np.testing.assert_array_equal(variables[0]["logits"]["kernel"], module.logits.kernel[...])


def test_init_may_be_jitted_and_evaluated_in_shape(model, variables):
    assert_close(jax.jit(model.init)(KEY), variables)
    shapes = jax.eval_shape(model.init, KEY)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)


def test_in_evaluation_it_is_the_module_in_evaluation(model, variables):
    outputs, model_state = model.apply(*variables, INPUTS, None, False)
    module = Users(nnx.Rngs(KEY))
    module.eval()
    np.testing.assert_array_equal(outputs, module(INPUTS))
    jax.tree.map(np.testing.assert_array_equal, model_state, variables[1])


def test_in_training_batch_statistics_move_as_in_the_module(model, variables):
    _, model_state = model.apply(*variables, INPUTS, KEY, True)
    module = Users(nnx.Rngs(KEY))
    module(INPUTS)
    np.testing.assert_array_equal(model_state["norm"]["mean"], module.norm.mean[...])
    np.testing.assert_array_equal(model_state["norm"]["var"], module.norm.var[...])
    assert np.abs(model_state["norm"]["mean"]).max() > 0
    assert jax.tree.structure(model_state) == jax.tree.structure(variables[1])


def test_dropout_depends_on_the_key_and_is_off_in_evaluation(model, variables):
    def outputs(key, train):
        return np.asarray(model.apply(*variables, INPUTS, key, train)[0])

    other = jax.random.key(7)
    np.testing.assert_array_equal(outputs(KEY, True), outputs(KEY, True))
    assert (outputs(KEY, True) != outputs(other, True)).any()
    np.testing.assert_array_equal(outputs(KEY, False), outputs(other, False))


class Noises(nnx.Module):
    """Two layers that draw from one stream, and a third from another stream."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Dropout(0.5, rngs=rngs) for _ in range(2))
        self.third = nnx.Dropout(0.5, rng_collection="noise", rngs=nnx.Rngs(noise=rngs()))

    def __call__(self, inputs):
        return jnp.stack([self.first(inputs), self.second(inputs), self.third(inputs)])


def test_every_layer_draws_its_own_numbers():
    model = from_nnx(Noises)
    masks, _ = model.apply({}, {}, jnp.ones((1, 64)), KEY, True)
    assert len({mask.tobytes() for mask in np.asarray(masks)}) == 3


def test_jit_changes_nothing(model, variables):
    for train in (True, False):
        plain = model.apply(*variables, INPUTS, KEY, train)
        jitted = jax.jit(model.apply, static_argnames="train")(*variables, INPUTS, KEY, train=train)
        assert_close(jitted, plain)


def workers(model):
    """The variables, inputs and keys of three workers, and the result of each worker alone."""
    keys = jax.random.split(KEY, 3)
    inputs = jax.random.normal(KEY, (3, 8, 5))
    stacked = jax.jit(jax.vmap(model.init))(keys)
    one = lambda pick: jax.tree.map(lambda a: a[pick], (*stacked, inputs, keys))
    apply = jax.jit(model.apply, static_argnums=4)
    results = [apply(*one(number), True) for number in range(3)]
    return (*stacked, inputs, keys), jax.tree.map(lambda *a: jnp.stack(a), *results)


def test_vmap_map_and_shard_map_equal_one_at_a_time(model):
    arguments, expected = workers(model)

    def apply(arguments):
        return model.apply(*arguments, True)

    def shard(one):
        mesh = Mesh(np.array(jax.devices()[:1]), ("workers",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": P("workers"), "out_specs": P("workers")}
        return jax.shard_map(partial(lax.map, one), mesh=mesh, **specs)

    for over in (jax.vmap, lambda one: partial(lax.map, one), shard):
        assert_close(jax.jit(over(apply))(arguments), expected)


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


def test_first_use_may_be_inside_a_transformation():
    model = from_nnx(Users)
    variables = jax.jit(model.init)(KEY)
    jitted = jax.jit(lambda v: model.apply(*v, INPUTS, KEY, True))(variables)
    assert_close(jitted, model.apply(*variables, INPUTS, KEY, True))


def dropped(rngs):
    return nnx.Sequential(nnx.Linear(5, 5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))


def test_stacked_random_streams():
    model = from_nnx(partial(Stacked, dropped))
    variables = jax.jit(model.init)(KEY)
    first, second = (
        model.apply(*variables, INPUTS, jax.random.key(seed), True)[0] for seed in (0, 1)
    )
    assert (np.asarray(first) != np.asarray(second)).any()
    again, _ = jax.jit(partial(model.apply, train=True))(*variables, INPUTS, jax.random.key(0))
    assert_close(again, first)


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, inputs):
        outputs = self.linear(inputs)
        self.sow(nnx.Intermediate, "outputs", outputs)
        return outputs


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_sown_values_are_not_part_of_the_model_state():
    model = from_nnx(Sowing)
    params, model_state = model.init(KEY)
    assert model_state == {} == model.apply(params, model_state, INPUTS, None, False)[1]


def test_making_an_adapter_builds_nothing():
    def never(rngs):
        raise AssertionError("the module was built")

    from_nnx(never)
