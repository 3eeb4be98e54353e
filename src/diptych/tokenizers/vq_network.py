"""The convolutional network of a VQGAN, with the names, the weights and the configuration of `diffusers.VQModel`.

It is written out here because a command that captions one image must not wait for diffusers: importing its VQModel
imports all of its networks, which takes 13 s on a core that imports torch in 4 s. A folder that either of the two has
saved is read by the other, and both compute the same (tests/tokenizers/test_vq_network.py).

Shapes: B images, C channels, h and w positions, N = h·w.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.errors import UserError, first_line

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_EPS = 1e-6
_ACTIVATIONS = {"silu": nn.SiLU, "swish": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU, "mish": nn.Mish}
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "scaling_factor": 0.18215,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "lookup_from_codebook": False,
    "force_upcast": False,
}
_FORMER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of the weights of attention in files of early releases of diffusers, and what they are called now."""


class VQNetwork(nn.Module):
    """Encoder, codes and decoder. Settings that are not given have diffusers' defaults.

    Raises UserError for settings that it does not know: other blocks, activations or norms.
    """

    def __init__(self, **config: Any):
        super().__init__()
        c = self.config = {**_DEFAULTS, **config}
        _check(c)
        code_dim = c["vq_embed_dim"] or c["latent_channels"]
        self.encoder = _Encoder(c)
        self.quant_conv = nn.Conv2d(c["latent_channels"], code_dim, 1)
        self.quantize = _Codes(c["num_vq_embeddings"], code_dim)
        self.post_quant_conv = nn.Conv2d(code_dim, c["latent_channels"], 1)
        self.decoder = _Decoder(c)

    @classmethod
    def from_folder(cls, folder: Path) -> "VQNetwork":
        """Read a folder of diffusers. Raises UserError for one that is damaged, or whose two files do not fit."""
        try:
            network = cls(**read_config(folder))
            weights = {_present_name(name): value for name, value in load_file(folder / WEIGHTS).items()}
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except Exception as error:  # safetensors has its own kinds for a broken file
            told = first_line(error)
            raise UserError(
                f"{folder}: the tokenizer's weights cannot be read ({told}); copy or train it again"
            ) from error
        own = network.state_dict()
        linear = {name: value.squeeze() for name, value in weights.items() if ".to_" in name}  # 1 x 1 convolutions once
        weights |= linear
        odd = sorted(own.keys() ^ weights.keys())
        odd += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
        if odd:
            raise UserError(f"{folder}: the tokenizer's weights do not fit its {CONFIG} ({odd[0]}); copy it again")
        network.load_state_dict(weights)
        return network

    def save(self, folder: Path, *, image_size: int) -> None:
        """Write the two files for ``VQModel.from_pretrained``. Each appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "VQModel", **self.config, "sample_size": image_size}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            weights = {name: value.contiguous() for name, value in self.state_dict().items()}
            save_file(weights, Path(scratch) / WEIGHTS, metadata={"format": "pt"})
            (Path(scratch) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            for name in (WEIGHTS, CONFIG):  # the configuration comes last: a folder that has one is complete
                os.replace(Path(scratch) / name, folder / name)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the VQModel in a folder, without what begins with an underscore; {} if there is none."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict) or config.get("_class_name") != "VQModel":
        return {}
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _check(config: dict[str, Any]) -> None:
    wanted = {
        "down_block_types": {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"},
        "up_block_types": {"UpDecoderBlock2D", "AttnUpDecoderBlock2D"},
        "act_fn": set(_ACTIVATIONS),
        "norm_type": {"group"},
    }
    for name, known in wanted.items():
        found = config[name] if isinstance(config[name], list | tuple) else [config[name]]
        if unknown := sorted(set(found) - known):
            raise UserError(f"a VQModel with {name} {unknown[0]!r}, not {' or '.join(sorted(known))}: choose another")
    if unknown := sorted(config.keys() - _DEFAULTS.keys()):
        raise UserError(f"a VQModel with the unknown setting {unknown[0]!r}: choose another tokenizer")


def _present_name(name: str) -> str:
    for former, present in _FORMER.items():
        name = name.replace(former, present)
    return name


class _Codes(nn.Module):
    def __init__(self, count: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        nn.init.uniform_(self.embedding.weight, -1 / count, 1 / count)


class _Encoder(nn.Module):
    """Images to latents; every block but the last halves the resolution."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        widths = c["block_out_channels"]
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        before = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            _Block(c, width_in, width, resnets=c["layers_per_block"], kind=kind, end="down" if more else "same")
            for kind, width_in, width, more in zip(
                c["down_block_types"], before, widths, _all_but_last(widths), strict=True
            )
        )
        self.mid_block = _Middle(c, widths[-1])
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], c["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    """Latents to images; every block but the last doubles the resolution."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        widths = list(reversed(c["block_out_channels"]))
        self.conv_in = nn.Conv2d(c["latent_channels"], widths[0], 3, padding=1)
        # diffusers names the blocks before the middle and makes them after it: initial weights follow from that order.
        self.up_blocks = nn.ModuleList()
        self.mid_block = _Middle(c, widths[0])
        before = [widths[0], *widths[:-1]]
        self.up_blocks.extend(
            _Block(c, width_in, width, resnets=c["layers_per_block"] + 1, kind=kind, end="up" if more else "same")
            for kind, width_in, width, more in zip(
                c["up_block_types"], before, widths, _all_but_last(widths), strict=True
            )
        )
        self.conv_norm_out = nn.GroupNorm(c["norm_num_groups"], widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], c["out_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _all_but_last(widths: Any) -> list[bool]:
    return [True] * (len(widths) - 1) + [False]


class _Block(nn.Module):
    """Residual blocks at one resolution, with attention after each if ``kind`` says so, and a change of resolution."""

    def __init__(self, c: dict[str, Any], width_in: int, width: int, *, resnets: int, kind: str, end: str):
        super().__init__()
        made, attentions = [], []
        for number in range(resnets):
            made.append(_Resnet(c, width_in if number == 0 else width, width))
            if kind.startswith("Attn"):
                attentions.append(_Attention(c, width))
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(made)
        if end == "down":
            self.downsamplers = nn.ModuleList([_Downsample(width)])
        elif end == "up":
            self.upsamplers = nn.ModuleList([_Upsample(width)])
        self.attends, self.end = bool(attentions), end

    def forward(self, x: Tensor) -> Tensor:
        for number, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attends:
                x = self.attentions[number](x)
        if self.end == "same":
            return x
        return (self.downsamplers if self.end == "down" else self.upsamplers)[0](x)


class _Middle(nn.Module):
    """Two residual blocks, with attention between them if the settings say so."""

    def __init__(self, c: dict[str, Any], width: int):
        super().__init__()
        first = _Resnet(c, width, width)
        self.attends = bool(c["mid_block_add_attention"])
        if self.attends:
            self.attentions = nn.ModuleList([_Attention(c, width)])
        self.resnets = nn.ModuleList([first, _Resnet(c, width, width)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        if self.attends:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class _Resnet(nn.Module):
    def __init__(self, c: dict[str, Any], width_in: int, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(c["norm_num_groups"], width_in, eps=_EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(c["norm_num_groups"], width, eps=_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nonlinearity = _ACTIVATIONS[c["act_fn"]]()
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(self.nonlinearity(self.norm1(x)))
        inner = self.conv2(self.nonlinearity(self.norm2(inner)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + inner


class _Attention(nn.Module):
    """Self-attention with one head over all positions, on a residual branch."""

    def __init__(self, c: dict[str, Any], width: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(c["norm_num_groups"], width, eps=_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        normal_BNC = self.group_norm(x).flatten(2).transpose(1, 2)
        parts = (each(normal_BNC)[:, None] for each in (self.to_q, self.to_k, self.to_v))
        mixed_BNC = self.to_out[0](F.scaled_dot_product_attention(*parts)[:, 0])
        return x + mixed_BNC.transpose(1, 2).view_as(x)


class _Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
