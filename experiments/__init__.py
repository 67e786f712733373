"""Binaries on top of jaxlocal: train a model, or plan what a run would do and say."""
