"""Install the peers of the suite `peers` in a virtual environment of their own.

    python -m experiments.benchmarks.peers.install

It lies among the caches of the user, and finds JAX and what else it lacks in the environment that
runs this command, which stays as it is. A peer that cannot be installed is named; the others are.
"""

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence

from experiments.benchmarks.peers.environment import REQUIREMENTS, environment, interpreter
from experiments.launching.command_line import run_command


def install() -> int:
    """Make the environment and install all peers; return the exit status."""
    folder = environment()
    venv.create(folder, with_pip=True, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # Read after the environment's own packages, so that the versions that peers need come first.
    (packages / "running_interpreter.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not _pip(list(REQUIREMENTS.values())):
        failed = [wanted for wanted in REQUIREMENTS.values() if not _pip([wanted])]
        for wanted in failed:
            print(f"{wanted} cannot be installed, and will be left out", file=sys.stderr)
    print(folder)
    return 0


def _pip(requirements: Sequence[str]) -> bool:
    """Whether pip has installed the requirements."""
    return not subprocess.run([interpreter(), "-m", "pip", "install", *requirements]).returncode


if __name__ == "__main__":
    run_command(install, __doc__)
