"""GRBS over groups of whole tensors: its masks by a slow loop, its bits and how often it keeps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlocal.compression import grbs_tensors, parse, payload_bits
from jaxlocal.errors import ConfigurationError

KEY = jax.random.key(3)
SIZES = (5, 301, 64, 100, 30)


def tensors():
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=n), jnp.float32) for n in SIZES]


def groups_of(lengths, groups):
    """The number of each tensor's group: the largest first, to the smallest group so far."""
    totals, chosen = [[0, 0, g] for g in range(groups)], {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        totals.sort()
        chosen[i] = totals[0][2]
        totals[0] = [totals[0][0] + lengths[i], totals[0][1] + 1, totals[0][2]]
    return chosen, max(total for total, *_ in totals)


def mask_of(sizes, ratio, groups, key):
    words = np.asarray(jax.random.bits(key, (len(sizes) + 1,), jnp.uint32)).tolist()
    kept = [math.ceil(n / ratio) for n in sizes]
    chosen, _ = groups_of(kept, groups)
    masks = []
    for i, (n, k) in enumerate(zip(sizes, kept, strict=True)):
        start = min(words[i + 1] % math.ceil(n / k) * k, n - k)
        own = chosen[i] == words[0] % groups
        masks.append([own and start <= j < start + k for j in range(n)])
    return masks


@pytest.mark.parametrize(("ratio", "groups"), [(4, 3), (1, 2), (2.5, 5), (8, 1)])
def test_it_equals_its_loop(ratio, groups):
    code, xs = grbs_tensors(ratio, groups), tensors()
    for key in jax.random.split(KEY, 6):
        payload = code.encode(xs, (), key)
        sent = code.decode(payload, key, jax.tree.map(jnp.zeros_like, xs), 1.0)
        residual = code.decode(payload, key, xs, -1.0)
        for x, s, r, mask in zip(
            xs, sent, residual, mask_of(SIZES, ratio, groups, key), strict=True
        ):
            np.testing.assert_array_equal(s, np.where(mask, x, 0))
            np.testing.assert_array_equal(r, np.where(mask, 0, x))


@pytest.mark.parametrize(("ratio", "groups"), [(4, 3), (1, 2), (2.5, 5)])
def test_every_payload_has_the_size_of_the_largest_group(ratio, groups):
    _, largest = groups_of([math.ceil(n / ratio) for n in SIZES], groups)
    assert payload_bits(grbs_tensors(ratio, groups), tensors()) == 32 * largest


def test_equal_tensors_shrink_by_the_nominal_ratio_and_a_large_one_does_not():
    code = grbs_tensors(4, 8)
    assert code.ratio == 32 and 32 * payload_bits(code, [jnp.zeros(64)] * 16) == 32 * 64 * 16
    assert payload_bits(code, [jnp.zeros(6400), *[jnp.zeros(64)] * 15]) == 32 * 1600


def test_a_tensor_is_kept_as_often_as_delta_says():
    code, xs = grbs_tensors(4, 3), [jnp.ones(n) for n in (8, 12, 16, 20)]

    @jax.jit
    @jax.vmap
    def kept(key):
        return code.decode(code.encode(xs, (), key), key, jax.tree.map(jnp.zeros_like, xs), 1.0)

    count = 6000
    delta, error = code.delta(xs), math.sqrt(1 / 12 * 11 / 12 / count)
    assert delta == 1 / 12
    for x in kept(jax.random.split(KEY, count)):
        assert (np.abs(np.asarray(x).mean(0) - delta) < 4.5 * error).all()


def test_other_dtypes_integers_and_structure_are_kept():
    tree = {
        **{"a": jnp.arange(8.0).reshape(2, 4), "b": jnp.ones(6, jnp.bfloat16)},
        **{"n": jnp.arange(3), "empty": jnp.zeros((0, 2))},
    }
    code = grbs_tensors(2, 2)
    payload = code.encode(tree, (), KEY)
    assert [(x.dtype, x.shape) for x in payload[:1]] == [(jnp.float32, (4,))]
    onto = jax.tree.map(jnp.zeros_like, tree) | {"a": jnp.zeros((2, 4), jnp.bfloat16)}
    sent = code.decode(payload, KEY, onto, 1.0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), sent) == jax.tree.map(
        lambda x: (x.shape, x.dtype), onto
    )
    np.testing.assert_array_equal(sent["n"], tree["n"])
    assert (np.float32(sent["a"]) != 0).sum() in (0, 3, 4) and sent["empty"].shape == (0, 2)


def test_inside_a_scan_on_a_mesh():
    code, xs = grbs_tensors(4, 3), tensors()
    mesh = jax.make_mesh((2,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    stacked = [jnp.stack([x, 2 * x]) for x in xs]

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("workers"), out_specs=P("workers"))
    def residuals(stacked):
        def body(carry, key):
            encode = jax.vmap(lambda x: code.encode(x, (), key))
            decode = jax.vmap(lambda payload, x: code.decode(payload, key, x, -1.0))
            return decode(encode(carry), carry), None

        return jax.lax.scan(body, stacked, jax.random.split(KEY, 2))[0]

    masks = [mask_of(SIZES, 4, 3, key) for key in jax.random.split(KEY, 2)]
    for number, (x, residual) in enumerate(zip(xs, residuals(stacked), strict=True)):
        kept = np.any([mask[number] for mask in masks], axis=0)
        np.testing.assert_array_equal(residual, np.where(kept, 0, np.stack([x, 2 * x])))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: grbs_tensors(0.5, 2), "the ratio of grbs must be"),
        (lambda: grbs_tensors(4, 0), "the groups of grbs_tensors must be an integer of at least 1"),
        (lambda: parse("grbs_tensors:4"), "grbs_tensors needs a number of groups"),
        (lambda: grbs_tensors(4, 6).init(tensors()), "into 6 groups, but there are 5"),
        (lambda: grbs_tensors(400, 2).init(tensors()), "one value in 400"),
    ],
)
def test_what_does_not_fit_is_refused(make, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        make()
