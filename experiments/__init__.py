"""Commands on top of jaxlocal: train, plan, tune, compare, benchmark and prepare."""

import gc
import sys

from experiments.launching import stopping

if sys.argv[:1] == ["-m"]:  # `python -m experiments.COMMAND` begins here, before slow imports
    stopping.watch()
    gc.disable()  # until everything is imported, nothing of which is garbage
