"""Every figure at full scale builds, and each of its settings takes two steps on random images."""

import full_figures
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", full_figures.trained(on_imagenet=False))
def test_its_settings_take_two_steps(name, tmp_path, monkeypatch):
    full_figures.take_two_steps(name, tmp_path, monkeypatch)
