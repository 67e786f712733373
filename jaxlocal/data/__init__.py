"""Datasets, partitions of the examples among workers, batches, augmentation and streaming.

All functions compute with NumPy on the host, except `crop_and_flip` and `Augmentation.apply`, which
run in the compiled step. Grain, TensorFlow Datasets, Pillow and scikit-learn are imported only when
they are needed.
"""

from jaxlocal.data import text
from jaxlocal.data.augment import AUGMENTATIONS, parse_augmentation
from jaxlocal.data.augmentation import Augmentation, Composed
from jaxlocal.data.batches import Batches, BatchPlan, make_batches, plan_batches
from jaxlocal.data.colour import ColourJitter, PcaNoise
from jaxlocal.data.crop_flip import CropFlip, crop_and_flip
from jaxlocal.data.dataset import Dataset
from jaxlocal.data.examples import ArraySource, Examples, ExampleSource
from jaxlocal.data.partitions import (
    PARTITIONS,
    UNEQUAL_FRACTIONS,
    Partition,
    assign,
    parse_partition,
    shard_sizes,
)
from jaxlocal.data.randaugment import RandAugment
from jaxlocal.data.reading import Source, StreamError, Transform
from jaxlocal.data.resized_crop import ResizedCrop
from jaxlocal.data.sources import DATASETS, load
from jaxlocal.data.streaming import Stream

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "PARTITIONS",
    "UNEQUAL_FRACTIONS",
    "ArraySource",
    "Augmentation",
    "BatchPlan",
    "Batches",
    "ColourJitter",
    "Composed",
    "CropFlip",
    "Dataset",
    "ExampleSource",
    "Examples",
    "Partition",
    "PcaNoise",
    "RandAugment",
    "ResizedCrop",
    "Source",
    "Stream",
    "StreamError",
    "Transform",
    "assign",
    "crop_and_flip",
    "load",
    "make_batches",
    "parse_augmentation",
    "parse_partition",
    "plan_batches",
    "shard_sizes",
    "text",
]
