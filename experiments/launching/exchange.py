"""The first exchange of arrays between the processes of a run, which has a deadline."""

import threading

import jax
from jax.experimental import multihost_utils

from experiments.launching.link import Link
from experiments.launching.statuses import FAILED, Failure


def exchange(link: Link, patience: float) -> None:
    """Let the processes exchange an array, on CPUs, where they would wait for each other for an
    hour: Gloo trusts everyone who connects to it while it connects the processes.

    Raises:
      Failure: they cannot; without an error, all processes end after `patience` seconds.
    """
    if jax.default_backend() != "cpu":
        return
    hint = (
        "each host must be reached by the others, and by nobody else, at all ports of the address "
        "of its name"
    )
    late = f"the processes have not exchanged an array within {patience:.0f} s; {hint}"
    timer = threading.Timer(patience, link.end, (late, FAILED))
    timer.daemon = True
    timer.start()
    try:
        multihost_utils.sync_global_devices("the processes exchange arrays")
    except jax.errors.JaxRuntimeError as error:
        why = str(error).splitlines()[0][:200]
        raise Failure(f"the processes cannot exchange arrays; {hint}; JAX says: {why}") from error
    finally:
        timer.cancel()
