"""A dual encoder as a folder that open_clip reads: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

Writing it does not need open_clip. The names of weights are those of the first CLIP, which has one matrix for queries,
keys and values, and projections that are multiplied from the right.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from diptych.dual.model import DualEncoder
from diptych.errors import UserError
from diptych.io import write_bytes

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def save_open_clip(encoder: DualEncoder, folder: str | os.PathLike[str]) -> None:
    """Write weights, configuration and tokenizer.

    Raises UserError for pretrained towers, and for an activation that open_clip does not have.
    """
    folder = Path(folder)
    config = open_clip_config(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder.tokenizer.save_pretrained(folder)
    write_bytes(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in open_clip_state(encoder).items()}
    write_bytes(folder / WEIGHTS, save(state))


def open_clip_config(encoder: DualEncoder) -> dict[str, Any]:
    """The content of `open_clip_config.json`. Raises UserError for what open_clip does not have."""
    clip: Any = encoder.clip.config
    if clip.model_type != "clip":
        raise UserError(f"open_clip reads CLIP alone, and this is a {clip.model_type}: load it in transformers")
    image, text = clip.vision_config, clip.text_config
    activations = {image.hidden_act, text.hidden_act}
    if activations not in ({"gelu"}, {"quick_gelu"}):
        names = ", ".join(sorted(activations))
        raise UserError(f"activation {names}: open_clip has gelu or quick_gelu for both towers")

    def tower(config: Any) -> dict[str, Any]:
        return {
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "mlp_ratio": config.intermediate_size / config.hidden_size,
            "norm_kwargs": {"eps": config.layer_norm_eps},
        }

    image_cfg = {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "head_width": image.hidden_size // image.num_attention_heads,
    }
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "heads": text.num_attention_heads,
        "pool_type": "eos",
        "eos_id": encoder.tokenizer.eos_token_id,
        "pad_id": encoder.tokenizer.pad_token_id,
        "hf_tokenizer_name": ".",  # any name will do: open_clip reads the tokenizer in the folder
    }
    return {
        "model_cfg": {
            "embed_dim": encoder.width,
            "quick_gelu": activations == {"quick_gelu"},
            "vision_cfg": tower(image) | image_cfg,
            "text_cfg": tower(text) | text_cfg,
        },
        "preprocess_cfg": {
            "mean": encoder.mean_311.flatten().tolist(),
            "std": encoder.std_311.flatten().tolist(),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def open_clip_state(encoder: DualEncoder) -> dict[str, Tensor]:
    """All weights by their names in open_clip."""
    clip: Any = encoder.clip  # parts of transformers' modules have no types
    image, text = clip.vision_model, clip.text_model
    return {
        "logit_scale": clip.logit_scale,
        "visual.class_embedding": image.embeddings.class_embedding,
        "visual.positional_embedding": image.embeddings.position_embedding.weight,
        "visual.conv1.weight": image.embeddings.patch_embedding.weight,
        "visual.proj": clip.visual_projection.weight.T,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "text_projection": clip.text_projection.weight.T,
        **_affine("visual.ln_pre", image.pre_layrnorm),
        **_affine("visual.ln_post", image.post_layernorm),
        **_affine("ln_final", text.final_layer_norm),
        **_blocks("visual.transformer.resblocks", image.encoder),
        **_blocks("transformer.resblocks", text.encoder),
    }


def _affine(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def _blocks(name: str, encoder: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number, layer in enumerate(encoder.layers):
        block, attention = f"{name}.{number}", layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        state |= {
            f"{block}.attn.in_proj_weight": torch.cat([part.weight for part in parts]),
            f"{block}.attn.in_proj_bias": torch.cat([part.bias for part in parts]),
            **_affine(f"{block}.attn.out_proj", attention.out_proj),
            **_affine(f"{block}.ln_1", layer.layer_norm1),
            **_affine(f"{block}.ln_2", layer.layer_norm2),
            **_affine(f"{block}.mlp.c_fc", layer.mlp.fc1),
            **_affine(f"{block}.mlp.c_proj", layer.mlp.fc2),
        }
    return state
