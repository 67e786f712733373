"""Data: where examples come from, who holds them, and which of them make each batch.

Everything here is numpy on the host. TensorFlow Datasets, Pillow and scikit-learn are imported only
when a dataset that needs them is asked for.
"""

from jaxlocal.data.batches import Batches, BatchPlan, make_batches, plan_batches
from jaxlocal.data.partitions import (
    PARTITIONS,
    UNEQUAL_FRACTIONS,
    Partition,
    assign,
    parse_partition,
    shard_sizes,
)
from jaxlocal.data.sources import DATASETS, Dataset, load

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "UNEQUAL_FRACTIONS",
    "BatchPlan",
    "Batches",
    "Dataset",
    "Partition",
    "assign",
    "load",
    "make_batches",
    "parse_partition",
    "plan_batches",
    "shard_sizes",
]
