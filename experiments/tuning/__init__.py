"""Tune the learning rates of settings, and compare the settings."""
