"""What is no dataset, partition, batch or text is one sentence, with what was wanted and got."""

import numpy as np
import pytest

from jaxlocal.data import (
    ArraySource,
    Dataset,
    Stream,
    StreamError,
    assign,
    load,
    make_batches,
    parse_augmentation,
    parse_partition,
    plan_batches,
    text,
)
from jaxlocal.errors import ConfigurationError

LABELS = np.arange(100) % 10
INPUTS = np.ones((100, 2), np.float32)


def dataset(inputs=INPUTS, targets=LABELS, classes=10):
    source = ArraySource({"inputs": inputs, "targets": targets})
    return Dataset("mine", lambda: source, lambda: source, 100, 100, inputs.shape[1:], classes)


@pytest.mark.parametrize(
    "targets, sentence",
    [
        (LABELS - 1, "the labels of mine go from -1 to 8, and it has 10 classes"),
        (LABELS + 1, "the labels of mine go from 1 to 10, and it has 10 classes"),
        (LABELS.astype(np.uint8) + 200, "go from 200 to 209"),
        (LABELS / 10, "must be integers from 0 to 9, got float64"),
        (np.tile(LABELS[:, None], 3) + 5, "go from 5 to 14"),
    ],
)
def test_labels_are_classes(targets, sentence):
    data = dataset(targets=targets)
    for read in (data.train, data.test, data.targets):
        with pytest.raises(ConfigurationError, match=sentence):
            read()


def test_labels_of_all_integer_types_are_read_as_they_are():
    for dtype in (np.uint8, np.int8, np.int64, np.uint64):
        assert dataset(targets=LABELS.astype(dtype)).train()["targets"].dtype == dtype
    assert dataset(targets=LABELS > 4, classes=2).targets().dtype == bool


def test_numbers_are_finite():
    bad = INPUTS.copy()
    bad[7, 1] = np.nan
    with pytest.raises(ConfigurationError, match="the inputs of mine .*: example 7 has a NaN"):
        dataset(bad).train()
    with pytest.raises(ConfigurationError, match="the targets of mine .*: example 3 has a NaN"):
        dataset(targets=np.where(LABELS == 3, np.inf, 1.0), classes=0).targets()


def test_tokens_are_of_the_vocabulary():
    tokens = np.arange(12).reshape(4, 3)
    with pytest.raises(ConfigurationError, match="the tokens of mine go from -1 to 10, and it has"):
        dataset(tokens - 1, tokens % 3, classes=50).train()


NAMES = np.array(list("abcd") * 25)


@pytest.mark.parametrize(
    "arrays, sentence",
    [
        ({"inputs": INPUTS, "targets": LABELS[:3]}, "got 100 inputs and 3 targets"),
        ({"inputs": INPUTS, "targets": NAMES}, r"the targets must be an array .* got <U1"),
        ({"inputs": INPUTS, "targets": NAMES.astype(object)}, "of numbers, got object"),
        ({"inputs": INPUTS.tolist(), "targets": LABELS}, "the inputs must be .* got list"),
        ({"inputs": INPUTS, "targets": np.int32(3)}, "the targets must be an array"),
        ({"inputs": INPUTS}, "examples are a dictionary .* got inputs"),
        (None, "examples are a dictionary .* got NoneType"),
    ],
)
def test_examples_are_arrays_of_numbers(arrays, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        ArraySource(arrays)


def batches(spec="iid", targets=LABELS, hubs=2, workers=2, batch=4, seed=0):
    return make_batches(spec, targets, hubs, workers, batch, seed)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"spec": None}, "a partition is given by its name, got NoneType"),
        ({"spec": "iid" * 1000}, "has 200 characters at most, got 3,000"),
        ({"spec": "dirichlet:nan"}, "must be from 1e-6 to 1e6, got nan"),
        ({"spec": "unequal:-1,2"}, "must all be positive"),
        ({"batch": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"batch": "4"}, "batch_size must be a whole number, got '4'"),
        ({"hubs": True}, "hubs must be a whole number, got True"),
        ({"hubs": None}, "hubs must be a whole number, got None"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"targets": None}, r"labels, got object\[\]"),
        ({"targets": np.array(3)}, r"labels, got int64\[\]"),
        ({"targets": np.array([None, 1] * 50)}, r"labels, got object\[100\]"),
        ({"targets": np.where(LABELS == 1, np.nan, LABELS), "spec": "sorted"}, "hold a NaN"),
        ({"targets": NAMES, "spec": "dirichlet"}, "needs integer labels, and the targets are <U1"),
        ({"targets": LABELS[:, None], "spec": "sorted"}, r"have the shape \[100, 1\]"),
    ],
)
def test_batches_of_what_is_no_partition_are_errors(given, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        batches(**given)


def test_names_and_lists_of_labels_are_sorted():
    assert [set(NAMES[shard]) for shard in batches("sorted", NAMES).shards] == [*map(set, "abcd")]
    as_array, as_list = batches("sorted"), batches("sorted", LABELS.tolist())
    np.testing.assert_array_equal(as_array.indices(0, 3), as_list.indices(0, 3))


def test_numbers_of_examples_fit_int32():
    with pytest.raises(ConfigurationError, match="2,147,483,647 examples at most, got 3,000,000,0"):
        plan_batches("fresh", 3_000_000_000, 1, 1, 1)
    with pytest.raises(ConfigurationError, match="examples must be a whole number, got '9'"):
        plan_batches("fresh", "9", 1, 1, 1)


@pytest.mark.parametrize("call", [(-1, 2), (0, -1), (1.5, 2), ("a", 1), (None, 1), (0, 2.0)])
def test_steps_are_whole_numbers(call):
    with pytest.raises(ConfigurationError, match="start_step must|steps must"):
        batches().indices(*call)
    source = [{"inputs": np.zeros(2), "targets": 0}] * 100
    pytest.importorskip("grain")
    stream = Stream(source, batches().indices)
    with pytest.raises(ConfigurationError, match="start_step must|steps must"):
        stream(*call)


def test_steps_beyond_the_memory_of_the_machine_are_refused():
    with pytest.raises(ConfigurationError, match="indices of 10+ steps need .* GiB and this ma"):
        batches().indices(0, 10**12)
    pytest.importorskip("grain")
    stream = Stream([{"inputs": np.zeros(2), "targets": 0}] * 100, batches().indices)
    with pytest.raises(ConfigurationError, match="batches of 10+ steps need .* GiB"):
        stream(0, 10**12)


def test_steps_of_another_shape_than_the_first_are_an_error():
    """Rows of other workers would be left out without a word."""
    pytest.importorskip("grain")
    shape = lambda start: (1, 1, 4, 3) if start == 1 else (1, 1, 2, 3)
    indices = lambda start, steps: np.zeros(shape(start), int)
    stream = Stream([{"inputs": np.zeros(2), "targets": 0}], indices)
    with pytest.raises(StreamError, match=r"the shape \[1, 1, 2, 3\] .*, got \[1, 1, 4, 3\]"):
        stream(0, 3)


def test_shards_have_workers():
    for workers in (0, 1.5):
        with pytest.raises(ConfigurationError, match="workers must be"):
            assign(parse_partition("sorted"), LABELS, workers, seed=0)


def numbers(value, shape=(1, 1, 2, 3)):
    return lambda start, steps: np.full(shape, value)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"source": [{"inputs": "a"}]}, "inputs must hold numbers, got <U1"),
        ({"source": [{"inputs": None}]}, "inputs must hold numbers, got object"),
        ({"source": [{}]}, "an example must be a dictionary of arrays, got an empty one"),
        ({"source": [{"targets": 2**40}]}, "targets from 1099511627776 to .* do not fit int32"),
        ({"source": [{"inputs": 1e300}]}, "inputs from 1e.300 to 1e.300 do not fit float32"),
        ({"indices": numbers(-1)}, "must give the numbers of examples, integers from 0 on"),
        ({"indices": numbers(0.0)}, r"integers from 0 .* got float64\[1, 1, 2, 3\]"),
        ({"indices": numbers(0, (1, 6))}, r"got int64\[1, 6\]"),
        ({"indices": lambda start, steps: None}, r"got object\[\]"),
        ({"indices": np.zeros((1, 1, 2, 3), int)}, "indices must be a function, got ndarray"),
        ({"transform": "resize"}, "transform must be a function, got str"),
        ({"workers": [-1]}, r"ascending numbers from 0 to 1, got \[-1\]"),
        ({"workers": [1, 0]}, r"ascending numbers from 0 to 1, got \[1, 0\]"),
        ({"workers": [2]}, r"ascending numbers from 0 to 1, got \[2\]"),
        ({"workers": []}, r"ascending numbers from 0 to 1, got \[\]"),
        ({"augmentation": "crop"}, "is an Augmentation such as CropFlip, got str"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"processes": 1.5}, "processes must be a whole number, got 1.5"),
        ({"buffer_bytes": -1}, "buffer_bytes must not be negative, got -1"),
    ],
)
def test_a_stream_of_what_is_no_example_is_an_error(given, sentence):
    pytest.importorskip("grain")
    good = {"source": [{"inputs": np.zeros(2), "targets": 0}], "indices": numbers(0)}
    with pytest.raises(ConfigurationError, match=sentence):
        Stream(**{**good, **given})


@pytest.mark.parametrize("tokens", [[97], [-1], [0.5], "ab", None, [[0, 1]], [True]])
def test_a_text_is_decoded_from_tokens(tokens):
    with pytest.raises(ConfigurationError, match=r"tokens .* must be integers from 0 to 96, got"):
        text.decode(tokens)


def test_a_text_is_encoded():
    assert text.decode(text.encode("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"
    assert text.decode([]) == ""
    for value in (None, 5, b"abc"):
        with pytest.raises(ConfigurationError, match="a text must be a str, got"):
            text.encode(value)


def test_datasets_and_augmentations_have_names():
    for value in (None, 3, b"digits", ["digits"]):
        with pytest.raises(ConfigurationError, match="a dataset is given by its name, got"):
            load(value)
        with pytest.raises(ConfigurationError, match="an augmentation is given by its name, got"):
            parse_augmentation(value)
    with pytest.raises(ConfigurationError, match="a dataset has 200 characters at most, got 9,000"):
        load("a" * 9000)
    for seed in (1.5, "a", None, -1):
        with pytest.raises(ConfigurationError, match="seed must"):
            load("least_squares", seed=seed)


@pytest.mark.parametrize("folder", [5, b"/tmp", "a\0b"])
def test_the_folder_of_datasets_is_a_path(folder):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ConfigurationError, match="data_dir"):
        load("mnist", folder)
