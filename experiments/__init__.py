"""Commands on top of jaxlocal: train, plan, tune, compare, benchmark and prepare."""
