"""The suite `peers` of `experiments.benchmark`: rounds of jaxlocal against the same rounds in plain
JAX and in other libraries."""
