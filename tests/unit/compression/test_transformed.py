"""Compressors under JAX's transformations: compiled, batched, in a scan on a mesh, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mixed_trees import KEY, assert_close, mixed, whole_payload

from jaxlocal.compression import parse


@pytest.mark.parametrize(
    "spec",
    [
        *("identity", "zero", "grbs:8", "random_k:8", "top_k:8:model", "two_bit", "qsgd:5"),
        "powersgd:2",
    ],
)
def test_compiled_and_batched_it_gives_the_same(spec):
    code, scale = parse(spec), -0.5
    trees = [{k: mixed(seed)[k] for k in ("bias", "matrix")} for seed in range(2)]
    memory = code.init(trees[0])

    @jax.jit
    def together(stacked, scale):
        payload = jax.vmap(lambda tree: whole_payload(code, tree, memory, KEY))(stacked)
        own = jax.vmap(lambda p, x: code.decode(p, KEY, x, scale))(payload, stacked)
        first_payload, first = jax.tree.map(lambda x: x[0], (payload, stacked))
        one_payload = jax.vmap(lambda x: code.decode(first_payload, KEY, x, scale))(stacked)
        if spec == "zero":  # its payload has nothing to map over
            return own, one_payload
        return own, one_payload, jax.vmap(lambda p: code.decode(p, KEY, first, scale))(payload)

    results = together(jax.tree.map(lambda *x: jnp.stack(x), *trees), scale)
    payloads = [whole_payload(code, tree, memory, KEY) for tree in trees]
    for i in range(2):
        pairs = [(payloads[i], trees[i]), (payloads[0], trees[i]), (payloads[i], trees[0])]
        for result, (payload, onto) in zip(results, pairs, strict=False):
            one = jax.tree.map(lambda x, i=i: x[i], result)
            assert_close(one, code.decode(payload, KEY, onto, scale))


@pytest.mark.parametrize("spec", ["grbs:8", "top_k:8+int8", "qsgd:4", "powersgd:2"])
def test_inside_a_scan_on_a_mesh(spec):
    code, tree = parse(spec), {"a": mixed()["matrix"], "b": mixed()["bias"]}
    mesh = jax.make_mesh((2,), ("workers",), (jax.sharding.AxisType.Auto,))

    def residual(x):
        return code.decode(whole_payload(code, x, code.init(x), KEY), KEY, x, -1.0)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("workers"), out_specs=P("workers"))
    def twice(stacked):
        step = lambda x, _: (jax.vmap(residual)(x), None)
        return jax.lax.scan(step, stacked, length=2)[0]

    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)
    result = jax.jit(twice)(stacked)
    assert_close(jax.tree.map(lambda x: x[0], result), residual(residual(tree)), atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["grbs:8", "top_k:8", "sign", "two_bit", "qsgd:4", "int8", "powersgd:2"]
)
def test_float64_is_computed_in_float64(spec):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 30)))
        code = parse(spec)

        @jax.jit
        def both(x):
            payload = whole_payload(code, x, code.init(x), KEY)
            zeros = jnp.zeros_like(x)
            return code.decode(payload, KEY, zeros, 1.0), code.decode(payload, KEY, x, -1.0)

        sent, residual = both(x)
        assert residual.dtype == sent.dtype == jnp.float64
        np.testing.assert_allclose(sent + residual, x, rtol=0, atol=1e-14)
        assert spec in ("sign", "qsgd:4") or not np.array_equal(sent, np.float32(sent))
