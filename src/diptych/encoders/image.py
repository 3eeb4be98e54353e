"""Image encoders: any vision model of `transformers`, Diptych's own, or a small one to be trained from scratch.

Shapes: B rows, H and W pixels, N tokens, D width of the features.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Self

import torch
import transformers
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.encoders.loading import is_itit, is_projected, load, load_config, load_weights, resolve, tower_of, width_of
from diptych.errors import UserError

Pooling = Literal["auto", "cls", "mean"]
_POOLING = "diptych_pooling"
_WHAT = "a vision model"


class ImageEncoder(nn.Module):
    """From pixels [B 3 S S], bytes or floats from 0 to 255, to features [B D]; differentiable in its weights."""

    width: int
    """D."""
    image_size: int
    """S: the side that images are best decoded at. Others are resized."""
    preprocessing: dict[str, Any]
    """What besides the weights decides the features; part of the key of cached ones."""

    def tokens(self, pixels_B3HW: Tensor) -> Tensor:
        """[B N D]: of every patch or position."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """A folder that :func:`open_image_encoder` reads, and the library that the network comes from."""
        raise NotImplementedError


class HubImageEncoder(ImageEncoder):
    """A vision model of `transformers` with the resizing and normalisation of its `preprocessor_config.json`.

    Pooling "auto" is the model's own (CLIP's shared embedding, DINOv2's and ViT's pooler, the mean of a convolutional
    network); the CLS token where its weights came without the pooler, which would then be random.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self, network: "transformers.PreTrainedModel", *, settings: dict[str, Any], pooling: Pooling, has_pooler: bool
    ):
        super().__init__()
        self.network, self.settings = network, settings
        self.width = width_of(network.config, "image")
        self.image_size = _input_size(settings, str(network.name_or_path))
        self.pooling: Pooling = "cls" if pooling == "auto" and not has_pooler else pooling
        self.scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        normalise = settings.get("do_normalize", True)
        for name, default in (("image_mean", 0.5), ("image_std", 0.5)):
            value = settings.get(name, default) if normalise else float(name == "image_std")
            vector = torch.tensor(value, dtype=torch.float32).expand(3).reshape(3, 1, 1).clone()
            self.register_buffer(name, vector, persistent=False)
        self.preprocessing = {
            "size": self.image_size, "scale": self.scale, "mean": self.image_mean.flatten().tolist(),
            "std": self.image_std.flatten().tolist(), "pooling": self.pooling,
        }  # fmt: skip

    @classmethod
    def from_pretrained(cls, name: str, *, pooling: Pooling = "auto") -> Self:
        """From a folder (nothing touches the network) or a hub name. Raises UserError."""
        config = load_config(name, _WHAT)
        projected = is_projected(config)
        kind = transformers.CLIPVisionModelWithProjection if projected else transformers.AutoModel
        tower = tower_of(config, kind, "vision_config") if projected else None
        network, has_pooler = load_weights(name, _WHAT, kind, tower=tower)
        settings, _ = load(name, _WHAT, transformers.ImageProcessingMixin.get_image_processor_dict)
        if pooling == "auto":
            pooling = settings.get(_POOLING, "auto")
        # Of another model with two towers, such as SigLIP, the picture's.
        network = network if projected else getattr(network, "vision_model", network)
        return cls(network, settings=settings, pooling=pooling, has_pooler=has_pooler).eval()

    def forward(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        output = self._run(pixels_B3HW)
        if self.pooling == "auto":
            pooled = output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output
            if pooled is not None:
                return pooled.flatten(1)
        tokens_BND = _as_tokens(output.last_hidden_state)
        return tokens_BND[:, 0] if self.pooling == "cls" else tokens_BND.mean(1)

    def tokens(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        return _as_tokens(self._run(pixels_B3HW).last_hidden_state)

    def _run(self, pixels_B3HW: Tensor) -> Any:
        inputs_B3SS = resize(pixels_B3HW.to(self.image_mean), self.image_size) * self.scale
        return self.network(pixel_values=(inputs_B3SS - self.image_mean) / self.image_std)

    def save_pretrained(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
        settings = self.settings | {_POOLING: self.pooling}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


@dataclass(kw_only=True, slots=True)
class ScratchConfig:
    """A small ViT (Dosovitskiy et al., 2021) to be trained from scratch: 2.7M parameters."""

    image_size: int = 64
    """Side of the pictures."""
    patch: int = 8
    """Side of a patch."""
    width: int = 192
    """Features per patch."""
    depth: int = 6
    """Blocks."""
    heads: int = 3
    """Attention heads."""
    dropout: float = 0.0
    """Dropout inside the blocks."""


def scratch_encoder(config: ScratchConfig, *, seed: int) -> HubImageEncoder:
    """A new encoder whose weights follow from ``seed`` alone; its features are the mean over patches."""
    if config.image_size % config.patch or config.width % config.heads:
        raise UserError(f"a ViT cannot have these sizes: patch must divide image_size, heads the width ({config})")
    vit = transformers.ViTConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=4 * config.width, image_size=config.image_size, patch_size=config.patch,
        hidden_dropout_prob=config.dropout,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.ViTModel(vit, add_pooling_layer=False)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": config.image_size}}
    settings["size"]["width"] = config.image_size  # type: ignore[index]
    return HubImageEncoder(network, settings=settings, pooling="mean", has_pooler=False).eval()


def open_image_encoder(name: str | Path, *, pooling: Pooling = "auto") -> ImageEncoder:
    """By folder, hub name or run folder, in evaluation mode. Raises UserError."""
    found = resolve(name, "image")
    if is_itit(found):
        # By name: this module lies below the learners, so it may not import one; ITIT's own file knows how to open it.
        return resolve_name("diptych.itit.pipeline:ItitImageEncoder").from_pretrained(found)
    return HubImageEncoder.from_pretrained(found, pooling=pooling)


def resize(pixels_BCHW: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 S S"]:
    if pixels_BCHW.shape[-2:] == (size, size):
        return pixels_BCHW
    # Without the filter (antialias) a reduction makes patterns of its own.
    return F.interpolate(pixels_BCHW, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def _as_tokens(hidden: Tensor) -> Tensor:
    """[B N D], also of the maps [B D H W] of a convolutional network."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def _input_size(settings: dict[str, Any], name: str) -> int:
    """The side of the model's square input: the crop's when it crops, else the size it resizes to."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not isinstance(size, int):
        raise UserError(f'{name}/preprocessor_config.json names no input size: add "size": {{"height": 224}}.')
    return size
