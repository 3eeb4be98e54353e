"""Two small random pretrained models, saved as their library saves them, and a dual encoder of them."""

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from diptych.dual.towers import TowersEncoder

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def vit(**more) -> ViTModel:
    return ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=4, **more))


def save_image(folder: Path, model, *, size: int = 16) -> str:
    model.save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def save_text(folder: Path, model, text_encoder) -> str:
    model.save_pretrained(folder)
    text_encoder.tokenizer.save_pretrained(folder)
    return str(folder)


def bert(text_encoder) -> BertModel:
    return BertModel(BertConfig(vocab_size=text_encoder.vocab_rows, **SIZES))


def encoder_of(towers, **more) -> TowersEncoder:
    return TowersEncoder.from_towers(*towers, **{"width": 12, "max_text_len": 24, "seed": 0} | more)


def pixels(count: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
