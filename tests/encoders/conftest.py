"""Small models of several families, saved as their own library saves them."""

import json

import pytest
import torch

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    torch.manual_seed(0)


@pytest.fixture
def save_image_model(tmp_path):
    def save(model, size=8):
        model.save_pretrained(tmp_path / "model")
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
        (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
        return tmp_path / "model"

    return save


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
