"""Every test sees eight virtual devices, so that meshes are real."""

import os

import jax
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)

# Compilation makes the first example slow, whatever the property; CI looks at the same ones always.
settings.register_profile(
    "jaxlocal",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("jaxlocal")
