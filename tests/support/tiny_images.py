"""A small dataset of images in the files of TensorFlow Datasets, written without TensorFlow."""

import io
import json
from pathlib import Path

import numpy as np

EXAMPLES = {"train": 12, "test": 7}
CLASSES = 3


def image(split: str, number: int, shape=(4, 5, 3)) -> np.ndarray:
    """An image whose pixels encode the split and the number."""
    return np.full(shape, 10 * number + (split != "train"), np.uint8)


def features(**others):
    """The features image and label, and others; None removes one."""
    import tensorflow_datasets as tfds

    kinds = {
        "image": tfds.features.Image(shape=(4, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=CLASSES),
    }
    return tfds.features.FeaturesDict({k: v for k, v in (kinds | others).items() if v})


def write(
    data_dir: Path,
    name="tiny_images",
    kinds=None,
    examples=EXAMPLES,
    config="",
    label=None,
    encoded=None,
) -> Path:
    """Write the dataset to a folder, and return the folder of its files.

    Each feature with a label has the value number % CLASSES, or `label`. Each feature with an image
    has the same image, or its first channel; or the file `encoded(split, number)`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    kinds = kinds or features()
    folder = Path(data_dir, name, config, "1.0.0")
    folder.mkdir(parents=True)
    kinds.save_config(folder)
    serializer = ExampleSerializer(kinds.get_serialized_info())
    for split, count in examples.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number in range(count):
            values = _values(kinds, split, number, number % CLASSES if label is None else label)
            if encoded:
                values["image"] = encoded(split, number)
            writer.write(serializer.serialize_example(values))
        writer.close()
    (folder / "dataset_info.json").write_text(json.dumps(_info(name, config, examples)))
    return folder


def _values(kinds, split: str, number: int, label: int) -> dict:
    import tensorflow_datasets as tfds
    from PIL import Image

    values = {}
    for key, kind in kinds.items():
        if isinstance(kind, tfds.features.Image):
            pixels, file = image(split, number), io.BytesIO()
            Image.fromarray(pixels if kind.shape[-1] == 3 else pixels[..., 0]).save(file, "png")
            values[key] = file.getvalue()
        else:
            values[key] = label
    return values


def _info(name: str, config: str, examples: dict[str, int]) -> dict:
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits = [
        {"name": split, "filepathTemplate": template, "shardLengths": [str(count)], "numBytes": "1"}
        for split, count in examples.items()
    ]
    about = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": splits}
    return about | ({"configName": config} if config else {})
