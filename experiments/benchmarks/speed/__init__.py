"""The suite `speed` of `experiments.benchmark`: rounds of jaxlocal against other ways to train as
many workers."""
