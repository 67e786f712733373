"""The suite `compilation` of `experiments.benchmark`: how long compressed methods compile."""
