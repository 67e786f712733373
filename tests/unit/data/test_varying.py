"""Images of varying size: what is cut from them, by sources and by streams, and the errors."""

import io

import numpy as np
import pytest
import tiny_images

from jaxlocal.data import (
    ColourJitter,
    Composed,
    CropFlip,
    PcaNoise,
    ResizedCrop,
    Stream,
    StreamError,
    load,
    make_batches,
)
from jaxlocal.data.resized_crop import random_windows
from jaxlocal.data.varying import RandomCrop
from jaxlocal.errors import ConfigurationError

tfds = pytest.importorskip("tensorflow_datasets")
Image = pytest.importorskip("PIL.Image")

SIZE, SEED = 16, 5
# JPEG errs by up to 3 levels on slopes; two rounded channels and the resize by 1 more.
LEVELS = 4.0


def extent(split, number):
    """Height and width of an image; one is so large that JPEG is decoded at a part of its size."""
    return (210, 340) if number == 3 else (20 + 3 * number, 31 + 2 * number + (split == "test"))


def slopes(height, width, y, x):
    """Red rises down and green to the right; blue is constant."""
    rows, columns = np.broadcast_arrays(y[:, None] * 250 / height, x[None] * 250 / width)
    return np.stack([rows, columns, np.full(rows.shape, 77.0)], -1)


def encoded(split, number, kind="jpeg"):
    height, width = extent(split, number)
    pixels = slopes(height, width, np.arange(height), np.arange(width))
    file = io.BytesIO()
    image = Image.fromarray(np.rint(pixels).astype(np.uint8))
    image.save(file, kind, **({"quality": 98, "subsampling": 0} if kind == "jpeg" else {}))
    return file.getvalue()


def check_cut(image, full, top, left, rows, columns):
    """Check that an image is this window resized: on a slope, the values at the centres."""
    centres = np.arange(SIZE) + 0.5
    y, x = top + centres * rows / SIZE - 0.5, left + centres * columns / SIZE - 0.5
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    # At the edges of the window the filter has one side only.
    inner = slice(1, -1)
    difference = abs(image - slopes(*full, y, x))[inner, inner]
    assert difference.max() <= LEVELS


def written(folder, **others):
    kinds = tiny_images.features(image=tfds.features.Image(shape=(None, None, 3)))
    return tiny_images.write(folder, "varying", kinds, **{"encoded": encoded, **others})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("varying")
    written(folder)
    return folder


@pytest.fixture
def data(folder):
    return load("varying", folder, image_size=SIZE)


def test_its_examples_are_squares_of_the_size_that_is_asked_for(folder, data):
    assert data.varying and data.input_shape == (SIZE, SIZE, 3) and data.classes == 3
    assert (data.train_examples, data.test_examples) == (12, 7)
    assert load("varying", folder).input_shape == (224, 224, 3)
    np.testing.assert_array_equal(data.targets(), np.arange(12) % 3)


@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluations_see_the_middle_of_the_image(data, split):
    source = data.train_source() if split == "train" else data.test_source()
    for number, example in enumerate(source.__getitems__(range(len(source)))):
        height, width = extent(split, number)
        side = min(height, width) * 7 / 8  # as 224 of 256 pixels
        check_cut(
            example["inputs"], (height, width), (height - side) / 2, (width - side) / 2, side, side
        )
        assert example["targets"] == number % 3


def test_a_shorter_side_resized_and_cut_is_the_same(data):
    """The two steps of papers: the shorter side to 256 of 224, then the middle, by Pillow."""
    for number in (0, 7):
        image = Image.open(io.BytesIO(encoded("train", number))).convert("RGB")
        factor = SIZE * 8 / 7 / min(image.size)
        sides = [round(side * factor) for side in image.size]
        left, top = ((side - SIZE) // 2 for side in sides)
        expected = np.asarray(
            image.resize(sides, Image.Resampling.BILINEAR).crop(
                (left, top, left + SIZE, top + SIZE)
            )
        )
        got = data.train_source()[number]["inputs"]
        # Sides and places are rounded to whole pixels there: half of one, on slopes of 250 / 16.
        assert abs(got.astype(float) - expected)[1:-1, 1:-1].max() <= LEVELS + 250 / SIZE


def test_training_sees_random_windows(data):
    pytest.importorskip("grain")
    source, transform, rest = data.train_source().streamed(None)
    assert transform == RandomCrop(SIZE, 3, 0.08) and rest is None
    indices = make_batches("iid", np.zeros(12), 1, 2, 3, SEED).indices
    with Stream(source, indices, SEED, rest, transform) as stream:
        batches = stream(1, 3)
    numbers = indices(1, 3)
    for at, number in np.ndenumerate(numbers):
        step, _, worker, position = at
        height, width = extent("train", number)
        generator = np.random.default_rng((SEED, 6, 1 + step, worker, position))
        window = random_windows(generator, 0.08, aspect=width / height)
        rows, columns = max(1, round(window[0] * height)), max(1, round(window[1] * width))
        top, left = int(window[2] * (height - rows + 1)), int(window[3] * (width - columns + 1))
        check_cut(batches["inputs"][at], (height, width), top, left, rows, columns)
        assert batches["targets"][at] == number % 3


def test_a_crop_of_the_augmentation_takes_its_place(data):
    source = data.train_source()
    flip, jitter = CropFlip(0), ColourJitter()
    _, transform, rest = source.streamed(Composed(ResizedCrop(0.5), flip, jitter))
    assert transform.smallest == 0.5 and rest == Composed(flip, jitter)
    _, transform, rest = source.streamed(ResizedCrop(0.3))
    assert transform.smallest == 0.3 and rest is None
    _, transform, rest = source.streamed(PcaNoise())
    assert transform.smallest == 0.08 and rest == Composed(PcaNoise())


@pytest.mark.slow  # a process that imports JAX
def test_processes_read_the_same(data):
    pytest.importorskip("grain")
    source, transform, rest = data.train_source().streamed(CropFlip(2))
    indices = make_batches("fresh", np.zeros(12), 1, 2, 3, SEED).indices
    read = []
    for processes in (0, 1):
        with Stream(source, indices, SEED, rest, transform, processes) as stream:
            read.append(stream(0, 3))
    for name, values in read[0].items():
        np.testing.assert_array_equal(read[1][name], values)


def test_files_of_other_kinds_are_images_too(tmp_path):
    def others(split, number):
        image = Image.open(io.BytesIO(encoded(split, 0)))
        file = io.BytesIO()
        mode, kind = [("P", "png"), ("CMYK", "jpeg"), ("L", "jpeg")][number % 3]
        image.convert(mode).save(file, kind)
        return file.getvalue()

    written(tmp_path, encoded=others)
    shapes = {one["inputs"].shape for one in load("varying", tmp_path).train_source()}
    assert shapes == {(224, 224, 3)}


def test_grey_images_have_one_channel(tmp_path):
    kinds = tiny_images.features(image=tfds.features.Image(shape=(None, None, 1)))
    tiny_images.write(tmp_path, "grey", kinds, encoded=encoded)
    data = load("grey", tmp_path, image_size=4)
    assert data.input_shape == data.train_source()[0]["inputs"].shape == (4, 4, 1)


def test_damaged_images_are_one_sentence(tmp_path):
    pytest.importorskip("grain")
    written(tmp_path, encoded=lambda split, number: encoded(split, number)[: 400 - 300 * number])
    source = load("varying", tmp_path).train_source()
    for number in (0, 1):
        with pytest.raises(ConfigurationError, match="files of varying in .* are damaged") as error:
            source[number]
        assert "\n" not in str(error.value)
    encoded_source, transform, _ = source.streamed(None)
    indices = lambda start, steps: np.zeros((steps, 1, 1, 1), int)
    with pytest.raises((StreamError, ConfigurationError), match="(?i)truncated.* in example 0"):
        Stream(encoded_source, indices, transform=transform)(0, 1)


def test_they_are_not_read_at_once_and_sizes_are_for_them_only(folder, data):
    with pytest.raises(ConfigurationError, match="images of varying vary in size: .*--stream"):
        data.train()
    with pytest.raises(ConfigurationError, match=r"size, here 32, is for .* shape \[32\]"):
        load("least_squares", image_size=32)
    for size, message in [(0, "at least 1, got 0"), (5000, "at most 4096 pixels, got 5000")]:
        with pytest.raises(ConfigurationError, match=f"image_size must be {message}"):
            load("varying", folder, image_size=size)


@pytest.mark.parametrize("shape", [(None, None, None), (None, None, 4)])
def test_channels_are_known(tmp_path, shape):
    kinds = tiny_images.features(image=tfds.features.Image(shape=shape))
    tiny_images.write(tmp_path, "varying", kinds, encoded=lambda *at: encoded(*at, kind="png"))
    with pytest.raises(ConfigurationError, match="1 or 3 channels where their size varies"):
        load("varying", tmp_path)
