"""How fast rounds are beside other ways to train many workers: the suite `speed` of
`experiments.benchmark`."""
