"""Grids of settings and learning rates, and their results."""
