"""Finished runs with random weights, and images to send."""

import numpy as np
import pytest
from PIL import Image

from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig
from diptych.itit.recipes import itit_tiny
from diptych.run_folder import write_config


@pytest.fixture
def itit_run(tokenizer, text_encoder, model, tmp_path):
    folder = tmp_path / "runs/itit"
    for part, whole in (("tokenizer", tokenizer), ("text_encoder", text_encoder), ("model", model)):
        whole.save_pretrained(folder / part)
    recipe = itit_tiny()
    recipe.data.pairs = "scenes:"
    recipe.generation.image = ImageGenerationConfig(steps=3, guidance=0.0)
    recipe.generation.text = TextGenerationConfig(beams=2)
    write_config(folder, recipe="itit-tiny", run=recipe)
    return folder


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
