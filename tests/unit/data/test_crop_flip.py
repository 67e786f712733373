"""Crops and flips: the same draws for every cut of the steps, on the host and on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlocal.data.crop_flip import CropFlip, crop_and_flip, crop_and_flip_on_host
from jaxlocal.errors import ConfigurationError


def reference(image, down, right, mirrored):
    """Pixel by pixel, from the definition."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            row, column = y + down, (width - 1 - x if mirrored else x) + right
            if 0 <= row < height and 0 <= column < width:
                out[y, x] = image[row, column]
    return out


def padded_window(image, down, right, mirrored, pad):
    """The definition in papers: pad, cut, mirror."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    cut = padded[pad + down :, pad + right :][:height, :width]
    return cut[:, ::-1] if mirrored else cut


@st.composite
def problems(draw):
    # Few shapes, since each is compiled; some are smaller than the padding.
    shape = draw(st.sampled_from([(3, 5, 4, 3), (2, 4, 4, 1), (4, 1, 2, 2)]))
    dtype = draw(st.sampled_from([np.uint8, np.float32]))
    augmentation = CropFlip(draw(st.integers(0, 6)), draw(st.booleans()))
    seed = draw(st.integers(0, 2**40))
    images = np.random.default_rng(seed).integers(1, 256, shape).astype(dtype)
    return images, augmentation, seed


crop_and_flip_compiled = jax.jit(crop_and_flip)


@given(problems())
def test_images_on_host_and_device_are_those_of_the_definition(problem):
    images, augmentation, seed = problem
    draws = augmentation.draw(seed, 3, 1, 1, 1, len(images))
    shift, flip = draws["shift"][0, 0, 0], draws["flip"][0, 0, 0]
    each = [(*moved, mirror) for moved, mirror in zip(shift.tolist(), flip.tolist(), strict=True)]
    expected = np.stack([reference(x, *how) for x, how in zip(images, each, strict=True)])
    for image, how, result in zip(images, each, expected, strict=True):
        np.testing.assert_array_equal(padded_window(image, *how, augmentation.pad), result)
    host = crop_and_flip_on_host(images, shift, flip)
    device = np.asarray(crop_and_flip_compiled(images, shift, flip))
    assert host.dtype == device.dtype == images.dtype
    np.testing.assert_array_equal(host, expected)
    np.testing.assert_array_equal(device, expected)


def test_it_compiles_in_shard_map_scan_map_and_vmap():
    hubs, workers, steps, batch = 2, 4, 3, 2
    draws = CropFlip(2).draw(0, 0, steps, hubs, workers, batch)
    shape = (steps, hubs, workers, batch, 5, 6, 3)
    images = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)
    mesh = jax.make_mesh((hubs, workers), ("hubs", "workers"), axis_types=(AxisType.Auto,) * 2)

    def over_workers(images, shift, flip):
        return jax.vmap(lambda *hub: jax.lax.map(lambda one: crop_and_flip(*one), hub))(
            images, shift, flip
        )

    def rounds(*batches):
        def body(total, step):
            out = over_workers(*step)
            return total + out.astype(jnp.int32).sum(), out

        zero = jax.lax.pcast(jnp.int32(0), ("hubs", "workers"), to="varying")
        total, out = jax.lax.scan(body, zero, batches)
        return jax.lax.psum(total, ("hubs", "workers")), out

    spec = P(None, "hubs", "workers")
    program = jax.shard_map(
        rounds, mesh=mesh, in_specs=(spec, spec, spec), out_specs=(P(), spec), check_vma=True
    )
    total, out = jax.jit(program)(images, draws["shift"], draws["flip"])
    expected = crop_and_flip_on_host(images, draws["shift"], draws["flip"])
    np.testing.assert_array_equal(out, expected)
    assert int(total) == int(expected.astype(np.int64).sum())


@given(
    st.integers(0, 9), st.booleans(), st.lists(st.integers(0, 30), min_size=2), st.integers(0, 99)
)
def test_draws_do_not_depend_on_the_calls_and_hubs_that_they_are_cut_into(pad, flip, cuts, seed):
    augmentation, cuts = CropFlip(pad, flip), sorted(cuts)
    start, stop = cuts[0], cuts[-1]
    whole = augmentation.draw(seed, start, stop - start, 1, 6, 3)
    parts = [
        augmentation.draw(seed, a, b - a, 2, 3, 3) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    for name, values in whole.items():
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined.reshape(values.shape), values)
    assert whole["shift"].dtype == np.int8 and whole["flip"].dtype == bool
    assert (np.abs(whole["shift"]) <= pad).all() and (flip or not whole["flip"].any())


def test_draws_are_uniform_and_differ():
    draws = CropFlip(2).draw(1, 0, 100, 2, 5, 40)
    # 80,000 shifts on 5 values, 40,000 flips: five deviations of a binomial, √(n p (1 - p)).
    counts = np.bincount(draws["shift"].ravel() + 2, minlength=5)
    assert len(counts) == 5 and abs(counts - 16_000).max() < 5 * np.sqrt(80_000 * 0.2 * 0.8)
    assert abs(draws["flip"].sum() - 20_000) < 5 * np.sqrt(40_000 / 4)
    batches = {batch.tobytes() for batch in draws["shift"].reshape(-1, 80)}
    assert len(batches) == 1000  # those of all workers and steps differ
    other = CropFlip(2).draw(2, 0, 100, 2, 5, 40)
    assert (other["shift"] != draws["shift"]).any(axis=(-1, -2)).all()


def test_flips_do_not_change_the_crops():
    with_flip, without = (CropFlip(3, flip).draw(0, 5, 4, 1, 2, 8) for flip in (True, False))
    np.testing.assert_array_equal(with_flip["shift"], without["shift"])


@pytest.mark.parametrize("pad", [-1, 128])
def test_a_pad_out_of_range_is_an_error(pad):
    with pytest.raises(ConfigurationError, match=f"0 to 127 pixels, got {pad}"):
        CropFlip(pad)
