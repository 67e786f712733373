"""Losses do not depend on the number of devices that the workers are spread over, and all processes
give equally many devices to a mesh. `test_several_processes.py` trains in several processes."""

import jax
import numpy as np
import pytest
import several_processes as program

from jaxlocal import ConfigurationError, Layout, make_mesh
from jaxlocal.parallel.mesh import balanced_devices


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", ["cser_grbs", "cser_top_k", "diloco"])
def test_losses_do_not_depend_on_the_number_of_devices(name, devices):
    spread_out = program.losses(name, jax.devices()[:devices])
    np.testing.assert_allclose(spread_out, program.losses_alone(name), **program.ROUNDING)


class Device:
    def __init__(self, number, process):
        self.id, self.process_index = number, process


def test_every_process_gives_equally_many_devices_to_the_mesh():
    devices = [Device(number, number // 4) for number in range(8)]
    chosen = balanced_devices(devices, (1, 6))
    assert [device.id for device in chosen] == [0, 1, 2, 4, 5, 6]
    assert [device.id for device in balanced_devices(devices, (2, 4), (2, 2))] == [0, 1, 4, 5]
    with pytest.raises(ConfigurationError, match="1 hubs × 7 workers .* 2 processes"):
        balanced_devices(devices, (1, 7))
    with pytest.raises(ConfigurationError, match="a mesh of 3 devices .* 2 processes"):
        balanced_devices(devices, (1, 6), (1, 3))
    assert make_mesh(Layout(1, 6)).size == 6  # in one process, all that divide
