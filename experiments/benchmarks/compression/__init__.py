"""The suite `compression` of `experiments.benchmark`: what compressed messages cost in time and
memory."""
