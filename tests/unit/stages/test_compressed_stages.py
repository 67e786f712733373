"""Stages and methods that compress: the bits of their messages, and what they refuse."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout, compression
from jaxlocal.communication import mixing
from jaxlocal.communication.topology import hub_graph, mixing_matrix
from jaxlocal.stages.error_feedback import error_feedback
from jaxlocal.stages.error_reset import error_reset, partial_average
from jaxlocal.stages.synced_updates import synced_updates
from jaxlocal.types import MessageBits

ARGUMENTS = problems.grad_fn, optax.sgd(0.1)


def test_messages_are_the_payload():
    params = {"kernel": jnp.zeros((40, 50)), "bias": jnp.zeros(50)}
    top, blocks = compression.top_k(10), compression.grbs(20)
    top_bits = (200 + 5) * 32 + 200 * 16 + 5 * 8
    block_bits = (100 + 3) * 32
    steps = {"gradient_compressor": blocks}
    for method, inner, outer in [
        (jaxlocal.cser(*ARGUMENTS, **steps, reset_compressor=top), block_bits, top_bits),
        (
            jaxlocal.cser(*ARGUMENTS, **steps, reset_compressor=blocks, implementation=2),
            block_bits,
            block_bits,
        ),
        (
            jaxlocal.cser(
                *ARGUMENTS,
                gradient_compressor=blocks,
                reset_compressor="grbs:5",
                implementation="released",
                period=4,
            ),
            block_bits,
            (400 + 10) * 32,
        ),
        (jaxlocal.qsparse_local_sgd(*ARGUMENTS, compressor=top), 0, top_bits),
        (jaxlocal.csea(*ARGUMENTS, reset_compressor=blocks), 0, block_bits),
        (jaxlocal.data_parallel(*ARGUMENTS, compressor=blocks), block_bits, 0),
    ]:
        round_fn = problems.on_one_device(method, Layout(1, 4))
        expected = (MessageBits(inner), MessageBits(outer))
        assert round_fn.stage_bits(round_fn.shapes(params)) == expected
        alone = problems.on_one_device(method, Layout(1, 1))
        assert alone.stage_bits(alone.shapes(params)) == (MessageBits(), MessageBits())


@pytest.mark.parametrize("implementation", [2, "released"])
def test_a_reset_is_sent_besides_the_message_of_its_step_or_in_the_place_of_it(implementation):
    compressors = {"gradient_compressor": "grbs:16", "reset_compressor": "grbs:4"}
    method = jaxlocal.cser(*ARGUMENTS, **compressors, period=8, implementation=implementation)
    round_fn = problems.on_one_device(method, Layout(1, 4))
    shapes = round_fn.shapes({"w": jnp.zeros(64)})
    steps = 8 if implementation == 2 else 7
    sent = round_fn.message_bits(shapes, steps=24, rounds=3).workers
    assert sent == 3 * 32 * (steps * 64 // 16 + 64 // 4)


def test_a_hub_sends_all_payloads_that_cannot_be_averaged():
    params, layout = {"w": jnp.zeros(256)}, Layout(3, 4)
    for spec, payloads in (("grbs:4", 1), ("top_k:4", 4)):
        compressor = compression.parse(spec)
        method = jaxlocal.qsparse_local_sgd(*ARGUMENTS, compressor=compressor, period=2)
        round_fn = problems.on_one_device(method, layout)
        bits = compression.payload_bits(compressor, params)
        outer = round_fn.stage_bits(round_fn.shapes(params))[1]
        assert outer == MessageBits(workers=bits, hubs=2 * payloads * bits)


def test_errors_of_half_precision_are_sent_as_float32():
    method = jaxlocal.qsparse_local_sgd(*ARGUMENTS, compressor=compression.grbs(4), period=2)
    round_fn = problems.on_one_device(method, Layout(1, 2))
    shapes = round_fn.shapes({"w": jnp.zeros(40, jnp.bfloat16)})
    assert round_fn.stage_bits(shapes)[1].workers == 32 * 10


RING = mixing_matrix(hub_graph("ring", 4), np.full(4, 0.25))
OWN_PLACES = compression.top_k(2)  # every worker sends other places


def cser_with_own_places(implementation):
    compressors = {"gradient_compressor": OWN_PLACES, "reset_compressor": compression.grbs(2)}
    return jaxlocal.cser(*ARGUMENTS, **compressors, period=4, implementation=implementation)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: error_reset(mixing.hub_mean(), compression.grbs(2)), "error reset.*all workers"),
        (
            lambda: synced_updates(*ARGUMENTS, mixing.hub_mean(), compression.grbs(2)),
            "updates.*all workers",
        ),
        (
            lambda: error_feedback(mixing.hub_mean(), compression.grbs(2)),
            "error feedback from an anchor.*all workers",
        ),
        (
            lambda: partial_average(mixing.hub_diffusion(RING), OWN_PLACES),
            "top_k:2.*gathers none",
        ),
        (
            lambda: partial_average(mixing.from_matrix(RING), compression.powersgd(1)),
            "powersgd:1.*workers of a hub common",
        ),
        (
            lambda: cser_with_own_places(implementation=2),
            "implementation 2.*top_k:2 keeps differs",
        ),
        (
            lambda: cser_with_own_places(implementation=3),
            "implementations 1, 2, released, got 3",
        ),
        (
            lambda: cser_with_own_places(implementation="released"),
            "implementation 2.*top_k:2 keeps differs",
        ),
        (
            lambda: jaxlocal.cser(
                *ARGUMENTS,
                gradient_compressor="grbs:4",
                reset_compressor="grbs:2",
                implementation="released",
            ),
            "released implementation.*H of at least 2",
        ),
        (
            lambda: jaxlocal.sparse_loco(*ARGUMENTS, error_decay=1.5),
            r"decay of errors must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: jaxlocal.local_sgd(*ARGUMENTS, compressor=compression.grbs(2)),
            "unknown argument of local_sgd 'compressor'",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_when_it_is_built(build, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        build()


def test_an_error_reset_needs_whole_precision():
    method = jaxlocal.cser_pl(*ARGUMENTS, reset_compressor=compression.grbs(2), period=2)
    round_fn = problems.on_one_device(method, Layout(1, 2))
    with pytest.raises(ConfigurationError, match="bfloat16 is too coarse"):
        round_fn.init({"w": jnp.zeros(8, jnp.bfloat16)}, jax.random.key(0))


def test_a_ratio_above_every_tensor_is_an_error_when_the_state_is_made():
    method = jaxlocal.ef_sgd(*ARGUMENTS, compressor=compression.grbs(50))
    round_fn = problems.on_one_device(method, Layout(1, 2))
    with pytest.raises(ConfigurationError, match="50.*40"):
        round_fn.init({"w": jnp.zeros(40)}, jax.random.key(0))


def test_a_biased_compressor_without_feedback_raises_a_warning():
    sign = compression.sign()
    with pytest.warns(UserWarning, match="sign is biased, and without error feedback"):
        jaxlocal.data_parallel(*ARGUMENTS, compressor=sign)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxlocal.data_parallel(*ARGUMENTS, compressor=compression.qsgd(4))
        jaxlocal.ef_sgd(*ARGUMENTS, compressor=sign)
        jaxlocal.cser(*ARGUMENTS, gradient_compressor=sign, reset_compressor=sign, period=4)
