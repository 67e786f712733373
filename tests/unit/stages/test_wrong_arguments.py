"""Arguments of a wrong kind: one sentence each, with what was wanted and what was got."""

import re

import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, mixing, stages
from jaxlocal.communication import topology
from jaxlocal.stages.gradient import accumulate

SGD = optax.sgd(0.1)
STEP = stages.local_step(problems.grad_fn, SGD)
MATRIX = "the entries of a mixing matrix must be real numbers, got "
MIXER = "a mixer is what jaxlocal.mixing.mean() and the others make, got "
STAGE = "a stage is one of jaxlocal.stages, got "
RATE = "a learning rate must be a number or a function of the step, got "


def local_sgd(**options):
    return jaxlocal.local_sgd(problems.grad_fn, SGD, **options)


WRONG = {
    "matrix, text": (lambda: mixing.from_matrix("abc"), MATRIX + "'abc'"),
    "matrix, ragged": (lambda: mixing.hub_diffusion([[1, 2], [3]]), MATRIX + "[[1, 2], [3]]"),
    "matrix, complex": (
        lambda: mixing.from_matrix([[1j, 0], [0, 1]]),
        MATRIX + "[[1j, 0], [0, 1]]",
    ),
    "graph, none": (
        lambda: topology.hub_graph(None, 2),
        "unknown hub graph",
    ),
    "graph, no hubs": (
        lambda: topology.hub_graph("ring", 0),
        "hubs must be an integer of at least 1, got 0",
    ),
    "graph, half a hub": (
        lambda: topology.hub_graph("ring", 2.5),
        "hubs must be an integer of at least 1, got 2.5",
    ),
    "weights, negative": (
        lambda: topology.mixing_matrix(np.ones((2, 2)), [-1, 2]),
        "hub weights must be > 0 and finite, got [-1.  2.]",
    ),
    "weights, NaN": (
        lambda: topology.mixing_matrix(np.ones((2, 2)), [np.nan, 2]),
        "hub weights must be > 0 and finite, got [nan  2.]",
    ),
    "worker map, number": (
        lambda: local_sgd(worker_map=3),
        "unknown worker map 3; known:",
    ),
    "state, none": (
        lambda: local_sgd(optimizer_state=None),
        "unknown optimizer state option None; known: keep, average, reset",
    ),
    "state, list": (
        lambda: local_sgd(model_state=["keep"]),
        "unknown model state option ['keep']; known: keep, average",
    ),
    "decay, text": (
        lambda: stages.error_feedback(mixing.mean(), "sign", error_decay="a"),
        "the decay of errors must be in [0, 1], got 'a'",
    ),
    "factor, none": (
        lambda: stages.overlapped(STEP, mixing.mean(), SGD, mixing_factor=None),
        "the mixing factor must be in [0, 1], got None",
    ),
    "fragments, none": (
        lambda: jaxlocal.streaming_diloco(problems.grad_fn, SGD, period=8, fragments=None),
        "fragments must be a number of at least 1 or a list of regular expressions, got None",
    ),
    "micro-batches": (
        lambda: accumulate(problems.grad_fn, 2.5),
        "micro-batches must be an integer of at least 1, got 2.5",
    ),
    "repetitions": (
        lambda: stages.repeat(STEP, "twice"),
        "the repetitions of a stage must be an integer of at least 1, got 'twice'",
    ),
    "stage, none": (lambda: stages.sequence(STEP, None), STAGE + "None"),
    "stage, text": (lambda: stages.in_turn("sync"), STAGE + "'sync'"),
    "stage, repeated": (lambda: stages.repeat(SGD, 2), STAGE),
    "sync": (lambda: stages.sync("mean"), MIXER + "'mean'"),
    "error feedback": (lambda: stages.error_feedback(None, "sign"), MIXER + "None"),
    "average": (lambda: stages.averaged_gradients(problems.grad_fn, SGD, mixing.mean), MIXER),
    "outer step": (lambda: stages.outer_step("mean", SGD), MIXER + "'mean'"),
    "rate, none": (lambda: jaxlocal.scheduled(optax.sgd, None), RATE + "None"),
    "rate, text": (lambda: jaxlocal.scale_by_step("0.1"), RATE + "'0.1'"),
    "rate, list": (lambda: jaxlocal.scheduled(optax.sgd, [0.1]), RATE + "[0.1]"),
    "rate of slowmo": (
        lambda: jaxlocal.slowmo(problems.grad_fn, SGD, period=4, learning_rate="0.1"),
        RATE + "'0.1'",
    ),
    "factory": (lambda: jaxlocal.scheduled(SGD, 0.1), "scheduled takes a function that makes an"),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_refused_in_one_sentence(case):
    make, message = WRONG[case]
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        make()
