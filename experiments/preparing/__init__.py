"""Prepare datasets for training."""
