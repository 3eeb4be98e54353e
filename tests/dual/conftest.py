"""Makes dual_objectives and small_towers importable by the tests and by the script that torchrun starts."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def towers(tmp_path_factory, text_encoder) -> tuple[str, str]:
    """Folders of a ViT and of a BERT."""
    from small_towers import bert, save_image, save_text, vit

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers")
    return save_image(folder / "vit", vit()), save_text(folder / "bert", bert(text_encoder), text_encoder)
