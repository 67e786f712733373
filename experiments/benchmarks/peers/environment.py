"""Where the peers are installed: in a virtual environment among the caches of the user."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from experiments.launching.program_cache import cache_folder

# Releases that were run together; the key is the package that a contender imports.
REQUIREMENTS = {
    "drjax": "drjax==0.2.1",
    "fedjax": "fedjax==0.0.17",
    "torch": "torch==2.13.0",
    "torchft": "torchft==0.2.0",
    "pfl": "pfl==0.6.0",
    "flwr": "flwr==1.42.0",
}
_VERSIONS = """
import importlib.metadata, importlib.util, json, sys
found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
print(json.dumps({name: importlib.metadata.version(name) for name in found}))
"""


def environment() -> Path:
    """The folder of the virtual environment."""
    return cache_folder() / "peers"


def interpreter() -> str:
    """The Python that runs the peers: that of their environment, else this one."""
    own = environment() / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def installed_versions(packages: Iterable[str] = tuple(REQUIREMENTS)) -> dict[str, str]:
    """Versions of those of the packages that are installed for the peers.

    >>> installed_versions(["no_such_package"])
    {}
    """
    command = [interpreter(), "-c", _VERSIONS, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
