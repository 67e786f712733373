"""Reproduce figures of papers: run their settings, and compare with the published values."""
