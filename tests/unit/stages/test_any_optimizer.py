"""Any optimizer of optax runs in the stages; one that cannot is refused in one sentence."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxlocal
from jaxlocal import ConfigurationError, Layout, RoundFn, make_mesh

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}


def loss(params, batch, key):
    return jnp.square(batch @ params["kernel"] + params["bias"][None] - 1).mean()


GRAD_FN = jaxlocal.gradients(loss)
MASK = {"bias": False, "kernel": True}
LABELS = {"bias": "frozen", "kernel": "trained"}
SCHEDULED = jaxlocal.scheduled(optax.adamw, optax.cosine_decay_schedule(0.1, 100))
SGD = optax.sgd(0.1)
FACTORIES = {
    "MultiSteps": lambda: optax.MultiSteps(SCHEDULED, 2),
    "MultiSteps, SAM": lambda: optax.MultiSteps(contrib.sam(SGD, SGD), 2),
    "SAM": lambda: contrib.sam(SGD, optax.chain(contrib.normalize(), optax.sgd(0.05))),
    "SAM, chained": lambda: optax.chain(optax.clip(1.0), contrib.sam(SGD, SGD)),
    "SAM, opaque": lambda: contrib.sam(SGD, SGD, opaque_mode=True),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "conditionally_mask": lambda: optax.conditionally_mask(SGD, lambda step, **_: step % 2 == 0),
    "freeze": lambda: optax.chain(SGD, optax.freeze(MASK)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10)
    ),
    "lbfgs": lambda: optax.lbfgs(),
    "masked": lambda: optax.masked(optax.adam(0.1), MASK),
    "mechanize": lambda: contrib.mechanize(optax.adam(0.1)),
    "multi_transform": lambda: optax.multi_transform(
        {"trained": optax.adam(0.1), "frozen": optax.set_to_zero()}, LABELS
    ),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(0.1), contrib.reduce_on_plateau()),
    "scheduled muon": lambda: jaxlocal.scheduled(contrib.muon, lambda step: 0.1 / (1 + step)),
    "sophia": lambda: contrib.sophia(0.1),
}
# Those that a call with these arguments alone does not make, or not into an optimizer.
NOT_ALONE = {
    "chain",
    "conditionally_transform",
    "differentially_private_aggregate",  # wants the gradient of each example
    "dpsgd",
    "measure_with_ema",
    "named_chain",
    "scale_by_muon",  # wants matrices alone
    "selective_transform",
    "snapshot",
    "stateless",
    "stateless_with_tree_map",
}
ARGUMENTS = {
    "base_optimizer": SGD,
    "clipping": 0.1,
    "decay": 0.9,
    "eta": 0.1,
    "gamma": 0.5,
    "inner": SGD,
    "k": 2,
    "key": 0,
    "learning_rate": 0.1,
    "max_backtracking_steps": 5,
    "max_delta": 1.0,
    "max_linesearch_steps": 5,
    "max_norm": 1.0,
    "min_norm": 1e-6,
    "step_size": 0.1,
    "step_size_fn": optax.constant_schedule(0.1),
    "threshold": 1.0,
    "tx": SGD,
    "weight_decay": 0.1,
}
WITH_KEY = {"add_noise", "noisy_sgd"}


def of_optax():
    """Every optimizer and transformation of optax that these arguments make, by name."""
    for module in (optax, contrib):
        for name, factory in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(factory)
            needed = {
                name
                for name, p in signature.parameters.items()
                if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
            }
            needed |= {"key"} if name in WITH_KEY else set()
            makes = "GradientTransformation" in str(signature.return_annotation)
            if makes and name not in NOT_ALONE and needed <= set(ARGUMENTS):
                arguments = {argument: ARGUMENTS[argument] for argument in sorted(needed)}
                yield pytest.param(factory, arguments, id=f"{module.__name__}.{name}")


METHODS = {
    "local_sgd": lambda optimizer: jaxlocal.local_sgd(GRAD_FN, optimizer),
    "local_sgd-reset": lambda optimizer: jaxlocal.local_sgd(
        GRAD_FN, optimizer, optimizer_state="reset", model_state="average"
    ),
    "local_sgd-average": lambda optimizer: jaxlocal.local_sgd(
        GRAD_FN, optimizer, optimizer_state="average"
    ),
    "data_parallel": lambda optimizer: jaxlocal.data_parallel(GRAD_FN, optimizer),
    "ef_sgd": lambda optimizer: jaxlocal.ef_sgd(GRAD_FN, optimizer, compressor="sign"),
    "csea": lambda optimizer: jaxlocal.csea(GRAD_FN, optimizer, reset_compressor="grbs:2"),
    "diloco": lambda optimizer: jaxlocal.diloco(GRAD_FN, SGD, outer_optimizer=optimizer),
}
# A line search and opaque SAM evaluate the loss again, where it would have to be averaged.
WITHOUT_FUNCTIONS = {"data_parallel", "diloco"}


def lower(method):
    """Trace a round, without compiling it."""
    layout = Layout(1, 2)
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=(1, 1)))
    batches = jax.ShapeDtypeStruct((1, 1, 2, 5, 4), jnp.float32)
    return round_fn.lower(round_fn.shapes(PARAMS), batches)


@pytest.mark.parametrize("factory", FACTORIES)
def test_optimizers_of_every_kind_take_local_steps(factory):
    lower(METHODS["local_sgd"](FACTORIES[factory]()))


def refused(message):
    return pytest.raises(ConfigurationError, match=re.escape(message))


def lower_or_refuse(method, optimizer):
    try:
        lower(METHODS[method](optimizer))
    except ConfigurationError as error:
        assert method in WITHOUT_FUNCTIONS
        assert re.search("needs '?(value|value_fn|obj_fn|grad_fn)'?", str(error))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["local_sgd-reset", "data_parallel", "diloco"])
@pytest.mark.parametrize(("factory", "arguments"), list(of_optax()))
def test_every_optimizer_of_optax_runs_or_is_refused_in_one_sentence(factory, arguments, method):
    lower_or_refuse(method, factory(**arguments))


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "local_sgd"])
@pytest.mark.parametrize("factory", FACTORIES)
def test_optimizers_of_every_kind_run_or_are_refused_in_one_sentence(factory, method):
    lower_or_refuse(method, FACTORIES[factory]())


def test_an_optimizer_that_needs_what_a_stage_does_not_know_is_refused():
    with refused("the optimizer needs 'value_fn', and here it can be given only grad, step, value"):
        lower(METHODS["data_parallel"](optax.lbfgs()))
    with refused("the update of the outer optimizer needs 'value', and here it can be given only"):
        lower(METHODS["diloco"](optax.polyak_sgd()))
    both = optax.chain(contrib.sam(SGD, SGD), jaxlocal.scale_by_step(0.1))
    with refused("a part of the optimizer needs 'step', and another part of it does not take that"):
        lower(METHODS["local_sgd"](both))


def changing(update):
    """SGD with another update or another state after it."""
    return optax.GradientTransformation(lambda params: {"count": jnp.int32(0)}, update)


def replaced(**leaves):
    return changing(lambda grads, state, params=None: ({**grads, **leaves}, state))


WRONG_UPDATES = {
    "shape [1]": (replaced(bias=jnp.ones(1)), "bias is float32[3] there, and float32[1] here"),
    "a scalar": (replaced(bias=0.5), "bias is float32[3] there, and float32[] here"),
    "a column": (replaced(bias=jnp.ones((3, 1))), "bias is float32[3] there, and float32[3, 1]"),
    "integers": (replaced(bias=np.ones(3, int)), "bias is float32[3] there, and int32[3] here"),
    "too many": (replaced(more=jnp.ones(3)), "more is nothing there, and float32[3] here"),
}


@pytest.mark.parametrize("method", ["local_sgd", "data_parallel", "csea", "diloco"])
@pytest.mark.parametrize("kind", WRONG_UPDATES)
def test_updates_that_are_not_like_the_parameters_are_refused(kind, method):
    optimizer, message = WRONG_UPDATES[kind]
    what = "outer optimizer" if method == "diloco" else "optimizer"
    with refused(f"the updates of the {what} must be like its parameters: {message}"):
        lower(METHODS[method](optimizer))


@pytest.mark.parametrize("method", ["local_sgd", "data_parallel", "csea", "diloco"])
def test_a_state_that_changes_its_form_is_refused(method):
    optimizer = changing(lambda grads, state, params=None: (grads, {"count": jnp.float32(0)}))
    with refused("must be like the one before: count is int32[] there, and float32[] here"):
        lower(METHODS[method](optimizer))


def test_updates_of_another_precision_are_taken():
    lower(METHODS["local_sgd"](replaced(bias=jnp.ones(3, jnp.bfloat16))))


def test_a_line_search_finds_the_minimum_of_the_workers_own_loss():
    """Both workers reach the optimum of a quadratic, from where Newton's directions lead them."""
    curvature = jnp.array([1.0, 3.0, 10.0])
    grad_fn = jaxlocal.gradients(lambda w, batch, key: 0.5 * curvature @ jnp.square(w - batch))
    layout = Layout(1, 2)
    method = jaxlocal.local_sgd(grad_fn, optax.lbfgs(), period=12)
    round_fn = RoundFn(method, layout, make_mesh(layout, shape=(1, 1)))
    optima = np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 5.0]], np.float32)
    state = round_fn.init(jnp.zeros(3), jax.random.key(0))
    state, _ = round_fn.local_steps(state, np.broadcast_to(optima, (12, 1, 2, 3)))
    np.testing.assert_allclose(state.params[0], optima, atol=1e-4)
