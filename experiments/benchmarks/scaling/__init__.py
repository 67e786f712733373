"""How rounds scale over devices and processes, and what they take over a slow link: the suite
`scaling` of `experiments.benchmark`."""
