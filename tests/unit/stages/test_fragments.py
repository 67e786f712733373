"""Fragments by size and by path, and their messages: compressed, or mixed with a factor of 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import jaxlocal
from jaxlocal import ConfigurationError, Layout
from jaxlocal.compression import identity, payload_bits, top_k
from jaxlocal.stages import fragments_of

LAYOUT = Layout(1, 4, weights=[1, 2, 3, 4])
SGD = optax.sgd(0.1, momentum=0.9)
MODEL = {"embed": jnp.ones(6), "layers": [jnp.ones(8), jnp.ones(8)], "head": jnp.ones(3)}


def streaming(**options):
    """Two fragments of the linear model, of 3 values and of 1."""
    options = {"period": 4, "delay_steps": 1, "fragments": 2} | options
    return jaxlocal.streaming_diloco(problems.grad_fn, SGD, **options)


def run(method, rounds=6, steps=2):
    round_fn = problems.on_one_device(method, LAYOUT)
    state = round_fn.init(problems.START, jax.random.key(0))
    batches = problems.make_batches(LAYOUT, 16)  # the same in runs of any length
    for start in range(0, rounds * steps, steps):
        part = problems.steps_of(batches, start, start + steps)
        state, _ = round_fn(state, part, length=steps)
    return state


def test_a_tensor_belongs_to_the_first_pattern_that_is_found_in_its_path():
    numbers = fragments_of(MODEL, ["embed|layers/0", "layers", ""])
    assert numbers == {"embed": 0, "layers": [0, 1], "head": 2}


@pytest.mark.parametrize(
    ("fragments", "sentence"),
    [
        (5, "4 tensors does not divide into 5 fragments"),
        (["embed", "layers"], "none of the fragments .* is found in head"),
        (["", "layers"], "no tensor belongs to the fragment 'layers'"),
    ],
)
def test_fragments_that_do_not_fit_the_model_are_refused(fragments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        fragments_of(MODEL, fragments)


def test_fragments_that_do_not_fit_are_refused_when_the_state_is_made():
    round_fn = problems.on_one_device(streaming(fragments=["weight", "wieght"]), LAYOUT)
    with pytest.raises(ConfigurationError, match="none of the fragments .* is found in bias"):
        round_fn.init(problems.START, jax.random.key(0))


def test_named_fragments_are_sent_in_their_order():
    round_fn = problems.on_one_device(streaming(fragments=["bias", "weight"]), LAYOUT)
    shapes = round_fn.shapes(jax.tree.map(jnp.float32, problems.START))
    assert round_fn.method.outer.turns == 2
    ends = [round_fn.stage_bits(shapes, number)[1].workers for number in range(4)]
    assert ends == [32, 96, 32, 96]


def test_the_identity_compressor_is_no_compressor():
    plain, compressed = run(streaming()), run(streaming(compressor=identity()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),  # float32 rounds
        (plain.params, plain.anchor),
        (compressed.params, compressed.anchor),
    )


@pytest.mark.optimized
def test_one_fragment_without_delay_is_error_feedback_with_an_outer_optimizer():
    """With P = 1, τ = 0, α = 0 compressed streaming DiLoCo is SparseLoCo whose errors do not decay:
    the same messages, the same residuals, the same outer steps."""
    outer, compressor = optax.sgd(0.7, momentum=0.9, nesterov=True), top_k(2)
    streamed = run(
        streaming(
            fragments=1,
            delay_steps=0,
            mixing_factor=0.0,
            period=2,
            outer_optimizer=outer,
            compressor=compressor,
        )
    )
    loco = run(
        jaxlocal.sparse_loco(
            problems.grad_fn,
            SGD,
            compressor=compressor,
            period=2,
            outer_optimizer=outer,
            error_decay=1.0,
        )
    )
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(loco.memory.outer.stacked.residual))
    jax.tree.map(
        np.testing.assert_array_equal,
        (streamed.params, streamed.anchor, streamed.memory.outer.stages[0].stacked.residual),
        (loco.params, loco.anchor, loco.memory.outer.stacked.residual),
    )


def test_compressed_fragments_send_the_payload_of_the_compressor_or_all_where_none_fits():
    method = streaming(fragments=["weight", "bias"], compressor=top_k(2))
    round_fn = problems.on_one_device(method, LAYOUT)
    model = {"weight": jnp.zeros(4096), "bias": jnp.zeros(())}
    shapes = round_fn.shapes(model)
    sizes = [round_fn.stage_bits(shapes, number)[1].workers for number in range(2)]
    assert sizes == [payload_bits(top_k(2), {"weight": model["weight"]}), 32]
    assert sizes[0] < 32 * 4096


def test_a_compressor_that_fits_no_tensor_of_the_model_is_refused():
    round_fn = problems.on_one_device(streaming(compressor=top_k(64)), LAYOUT)
    with pytest.raises(ConfigurationError, match="the largest tensor has 3"):
        round_fn.init(problems.START, jax.random.key(0))


def test_a_round_changes_the_errors_of_its_own_fragment_alone():
    method = streaming(
        compressor=top_k(3),
        delay_steps=0,
        mixing_factor=0.0,
        outer_optimizer=optax.sgd(1.0),
    )

    def errors(rounds):
        residuals = [t.stacked.residual for t in run(method, rounds).memory.outer.stages]
        return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(r)]) for r in residuals]

    first, before, after = errors(1), errors(7), errors(8)
    assert [x.size for x in before] == [12, 4]  # of four workers: a weight of 3 values, a bias
    assert np.abs(first[0]).max() > 0 and np.abs(first[1]).max() == 0
    np.testing.assert_array_equal(before[0], after[0])  # the 8th round is of the second fragment
    assert np.abs(after[1]).max() == 0  # of which top_k leaves nothing out: it is one value


def test_with_a_factor_of_one_workers_keep_their_models_and_the_anchor_follows():
    state = run(streaming(mixing_factor=1.0, outer_optimizer=optax.sgd(1.0)), rounds=6)
    alone = run(jaxlocal.swap(problems.grad_fn, SGD, switch_step=0), rounds=1, steps=12)
    # Swap ends on an average: the average of models that were never synchronised.
    mean = lambda params: jax.tree.map(
        lambda x: np.einsum("dn,dn...->...", LAYOUT.weight, x), params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),  # of a dozen steps
        mean(state.params),
        mean(alone.params),
    )
    spread = np.ptp(np.asarray(state.params["weight"]), axis=1)
    assert spread.min() > 1e-3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.anchor))


@pytest.mark.parametrize("factor", [-0.1, 1.1, float("nan")])
def test_a_factor_that_is_no_share_is_refused(factor):
    with pytest.raises(ConfigurationError, match=r"mixing factor must be in \[0, 1\], got"):
        streaming(mixing_factor=factor)
