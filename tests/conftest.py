"""Every test sees eight virtual devices, so that meshes are real; no program is compiled twice."""

import atexit
import contextlib
import os
import shutil
import tempfile
import threading

import fast_compilation
import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)

# One compilation cache for the session: xdist's workers and the binaries that tests start inherit
# its folder from the process that made it, which removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxlocal-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)

fast_compilation.install()


def pytest_addoption(parser):
    parser.addoption(
        "--times",
        type=int,
        default=1,
        help="how many times as long the tests of tests/endurance run as in CI",
    )


@pytest.fixture(scope="session")
def times(request):
    """How many times as long an endurance test runs as in CI: `pytest -m slow --times=20 FILE`."""
    return request.config.getoption("--times")


def pytest_configure(config):
    config.addinivalue_line("markers", "optimized: compile with the defaults of XLA")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    optimized = item.get_closest_marker("optimized")
    with fast_compilation.disabled() if optimized else contextlib.nullcontext():
        return (yield)


# A link to other processes that a test has left open ends its process when it falls silent, which
# here runs the other tests.
_exit = os._exit


def _exit_from_main_thread(status):
    if threading.current_thread() is threading.main_thread():
        _exit(status)
    threading.Event().wait()


os._exit = _exit_from_main_thread

# Compilation makes the first example slow, whatever the property; CI looks at the same ones always.
settings.register_profile(
    "jaxlocal",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("jaxlocal")
