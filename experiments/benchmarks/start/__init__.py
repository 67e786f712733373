"""The suite `start` of `experiments.benchmark`: seconds from the start of a process to the end of
its first round."""
