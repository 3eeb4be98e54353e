"""A dual encoder in the formats of other libraries.

    save_open_clip   a folder that open_clip reads: `open_clip.create_model_and_transforms("local-dir:FOLDER")`
    save_onnx        both towers as ONNX, checked against torch by onnxruntime

Writing for open_clip does not need open_clip. The names of weights are those of the first CLIP, which has one matrix
for queries, keys and values, and projections that are multiplied from the right.

Shapes: B rows, S pixels a side, L text tokens, D width of the common space.
"""

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn

from diptych.dual.model import DualEncoder
from diptych.errors import UserError, first_line
from diptych.io import without_progress_bars, write_bytes
from diptych.run_folder import write_json

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
IMAGE_TOWER, TEXT_TOWER, SCALE = "image_encoder.onnx", "text_encoder.onnx", "onnx.json"
LARGEST_DIFFERENCE = 1e-4
"""Largest allowed difference of a number in an embedding, of length 1, between onnxruntime and torch."""
_LARGEST_FILE = 2**31 - 2**20
"""Bytes of weights above which ONNX keeps them in a file beside the graph."""
_SAID = ("a dog", "", "two children are playing in the snow with a small dog", "a red car", "it")
"""Texts of different lengths, on which the towers are compared."""


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


# ONNX


class _ImageTower(nn.Module):
    """Normalized pixels [B 3 S S] to embeddings [B D] of length 1."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.tower, self.head = clip.vision_model, clip.visual_projection

    def forward(self, pixel_values: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B D"]:
        return F.normalize(self.head(self.tower(pixel_values=pixel_values).pooler_output), dim=-1)


class _TextTower(nn.Module):
    """Ids and a mask of those that are valid, both [B L], to embeddings [B D] of length 1."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.tower, self.head = clip.text_model, clip.text_projection

    def forward(self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        states = self.tower(input_ids=input_ids, attention_mask=attention_mask)
        return F.normalize(self.head(states.pooler_output), dim=-1)


@dataclass(frozen=True, slots=True)
class _Part:
    """A tower with what its export needs."""

    file: str
    tower: nn.Module
    inputs: dict[str, Tensor]
    """Example inputs by name."""
    axes: tuple[str, ...]
    """Names of the first axes, which are dynamic."""
    output: str


def save_onnx(encoder: DualEncoder, folder: str | os.PathLike[str]) -> float | None:
    """Write both towers as ONNX with any number of rows and any length of texts, and the processor of transformers.

    Inputs are what the processor gives: ``pixel_values`` of ``image_encoder.onnx``; ``input_ids`` and
    ``attention_mask`` of ``text_encoder.onnx``. Outputs, ``image_embeds`` and ``text_embeds``, have length 1; the
    factor on their cosines is ``scale`` in ``onnx.json``.

    Returns the largest difference from what ``encoder`` computes, in a number of an embedding, over images and texts in
    batches of several sizes; None where onnxruntime is not installed. Raises UserError if it is above
    :data:`LARGEST_DIFFERENCE`, if an operation has no ONNX, and without the extra `onnx`; nothing is written then.
    """
    folder, encoder = Path(folder), copy.deepcopy(encoder).cpu().eval()
    clip = copy.deepcopy(encoder.clip)
    if clip.config.model_type == "clip":
        clip.set_attn_implementation("sdpa")  # our own attention is a function that no exporter knows
    generator = torch.Generator().manual_seed(0)
    side = encoder.image_size
    pixels_B3SS = torch.randint(256, (len(_SAID), 3, side, side), generator=generator, dtype=torch.uint8)
    normal_B3SS = (pixels_B3SS / 255 - encoder.mean_311) / encoder.std_311
    ids_BL, valid_BL = encoder.tokenize(_SAID)
    parts = [
        _Part(IMAGE_TOWER, _ImageTower(clip), {"pixel_values": normal_B3SS}, ("batch",), "image_embeds"),
        _Part(
            TEXT_TOWER,
            _TextTower(clip),
            {"input_ids": ids_BL, "attention_mask": valid_BL.long()},
            ("batch", "length"),
            "text_embeds",
        ),
    ]
    fresh = folder.with_name(f".{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)  # what a killed process left there
    fresh.mkdir(parents=True)
    try:
        for part in parts:
            _export(part, fresh / part.file)
        wanted = (encoder.embed_images(pixels_B3SS), encoder.embed_texts(_SAID))
        found = [_difference(part, fresh, each) for part, each in zip(parts, wanted, strict=True)]
        difference = None if None in found else max(each for each in found if each is not None)
        if difference is not None and not difference <= LARGEST_DIFFERENCE:
            raise UserError(
                f"{folder}: embeddings of onnxruntime differ from those of torch by {difference:.1e}, more than "
                f"{LARGEST_DIFFERENCE:g}: these towers cannot be exported; use RUN/model in transformers"
            )
        with without_progress_bars():
            encoder.processor.save_pretrained(fresh)
        write_json(fresh / SCALE, {"scale": encoder.scale.item(), "image_size": side, "width": encoder.width})
        folder.mkdir(parents=True, exist_ok=True)
        for file in fresh.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return difference


def _export(part: _Part, file: Path) -> None:
    """Write the graph of a tower."""
    dynamic = dict(enumerate(part.axes))
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                part.tower.eval(),
                tuple(part.inputs.values()),
                dynamo=True,
                input_names=list(part.inputs),
                output_names=[part.output],
                dynamic_shapes=tuple(dynamic for _ in part.inputs),
                verbose=False,
            )
            size = sum(weight.numel() * weight.element_size() for weight in part.tower.parameters())
            program.save(file, external_data=size > _LARGEST_FILE)
    except ImportError as error:
        raise UserError(f"ONNX needs packages that are not here ({error}): pip install 'diptych[onnx]'") from error
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"{part.file}: the tower has no form in ONNX ({first_line(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's messages on optional packages and on its names."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _difference(part: _Part, folder: Path, wanted_BD: Float[Tensor, "B D"]) -> float | None:
    """Largest difference of onnxruntime's embeddings, of one row, of some and of all; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(folder / part.file, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows in (1, 2, len(wanted_BD)):
        given = {name: each[:rows] for name, each in part.inputs.items()}
        if "attention_mask" in given:  # rows that are shorter than the longest one of the example
            longest = int(given["attention_mask"].sum(1).max())
            given = {name: each[:, :longest] for name, each in given.items()}
        (found_BD,) = session.run([part.output], {name: each.numpy() for name, each in given.items()})
        worst = max(worst, float((torch.from_numpy(found_BD) - wanted_BD[:rows]).abs().max()))
    return worst
