"""Measure the speed and the costs of the library on a machine: a room for each suite."""
