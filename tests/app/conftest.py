"""Finished runs with random weights, and images to send."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def itit_run(save_itit_run, tmp_path):
    return save_itit_run(tmp_path / "runs/itit", steps=3)


@pytest.fixture
def photos(tmp_path):
    """A folder of four images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def bomb(tmp_path):
    """A PNG of a few kilobytes that says it has 400 million pixels."""
    image = Image.new("1", (20_000, 20_000))
    image.save(tmp_path / "bomb.png", optimize=True)
    return tmp_path / "bomb.png"
