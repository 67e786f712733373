"""Datasets: their contents, plans that read no example, and errors."""

import importlib.util
import pickle
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlocal.data import DATASETS, ArraySource, load, make_batches, prepared
from jaxlocal.errors import ConfigurationError

PREPARED = Path(__file__).parents[3].parent / "shared" / "data" / "tfds"
MNIST_TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # LeCun's table
SYNTHETIC = ["least_squares", "perceptron", "two_quadratics:7"]

needs_mnist = pytest.mark.skipif(not (PREPARED / "mnist").exists(), reason="MNIST is not here")
needs_cifar = pytest.mark.skipif(not (PREPARED / "cifar10").exists(), reason="CIFAR-10 is not here")
needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="no tfds"
)


def check_described(data):
    for read, count in ((data.train, data.train_examples), (data.test, data.test_examples)):
        examples = read()
        assert examples["inputs"].shape == (count, *data.input_shape)
        assert examples["inputs"].dtype in (np.uint8, np.float32)
        assert examples["targets"].shape == (count,)
        assert examples["targets"].dtype == (np.int32 if data.classes else np.float32)
        if data.classes:
            assert set(examples["targets"]) == set(range(data.classes))


@pytest.mark.parametrize("spec", SYNTHETIC)
def test_a_synthetic_problem_is_as_described_and_depends_on_its_seed(spec):
    data = load(spec, seed=3)
    check_described(data)
    first, again = data.train(), load(spec, seed=3).train()
    assert all((first[key] == again[key]).all() for key in first)
    if spec.partition(":")[0] != "two_quadratics":
        assert (first["inputs"] != load(spec, seed=4).train()["inputs"]).any()


def test_least_squares_is_solved_up_to_its_noise():
    data = load("least_squares")
    train, test = data.train(), data.test()
    solution = np.linalg.lstsq(train["inputs"], train["targets"])[0]
    residual = test["inputs"] @ solution - test["targets"]
    # 1024 draws estimate a standard deviation to 1/sqrt(2*1024) = 2.2 %: four of these.
    np.testing.assert_allclose(residual.std(), 0.1, rtol=0.09)
    np.testing.assert_allclose(np.linalg.norm(solution), 1.0, atol=0.01)


def test_perceptron_has_the_margin_along_one_direction():
    data = load("perceptron", seed=2)
    for examples in (data.train(), data.test()):
        sides = 2 * examples["targets"] - 1
        direction = (sides[:, None] * examples["inputs"]).mean(0)
        generator = np.random.default_rng((2, 0))
        truth = generator.normal(size=32)
        truth /= np.linalg.norm(truth)
        assert direction @ truth > 0.9 * np.linalg.norm(direction)
        assert (sides * (examples["inputs"] @ truth)).min() > 0.5 - 1e-5  # float32 of 32 terms


def test_perceptron_has_distances_to_its_hyperplane():
    data = load("perceptron", seed=3)
    train, distances = data.train(), data.distances()
    truth = np.random.default_rng((3, 0)).normal(size=32)
    expected = train["inputs"].astype(float) @ (truth / np.linalg.norm(truth))
    np.testing.assert_allclose(distances, expected, atol=1e-5)  # float32 of 32 terms
    np.testing.assert_array_equal(distances > 0, train["targets"] == 1)
    with pytest.raises(ConfigurationError, match="'least_squares' defines no separating hyperpl"):
        load("least_squares").distances()


def test_workers_by_distance_hold_slabs_between_parallel_hyperplanes():
    data = load("perceptron")
    distances = data.distances()
    batches = make_batches("by_distance", data.targets(), 1, 10, 8, seed=0, distances=distances)
    held = [distances[shard] for shard in batches.shards]
    assert all(one.max() <= two.min() for one, two in zip(held, held[1:], strict=False))
    assert sum(map(len, held)) == 4096


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5, 3.0])
def test_no_example_of_the_perceptron_is_nearer_to_the_hyperplane_than_its_margin(margin):
    data = load(f"perceptron:squared_hinge:{margin}")
    train = data.train()
    sides = 2.0 * train["targets"] - 1
    distances = sides * (train["inputs"] @ data.normal.astype(np.float64))
    assert margin - 1e-5 <= distances.min() < margin + 0.01
    assert data.loss == "squared_hinge"
    # The margin alone moves the examples.
    usual = load("perceptron").train()["inputs"] @ data.normal.astype(np.float64)
    np.testing.assert_allclose(distances - margin, sides * usual - 0.5, atol=1e-5)


@pytest.mark.parametrize("rate, steps", [(1.0, 1), (1.0, 5), (0.1, 1), (0.1, 20)])
def test_local_sgd_on_two_quadratics_has_the_loss_of_theory(rate, steps):
    rounds = 1000
    data = load(f"two_quadratics:{rounds}")
    vectors, start = data.train()["inputs"].astype(float), data.start.astype(float)
    step = [np.eye(2) - rate * np.outer(a, a) for a in vectors]
    mean = sum(np.linalg.matrix_power(one, steps) for one in step) / 2
    final = np.linalg.matrix_power(mean, rounds) @ start
    loss = 0.25 * ((vectors @ final) ** 2).sum()
    apart, shrink = 1 / (rounds + 0.5), 1 - (1 - rate) ** steps
    expected = apart / 4 * (1 - shrink * apart / 2) ** (2 * rounds)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)  # the vectors are rounded to float32
    assert loss >= 1 / (4 * np.e * (rounds + 0.5))


def test_examples_in_memory_are_a_source_that_can_be_pickled():
    data = load("perceptron", seed=1)
    train, source = data.train(), pickle.loads(pickle.dumps(data.train_source()))
    assert len(source) == data.train_examples == 4096 and len(data.test_source()) == 1024
    for number, example in zip((7, 0), source.__getitems__([7, 0]), strict=True):
        assert (example["inputs"] == train["inputs"][number]).all()
        assert example["targets"] == train["targets"][number] and example["targets"].ndim == 0
    np.testing.assert_array_equal(data.targets(), train["targets"])
    assert len(list(ArraySource({"targets": np.arange(3)}))) == 3


def test_inputs_enter_the_model_scaled():
    data = load("least_squares")._replace(mean=(0.5, 0.25), scale=(0.5, 1.0))
    pixels = np.array([[255, 0], [0, 255]], np.uint8)
    expected = np.array([[1.0, -0.25], [-1.0, 0.75]], np.float32)
    np.testing.assert_array_equal(data.normalize(pixels), expected)
    floats = np.array([[1.0, 0.25]], np.float32)
    np.testing.assert_array_equal(data.normalize(floats), np.array([[1.0, 0.0]], np.float32))
    assert data.normalize(pixels).dtype == np.float32


@needs_tfds
@needs_cifar
@needs_mnist
def test_a_plan_reads_no_example(monkeypatch):
    monkeypatch.setattr(prepared.PreparedSplit, "_open", lambda *_: pytest.fail("read"))
    data = load("cifar10", data_dir=PREPARED)
    assert (data.train_examples, data.test_examples) == (50_000, 10_000)
    assert (data.input_shape, data.classes) == ((32, 32, 3), 10)
    monkeypatch.setenv("TFDS_DATA_DIR", str(PREPARED))
    data = load("mnist_binary")
    assert (data.train_examples, data.test_examples) == (60_000, 10_000)
    assert (data.input_shape, data.classes) == ((28, 28, 1), 2)


@needs_tfds
@needs_mnist
def test_mnist_and_its_two_classes():
    images = load("mnist", data_dir=PREPARED).test()
    assert images["inputs"].shape == (10_000, 28, 28, 1) and images["inputs"].dtype == np.uint8
    assert np.bincount(images["targets"]).tolist() == MNIST_TEST_COUNTS
    source = load("mnist_binary", data_dir=PREPARED).test_source()
    assert source.targets().dtype == source[0]["targets"].dtype == np.int32
    np.testing.assert_array_equal(source.targets() == 1, images["targets"] < 5)
    np.testing.assert_array_equal(source[-1]["inputs"], images["inputs"][-1])
    assert source[-1]["targets"] == source.targets()[-1]


@needs_tfds
@needs_cifar
def test_cifar10_is_centred_by_its_mean_and_scale():
    data = load("cifar10", data_dir=PREPARED)
    images = data.test()
    assert images["inputs"].shape == (10_000, 32, 32, 3) and images["inputs"].dtype == np.uint8
    assert np.bincount(images["targets"]).tolist() == [1000] * 10
    values = data.normalize(images["inputs"])
    # The constants are those of the training set; those of the test set differ by up to 0.004.
    np.testing.assert_allclose(values.mean((0, 1, 2)), 0.0, atol=0.03)
    np.testing.assert_allclose(values.std((0, 1, 2)), 1.0, atol=0.03)


@needs_tfds
def test_a_dataset_that_is_not_prepared_is_an_error_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connected"))
    for name in ("mnist", "cifar10", "mnist_binary"):
        with pytest.raises(ConfigurationError, match="is not prepared in .*experiments.prepare"):
            load(name, data_dir=tmp_path / "nowhere")
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="is not prepared") as caught:
        load("mnist", data_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """A copy of prepared MNIST without training images."""
    source, copy = PREPARED / "mnist" / "3.0.1", tmp_path / "mnist" / "3.0.1"
    copy.mkdir(parents=True)
    for path in source.iterdir():
        if "-train" in path.name:
            (copy / path.name).touch()
        else:
            shutil.copyfile(path, copy / path.name)
    return copy


def check_damaged(data_dir):
    with pytest.raises(ConfigurationError, match=r"the files of mnist in .* are damaged") as caught:
        load("mnist", data_dir=data_dir).test()
    assert "\n" not in str(caught.value)


@needs_tfds
@needs_mnist
@pytest.mark.parametrize("left", [0, 1_000_000])
def test_a_truncated_file_is_an_error_of_one_sentence(folder, left):
    (images,) = folder.glob("*-test*")
    images.write_bytes(images.read_bytes()[:left])
    check_damaged(folder.parents[1])


@needs_tfds
@needs_mnist
def test_a_missing_file_and_a_broken_description_are_errors_of_one_sentence(folder):
    info = folder / "dataset_info.json"
    whole = info.read_text()
    for text in (whole[:500], "{}", whole.replace('"test"', '"other"')):
        info.write_text(text)
        with pytest.raises(ConfigurationError, match="mnist"):
            load("mnist", data_dir=folder.parents[1])
    info.write_text(whole)
    (images,) = folder.glob("*-test*")
    images.unlink()
    check_damaged(folder.parents[1])


@needs_tfds
@needs_mnist
def test_the_error_of_the_other_file_format_names_tensorflow(folder):
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        ConfigurationError, match="prepared as tfrecord.*another folder.*experiments.prepare"
    ):
        load("mnist", data_dir=folder.parents[1])


@pytest.mark.parametrize(
    "name, absent, package",
    [
        ("digits", ["sklearn"], "scikit-learn"),
        ("mnist", ["tensorflow_datasets"], "tensorflow-datasets"),
        ("cifar10", ["PIL", "cv2"], "Pillow"),
    ],
)
def test_a_missing_package_is_named_with_the_extra(name, absent, package, monkeypatch):
    if name == "cifar10":
        pytest.importorskip("tensorflow_datasets")
    for module in absent:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=rf"needs {package}.*jaxlocal\[experiments\]"):
        load(name, data_dir=PREPARED)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("cifar", "did you mean 'cifar10'"),
        ("digits:3", "takes no argument"),
        ("perceptron:hinge", "unknown loss of perceptron 'hinge'; known: perceptron, squared"),
        ("perceptron:squared_hinge:wide", "number from 0 to 1,000"),
        ("perceptron:squared_hinge:", "number from 0 to 1,000"),
        *[(f"perceptron:squared_hinge:{x}", "number from 0 to 1,000") for x in ("-1", "nan")],
        ("perceptron:hinge:1", "loss of perceptron 'hinge'"),
        ("two_quadratics:", "positive whole number"),
        ("two_quadratics:0", "positive whole number"),
        ("two_quadratics:1.5", "positive whole number"),
    ],
)
def test_a_wrong_name_is_an_error(spec, message):
    with pytest.raises(ConfigurationError, match=message):
        load(spec)


def test_a_negative_seed_is_an_error():
    with pytest.raises(ConfigurationError, match="-1"):
        load("perceptron", seed=-1)


def test_every_name_is_known_to_load():
    assert {spec.partition(":")[0] for spec in SYNTHETIC} < set(DATASETS)
