"""Specs of augmentations; and augmentations together: draws of every cut, host and device."""

import jax
import numpy as np
import pytest

from jaxlocal.data import (
    ColourJitter,
    Composed,
    CropFlip,
    PcaNoise,
    RandAugment,
    ResizedCrop,
    parse_augmentation,
)
from jaxlocal.errors import ConfigurationError

ON_DEVICE = [
    CropFlip(2),
    ResizedCrop(0.1),
    ColourJitter(0.9),
    PcaNoise(0.5),
    Composed(ResizedCrop(), CropFlip(0), ColourJitter(), PcaNoise()),
]


@pytest.mark.parametrize("augmentation", ON_DEVICE, ids=str)
def test_host_and_device_give_the_same_bits(augmentation):
    images = np.random.default_rng(1).integers(256, size=(6, 8, 11, 7, 3), dtype=np.uint8)
    draws = augmentation.draw(5, 0, 1, 1, 6, 8)
    draws = {name: values[0, 0] for name, values in draws.items()}
    host = augmentation.apply_on_host(images, draws)
    device = np.asarray(jax.jit(augmentation.apply)(images, {**draws, "targets": np.zeros(6)}))
    assert host.dtype == device.dtype == np.uint8 and host.shape == images.shape
    np.testing.assert_array_equal(host, device)
    assert (host != images).any(axis=(2, 3, 4)).mean() > 0.9


@pytest.mark.parametrize("augmentation", [*ON_DEVICE, RandAugment(3)], ids=str)
def test_draws_do_not_depend_on_the_calls_and_hubs_that_they_are_cut_into(augmentation):
    whole = augmentation.draw(7, 3, 5, 1, 6, 2)
    parts = [augmentation.draw(7, *cut, 2, 3, 2) for cut in ((3, 2), (5, 0), (5, 3))]
    other = augmentation.draw(8, 3, 5, 1, 6, 2)
    assert any((other[name] != values).any() for name, values in whole.items())
    for name, values in whole.items():
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined.reshape(values.shape), values)
        assert values.shape[:4] == (5, 1, 6, 2)


def test_kinds_share_no_draws():
    """Two that drew from one generator would be correlated."""
    kinds = [*ON_DEVICE[:4], RandAugment()]
    assert len({kind.seed_entry for kind in kinds}) == len(kinds)
    names = [name for kind in kinds for name in kind.draw(0, 0, 1, 1, 1, 1)]
    assert len(set(names)) == len(names)  # as those of a composition are merged


def test_a_composition_is_one_after_another():
    images = np.random.default_rng(2).integers(256, size=(1, 1, 1, 4, 6, 6, 3), dtype=np.uint8)
    first, second = ColourJitter(0.9), PcaNoise(0.9)
    draws = Composed(first, second).draw(0, 2, 1, 1, 1, 4)
    expected = second.apply_on_host(
        first.apply_on_host(images, first.draw(0, 2, 1, 1, 1, 4)), second.draw(0, 2, 1, 1, 1, 4)
    )
    np.testing.assert_array_equal(Composed(first, second).apply_on_host(images, draws), expected)
    assert Composed(first, second) != Composed(second, first)
    assert Composed(first, RandAugment()).only_on_host and not Composed(first).only_on_host


@pytest.mark.parametrize(
    "augmentation, shape, dtype, message",
    [
        (CropFlip(), (32,), np.uint8, r"needs inputs \[height, width, channels\], got \[32\]"),
        (ResizedCrop(), (8, 8, 3), np.float32, "needs images of uint8, got float32"),
        (ResizedCrop(), (1 << 15, 8, 3), np.uint8, "16384 pixels a side at most"),
        (ColourJitter(), (8, 8, 2), np.uint8, "1 or 3 channels, got 2"),
        (PcaNoise(), (8, 8, 1), np.uint8, "3 channels, got 1"),
        (RandAugment(), (8, 8, 4), np.uint8, "1 or 3 channels, got 4"),
        (Composed(CropFlip(), PcaNoise()), (8, 8, 1), np.uint8, "3 channels, got 1"),
    ],
)
def test_images_that_do_not_fit_are_errors(augmentation, shape, dtype, message):
    with pytest.raises(ConfigurationError, match=message):
        augmentation.check(shape, dtype)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("none", None),
        ("flip", CropFlip(0, True)),
        ("crop", CropFlip(4, False)),
        ("crop:2", CropFlip(2, False)),
        ("crop,flip", CropFlip(4, True)),
        ("crop:7,flip", CropFlip(7, True)),
        ("flip, crop", CropFlip(4, True)),
        ("resized_crop", ResizedCrop(0.08)),
        ("resized_crop:0.25,flip", Composed(ResizedCrop(0.25), CropFlip(0, True))),
        ("jitter", ColourJitter(0.4)),
        ("jitter:1", ColourJitter(1.0)),
        ("pca:0.2", PcaNoise(0.2)),
        ("randaugment", RandAugment(2, 10)),
        ("randaugment:3", RandAugment(3, 10)),
        ("randaugment:1:7.5", RandAugment(1, 7.5)),
        (
            "pca,jitter,randaugment,flip,crop:2",
            Composed(CropFlip(2, True), RandAugment(), ColourJitter(), PcaNoise()),
        ),
    ],
)
def test_specs(spec, expected):
    assert parse_augmentation(spec) == expected


@pytest.mark.parametrize(
    "spec, message",
    [
        ("corp", "unknown augmentation 'corp'; did you mean 'crop'"),
        ("", "unknown augmentation ''; known: none, flip, crop"),
        ("crop,flop", "unknown augmentation 'flop'; did you mean 'flip'"),
        ("flip:2", "'flip' takes no argument, got 'flip:2'"),
        ("crop:0", "from 1 to 127, got '0' in 'crop:0'"),
        ("crop:-1,flip", "from 1 to 127, got '-1' in 'crop:-1,flip'"),
        ("crop:", "from 1 to 127, got ''"),
        ("crop:128", "from 1 to 127, got '128'"),
        ("flip,flip", "'flip,flip' names 'flip' more than once"),
        ("none,flip", "'none' cannot be combined, got 'none,flip'"),
        ("none:1", "'none' takes no argument, got 'none:1'"),
        ("crop,resized_crop", "'crop,resized_crop' crops twice"),
        ("crop:1:2", "'crop' takes one number, got 'crop:1:2'"),
        ("resized_crop:0", "area of a crop must be above 0 and at most 1, got 0.0"),
        ("resized_crop:nan", "got nan"),
        ("resized_crop:half", "'half' in augmentation 'resized_crop:half' is not a number"),
        ("jitter:1.5", "colour jitter must be above 0 and at most 1, got 1.5"),
        ("pca:-1", "PCA noise must be above 0 and at most 1, got -1.0"),
        ("randaugment:0", "takes 1 to 10 operations, got 0"),
        ("randaugment:1.5", "'1.5' in augmentation 'randaugment:1.5' is not a whole number"),
        ("randaugment:2:31", "magnitude of RandAugment must be 0 to 30, got 31.0"),
        ("randaugment:2:3:4", "'randaugment' takes two numbers at most, got 'randaugment:2:3:4'"),
    ],
)
def test_wrong_specs_are_errors(spec, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_augmentation(spec)
