"""Exit statuses of the commands, and the errors that they stand for."""

import signal

from experiments.launching.stopping import status_of
from jaxlocal import ConfigurationError
from jaxlocal.data import StreamError
from jaxlocal.training.checkpoints import SavingError

# A failure of the machine or of training, a mistake of the user, Ctrl-C, SIGTERM.
FAILED, USAGE = 1, 2
INTERRUPTED, TERMINATED = status_of(signal.SIGINT), status_of(signal.SIGTERM)


class Failure(RuntimeError):
    """Something outside the program failed; the message is the one sentence that is printed."""


def explained(error: BaseException) -> tuple[str, int] | None:
    """The sentence and the exit status for an error; None for one that is a fault of the program.

    >>> explained(ConfigurationError("7 workers do not divide into 2 hubs"))
    ('7 workers do not divide into 2 hubs', 2)
    """
    if isinstance(error, ConfigurationError):
        return str(error), USAGE
    if isinstance(error, Failure | SavingError | StreamError):
        return str(error), FAILED
    if isinstance(error, OSError):
        return f"{error.filename or 'writing'}: {error.strerror}", FAILED
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted", getattr(error, "status", INTERRUPTED)
    return None
