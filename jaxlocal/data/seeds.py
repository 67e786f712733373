"""The second entry of the seed of every generator of `jaxlocal.data`, by what it draws.

A generator is seeded by (seed of the run, one of these, ...), so that no two kinds of draws share
their numbers.
"""

SYNTHESIS = 0  # examples of a synthetic problem
ASSIGNMENT = 1  # which examples a worker holds
EPOCH, DRAW, PASS = 2, 3, 4  # batches: of `iid`, of `fresh`, of a worker's own shard
CROP_FLIP = 5
TRANSFORM = 6  # of a single example of a stream
RESIZED_CROP, RANDAUGMENT, JITTER, PCA = 7, 8, 9, 10
REUSED = 11  # subsets that are reused for several passes
