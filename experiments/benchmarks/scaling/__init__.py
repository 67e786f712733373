"""The suite `scaling` of `experiments.benchmark`: steps on more devices and processes, and over a
slow link."""
