"""Image encoders: any vision model of `transformers`, an ITIT run, or a small ViT to be trained from scratch.

Convolutional networks compute features by a folded copy of themselves (:class:`FoldedCopy`), in a fraction of the time.

Shapes: B rows, H and W pixels, N tokens, D width of the features or channels.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, Self

import torch
import transformers
from jaxtyping import Float, Num, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diptych.encoders.loading import (
    LITE0_PIXELS,
    find_package,
    is_itit,
    is_package,
    is_projected,
    lite0,
    lite0_config,
    load,
    load_config,
    load_weights,
    resolve,
    tower_of,
    width_of,
)
from diptych.errors import UserError
from diptych.io import without_progress_bars
from diptych.nn.inference import Derived

ImagePooling = Literal["auto", "cls", "mean"]
_POOLING_KEY = "diptych_pooling"
"""Where `preprocessor_config.json` keeps the pooling."""
_WHAT = "a vision model"
CPU_ROWS = 8
"""Images that a network computes at once on a CPU: more do not stay in its cache, see docs/performance.md."""


class ImageEncoder(nn.Module):
    """From pixels to features; differentiable in its weights. The base class of all image encoders."""

    width: int
    """D."""
    image_size: int
    """S, the side in pixels at which images are best decoded. Images of another size are resized."""
    preprocessing: dict[str, Any]
    """What decides the features besides the weights; part of the name of cached features."""

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Pooled features [B D]. Pixels are bytes, or floats from 0 to 255."""
        raise NotImplementedError

    def tokens(self, pixels_B3HW: Tensor) -> Tensor:
        """Features of every patch or position [B N D]."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that :func:`open_image_encoder` reads, and the library of the network too."""
        raise NotImplementedError


class HubImageEncoder(ImageEncoder):
    """A vision model of `transformers` with the resizing and normalization of its `preprocessor_config.json`.

    Pooling "auto" is the model's own: CLIP's shared embedding, the pooler of DINOv2 and ViT, the mean of a
    convolutional network. If the weights came without the pooler, which would then be random, it is the CLS token.

    Without gradients a convolutional network computes by its :class:`FoldedCopy`.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        network: "transformers.PreTrainedModel",
        *,
        settings: dict[str, Any],
        pooling: ImagePooling,
        has_pooler: bool,
    ) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        self._folded = FoldedCopy()
        self.width = width_of(network.config, "image")
        self.image_size = _input_size(settings, str(network.name_or_path))
        self.projected = is_projected(network.config)
        self.pooling: ImagePooling = "cls" if pooling == "auto" and not has_pooler else pooling
        self.scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        normalize = settings.get("do_normalize", True)
        for name, default in (("image_mean", 0.5), ("image_std", 0.5)):
            value = settings.get(name, default) if normalize else float(name == "image_std")
            vector = torch.tensor(value, dtype=torch.float32).expand(3).reshape(3, 1, 1).clone()
            self.register_buffer(name, vector, persistent=False)
        self.preprocessing = {
            "size": self.image_size,
            "scale": self.scale,
            "mean": self.image_mean.flatten().tolist(),
            "std": self.image_std.flatten().tolist(),
            "pooling": self.pooling,
        }

    @classmethod
    def from_pretrained(cls, name: str, *, pooling: ImagePooling = "auto") -> Self:
        """From a folder or package, which need no internet, or a hub name. Raises UserError if it cannot be loaded."""
        if is_package(name):
            network = lite0(find_package(name, "image"), lite0_config())
            return cls(network, settings=LITE0_PIXELS, pooling=pooling, has_pooler=True).eval()
        config = load_config(name, _WHAT)
        projected = is_projected(config)
        kind = transformers.CLIPVisionModelWithProjection if projected else transformers.AutoModel
        tower = tower_of(config, kind, "vision_config") if projected else None
        network, has_pooler = load_weights(name, _WHAT, kind, tower=tower)
        settings, _ = load(name, _WHAT, transformers.ImageProcessingMixin.get_image_processor_dict)
        if pooling == "auto":
            pooling = settings.get(_POOLING_KEY, "auto")
        # Other models with two towers, such as SigLIP, keep their image tower here.
        network = network if projected else getattr(network, "vision_model", network)
        return cls(network, settings=settings, pooling=pooling, has_pooler=has_pooler).eval()

    def forward(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self._few_at_once(self._pooled, pixels_B3HW)

    def tokens(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        return self._few_at_once(lambda part_B3HW: _as_tokens(self._run(part_B3HW).last_hidden_state), pixels_B3HW)

    def _few_at_once(self, compute: Callable[[Tensor], Tensor], pixels_B3HW: Tensor) -> Tensor:
        """``compute`` of all rows. On a CPU, where no gradient wants them together, it gets ``CPU_ROWS`` at a time."""
        if self.image_mean.device.type != "cpu" or self.training or torch.is_grad_enabled():
            return compute(pixels_B3HW)
        return torch.cat([compute(part_B3HW) for part_B3HW in pixels_B3HW.split(CPU_ROWS)])

    def _pooled(self, pixels_B3HW: Tensor) -> Tensor:
        output = self._run(pixels_B3HW)
        if self.pooling == "auto":
            pooled = output.image_embeds if self.projected else output.pooler_output
            if pooled is not None:
                return pooled.flatten(1)
        tokens_BND = _as_tokens(output.last_hidden_state)
        return tokens_BND[:, 0] if self.pooling == "cls" else tokens_BND.mean(1)

    def _run(self, pixels_B3HW: Tensor) -> Any:
        inputs_B3SS = resize(pixels_B3HW.to(self.image_mean), self.image_size) * self.scale
        inputs_B3SS = (inputs_B3SS - self.image_mean) / self.image_std
        if self.training or torch.is_grad_enabled():
            return self.network(pixel_values=inputs_B3SS)
        return self._folded.of(self.network)(pixel_values=inputs_B3SS.contiguous(memory_format=torch.channels_last))

    @without_progress_bars()
    def save_pretrained(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
        settings = self.settings | {_POOLING_KEY: self.pooling}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


@dataclass(kw_only=True, slots=True)
class ScratchConfig:
    """A small ViT (Dosovitskiy et al., 2021) to be trained from scratch, by default with 2.7M parameters."""

    image_size: int = 64
    """Side of the images, in pixels."""
    patch: int = 8
    """Side of a patch, in pixels."""
    width: int = 192
    """Number of features of each patch."""
    depth: int = 6
    """Number of transformer blocks."""
    heads: int = 3
    """Number of attention heads of a block."""
    dropout: float = 0.0
    """Dropout rate inside the blocks."""


def scratch_encoder(config: ScratchConfig, *, seed: int) -> HubImageEncoder:
    """A new encoder whose weights follow from ``seed`` alone; its features are the mean over patches.

    Raises UserError for sizes that do not divide.
    """
    if config.image_size % config.patch or config.width % config.heads:
        raise UserError(f"a ViT cannot have these sizes: patch must divide image_size, heads the width ({config})")
    vit = transformers.ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        image_size=config.image_size,
        patch_size=config.patch,
        hidden_dropout_prob=config.dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.ViTModel(vit, add_pooling_layer=False)
    size = {"height": config.image_size, "width": config.image_size}
    settings = {"image_processor_type": "ViTImageProcessor", "size": size}
    return HubImageEncoder(network, settings=settings, pooling="mean", has_pooler=False).eval()


def open_image_encoder(name: str | Path, *, pooling: ImagePooling = "auto") -> ImageEncoder:
    """The encoder of a folder, hub name, package or run folder, in evaluation mode.

    ``pooling`` has no effect on an ITIT run, whose feature is the mean over its image tokens. Raises UserError if it
    cannot be loaded.
    """
    found = resolve(name, "image")
    if is_itit(found):
        # Resolved by name when it is needed: this module lies below the learners, so it may not import one of them.
        return resolve_name("diptych.itit.pipeline:ItitImageEncoder").from_pretrained(found)
    return HubImageEncoder.from_pretrained(found, pooling=pooling)


def resize(pixels_BCHW: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 S S"]:
    """Bicubic, to ``size`` pixels a side, in the range from 0 to 255. Pixels of that size are returned as they are."""
    if pixels_BCHW.shape[-2:] == (size, size):
        return pixels_BCHW
    # Without the antialias filter a smaller image shows patterns that are not in the larger one.
    return F.interpolate(pixels_BCHW, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def resize_pixels(pixels_B3HW: UInt8[Tensor, "B 3 H W"], size: int) -> UInt8[Tensor, "B 3 S S"]:
    """:func:`resize` of uint8 pixels, rounded to uint8 again. Pixels of that size are returned as they are."""
    if pixels_B3HW.shape[-2:] == (size, size):
        return pixels_B3HW
    return resize(pixels_B3HW.float(), size).round().to(torch.uint8)


def _as_tokens(hidden: Tensor) -> Tensor:
    """[B N D] as it is; the maps [B D H W] of a convolutional network as [B H*W D]."""
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def _input_size(settings: dict[str, Any], name: str) -> int:
    """The side in pixels of the model's square input: that of the crop if it crops, else the size it resizes to."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not isinstance(size, int):
        raise UserError(f'{name}/preprocessor_config.json names no input size: add "size": {{"height": 224}}.')
    return size


_TOLERANCE = 1e-3
"""Largest difference of the outputs, as a share of their largest value, with which a copy is used."""


class FoldedCopy:
    """The copy of a network, made anew when its weights have changed. It is no module, so it is never saved."""

    def __init__(self) -> None:
        self._copy: Derived[nn.Module] = Derived()

    def of(self, network: nn.Module) -> nn.Module:
        """The copy, or ``network`` itself where it has no batch norm that can be folded."""
        if not any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
            return network
        return self._copy.of((*network.parameters(), *network.buffers()), lambda: folded(network))


@torch.no_grad()
def folded(network: nn.Module) -> nn.Module:
    """A copy of ``network`` that computes the same; ``network`` itself where that is not so.

    Batch norms whose input is the output of a convolution are folded into it, and gates of squeeze-and-excitation that
    are always open are left out. Which ones these are shows when the network is given an image, and whether the copy
    computes the same too.
    """
    fresh: Any = copy.deepcopy(network).eval()  # torch's annotations lack Module.to(memory_format)
    first = next(fresh.parameters())
    size = getattr(getattr(network, "config", None), "image_size", None)
    size = size if isinstance(size, int) else 64
    generator = torch.Generator().manual_seed(0)
    image_13SS = torch.randn(1, 3, size, size, generator=generator).to(first)
    pairs, wanted = _following_norms(fresh, image_13SS)
    parents = {child: (parent, name) for parent in fresh.modules() for name, child in parent.named_children()}
    for convolution, norm in pairs:
        _replace(parents, convolution, fuse_conv_bn_eval(convolution, norm))
        _replace(parents, norm, nn.Identity())
    for part in list(fresh.modules()):
        if _is_open_gate(part):
            _replace(parents, part, nn.Identity())
    fresh = fresh.to(memory_format=torch.channels_last)
    found = fresh(pixel_values=image_13SS).last_hidden_state
    close = (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()
    return fresh if bool(close) else network


def _replace(parents: dict[nn.Module, tuple[nn.Module, str]], old: nn.Module, new: nn.Module) -> None:
    parent, name = parents[old]
    setattr(parent, name, new)


def _following_norms(network: nn.Module, image_13SS: Tensor) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Tensor]:
    """Each convolution with the batch norm that reads its output, and the network's output for the image."""
    made_by: dict[int, nn.Conv2d] = {}
    kept: list[Tensor] = []  # so that no later tensor gets the identity of an earlier one
    pairs: dict[nn.Conv2d, nn.BatchNorm2d] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = module
        elif isinstance(module, nn.BatchNorm2d) and (convolution := made_by.get(id(inputs[0]))) is not None:
            pairs[convolution] = module

    parts = [part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.BatchNorm2d))]
    handles = [part.register_forward_hook(record) for part in parts]
    try:
        wanted: Any = network(pixel_values=image_13SS)
    finally:
        for handle in handles:
            handle.remove()
    return list(pairs.items()), wanted.last_hidden_state


def _is_open_gate(part: nn.Module) -> bool:
    """Whether ``part`` is a squeeze-and-excitation of EfficientNet that multiplies by one, whatever it is given."""
    expand, reduce = getattr(part, "expand", None), getattr(part, "reduce", None)
    if not isinstance(expand, nn.Conv2d) or not isinstance(reduce, nn.Conv2d) or expand.bias is None:
        return False
    return not expand.weight.any() and bool((expand.bias.sigmoid() == 1).all())
