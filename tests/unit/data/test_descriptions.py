"""Descriptions of prepared datasets that were edited or damaged, or that somebody else wrote."""

import json

import numpy as np
import pytest
import tiny_images

from jaxlocal.data import descriptions, load
from jaxlocal.errors import ConfigurationError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def folder(tmp_path):
    return tiny_images.write(tmp_path)


def refused(folder, read=lambda data: data) -> str:
    """The one sentence of the error."""
    with pytest.raises(ConfigurationError) as caught:
        read(load("tiny_images", folder.parents[1]))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


def edit(file, change):
    described = json.loads(file.read_text())
    change(described)
    file.write_text(json.dumps(described))


FEATURES = {"featuresDict": {"features": {}}, "pythonClassName": "evil.Features"}
LEGACY = {"type": "evil.Features", "content": {}}


@pytest.mark.parametrize(
    "described",
    [
        FEATURES,
        {"featuresDict": {"features": {}}, "python_class_name": "evil.Features"},
        LEGACY,
        {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "content": LEGACY},
        {"jsonFeature": {"json": json.dumps({"image": LEGACY})}},
        {"featuresDict": {"features": {"image": FEATURES}}},
        {"pythonClassName": "evil"},
        {"pythonClassName": "tensorflow_datasets_evil.Features"},
    ],
    ids=str,
)
def test_a_class_that_is_not_of_tensorflow_datasets_is_not_imported(
    described, folder, tmp_path, monkeypatch
):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("evil", "tensorflow_datasets_evil"):
        (here / f"{name}.py").write_text("open('imported', 'w').close()")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    data = load("tiny_images", tmp_path)
    (folder / "features.json").write_text(json.dumps(described))
    assert "is not of TensorFlow Datasets: it is not imported" in refused(folder)
    with pytest.raises(ConfigurationError, match="it is not imported"):
        data.targets()  # also where the file changes later
    assert not (here / "imported").exists()


def test_every_version_and_configuration_is_checked(tmp_path):
    good = tiny_images.write(tmp_path)
    (good.parent / "small" / "1.0.0").mkdir(parents=True)
    (good.parent / "small" / "1.0.0" / "features.json").write_text(json.dumps(LEGACY))
    assert "small/1.0.0/features.json names the class 'evil.Features'" in refused(good)


@pytest.mark.parametrize("count", ["11", "13", "-12", "1000000000000", "0"])
def test_the_number_of_examples_is_that_of_the_files(count, folder):
    edit(
        folder / "dataset_info.json",
        lambda info: info["splits"][0].update(shardLengths=[count]),
    )
    sentence = refused(folder)
    assert f"dataset_info.json beside it says {int(count):,}" in sentence
    assert "train.array_record-00000-of-00001 holds 12 examples" in sentence


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("dataset_info.json", lambda d: d.update(splits=[]), "and has none"),
        ("dataset_info.json", lambda d: d["splits"].pop(0), "and has test"),
        ("dataset_info.json", lambda d: d.update(splits=float("nan")), "damaged"),
        ("dataset_info.json", lambda d: d.update(version="x" * 1000), "tiny_images"),
        ("dataset_info.json", lambda d: d.update(fileFormat="zip"), "damaged"),
        (
            "dataset_info.json",
            lambda d: [
                s.update(filepathTemplate="../a/{SPLIT}-{SHARD_X_OF_Y}") for s in d["splits"]
            ],
            "missing",
        ),
        ("features.json", lambda d: d.clear(), "damaged"),
    ],
)
def test_an_edited_description_is_one_sentence(name, change, reason, folder):
    edit(folder / name, change)
    assert reason in refused(folder)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "", "null", "[1, 2]", "{", '"x"', "\0\xff", "{}"])
def test_a_description_of_another_kind_is_one_sentence(name, text, folder):
    (folder / name).write_text(text)
    assert "tiny_images" in refused(folder)


def test_a_huge_description_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(descriptions, "_LARGEST", 1000)
    (folder / "features.json").write_text(" " * 2000)
    assert "features.json has 2,000 bytes, and a description has 1,000 at most" in refused(folder)


@pytest.mark.parametrize("missing", ["dataset_info.json", "features.json", "*-train*", "*-test*"])
def test_a_missing_file_is_one_sentence(missing, folder):
    for file in folder.glob(missing):
        file.unlink()
    assert "tiny_images" in refused(folder)


def features_of(described):
    return described["featuresDict"]["features"]


@pytest.mark.parametrize("sides", [["8", "5", "3"], ["4", "5", "1"], ["1000000000000", "5", "3"]])
def test_images_have_the_shape_that_is_described(sides, folder):
    change = lambda d: features_of(d)["image"]["image"]["shape"].update(dimensions=sides)
    edit(folder / "features.json", change)
    sentence = refused(folder, lambda data: data.train_source()[0])
    assert f"uint8{list(map(int, sides))}".replace("'", "") in sentence or "damaged" in sentence


@pytest.mark.parametrize("count", ["0", "1", "-3", "1000000000000"])
def test_there_are_two_classes_at_least_and_not_absurdly_many(count, folder):
    change = lambda d: features_of(d)["label"]["classLabel"].update(numClasses=count)
    edit(folder / "features.json", change)
    assert "classes" in refused(folder) or "damaged" in refused(folder)


def test_a_label_that_is_no_class_is_one_sentence(folder):
    change = lambda d: features_of(d)["label"]["classLabel"].update(numClasses="2")
    edit(folder / "features.json", change)
    for read in (lambda data: data.targets(), lambda data: data.train(), lambda data: data.test()):
        assert "has the label 2, and it has 2 classes" in refused(folder, read)


def test_no_flipped_bit_of_an_example_gives_another_example(folder):
    good = load("tiny_images", folder.parents[1]).train()
    (file,) = folder.glob("*-train*")
    whole = file.read_bytes()
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the rest is padding
    random = np.random.default_rng(0)
    for place in random.choice(used, 40, replace=False):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << random.integers(8)
        file.write_bytes(flipped)
        try:
            read = load("tiny_images", folder.parents[1]).train()
        except ConfigurationError:
            continue
        for name, values in good.items():
            np.testing.assert_array_equal(read[name], values)


@pytest.mark.parametrize(
    "name", ["../mnist", "mnist/../..", "/etc/passwd", "mnist/../mnist", "~", "a\0b"]
)
def test_names_do_not_lead_out_of_the_folder(name, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        load(name, tmp_path)
    assert "\n" not in str(caught.value)
