"""What must be the same in all processes of a run besides the flags: else their numbers differ, and
no error says so, or their programs do not fit each other."""

from collections import Counter

import jax

import jaxlocal
from jaxlocal import ConfigurationError

# Settings of JAX that change types, random numbers or precision.
SETTINGS = (
    *("jax_enable_x64", "jax_explicit_x64_dtypes", "jax_default_matmul_precision"),
    *("jax_default_prng_impl", "jax_threefry_partitionable", "jax_random_seed_offset"),
    *("jax_numpy_dtype_promotion", "jax_allow_f16_reductions", "jax_use_shardy_partitioner"),
)


def versions_and_settings() -> list[str]:
    """Lines "name=value" of the versions and the settings of JAX in this process."""
    values = jax.config.values
    return [
        f"jax={jax.__version__}",
        f"jaxlocal={jaxlocal.__version__}",
        *(f"{name.upper()}={values[name]}" for name in SETTINGS if name in values),
    ]


def check_devices() -> None:
    """Check that all processes have joined with the same number of devices.

    Raises:
      ConfigurationError: they have not, in every process.
    """
    counts = Counter(device.process_index for device in jax.devices())
    other = next((number for number in counts if counts[number] != counts[0]), None)
    if other is not None:
        raise ConfigurationError(
            f"the processes of a run need the same number of devices: process 0 has {counts[0]}, "
            f"process {other} {counts[other]}; JAX_NUM_CPU_DEVICES=N makes N of a CPU"
        )
