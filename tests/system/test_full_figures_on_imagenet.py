"""Figures of ImageNet at full scale, as `test_full_figures.py` has the others.

Their models compile for minutes. A worker of xdist runs a file, and two run these files at once.
"""

import full_figures
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", full_figures.trained(on_imagenet=True))
def test_its_settings_take_two_steps(name, tmp_path, monkeypatch):
    full_figures.take_two_steps(name, tmp_path, monkeypatch)
