"""Images to tokens and back: a VQGAN, in the format of `diffusers.VQModel`, with an interface of uint8 images.

Shapes: B images, H and W pixels, h and w tokens down and across, N = h·w tokens, K codes, E width of a code,
P side of the pixel patch that the network takes as one position (1: plain pixels), C channels.

A saved tokenizer is a plain diffusers folder. Conventions on top of the format:
- images are in [0, 1] where `lookup_from_codebook` is set, as in aMUSEd and in everything saved here, and in
  [-1, 1] elsewhere, as in latent diffusion: the format itself does not record it;
- `in_channels` = 3·P² says that pixels go in as P x P patches. P > 1 skips the stages at full resolution, which cost
  most of the time on a CPU.

The network is written out here because a command that captions one image must not wait for diffusers: importing its
VQModel imports all of its networks, which takes 13 s on a core that imports torch in 4 s. A folder that either of the
two has saved is read by the other, and both compute the same (tests/tokenizers/test_image_tokenizer.py).
"""

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
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


@dataclass(kw_only=True, slots=True)
class ImageTokenizerConfig:
    """Sizes of a new image tokenizer. The defaults are those of a VQGAN for 256 tokens an image."""

    image_size: int = 256
    """Height and width of an image in pixels."""
    codebook_size: int = 8192
    """Number of codes K: the size of the image vocabulary."""
    code_dim: int = 256
    """Width of a code in numbers. Narrow codes (8 to 32) keep more of a small codebook in use."""
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Numbers of channels at each resolution, finest first; every one after the first halves the resolution. Empty: no
    network at all, a token is the nearest of ``codebook_size`` squares of ``patch`` pixels a side."""
    blocks: int = 2
    """Number of residual blocks at each resolution of the encoder; the decoder has one more."""
    groups: int = 32
    """Number of groups of the group norms; it divides every one of the widths."""
    patch: int = 1
    """Side in pixels of the square that enters the network as one position; 1 is the usual VQGAN."""
    attention: bool = False
    """Whether the coarsest resolution has self-attention."""


def nearest_codes(latents_ME: Float[Tensor, "M E"], codebook_KE: Float[Tensor, "K E"]) -> Int[Tensor, "M"]:
    """Index of the code with the smallest Euclidean distance; |z|² is the same for all codes and left out.

    Always in fp32: distances of neighbouring codes differ by less than bf16 resolves.
    """
    with torch.autocast(latents_ME.device.type, enabled=False):
        codebook_KE = codebook_KE.float()
        half_norms_K = codebook_KE.square().sum(1) / 2
        return torch.addmm(half_norms_K, latents_ME.float(), codebook_KE.T, beta=-1).argmax(1)


class ImageTokenizer(nn.Module):
    """Images of `image_size` x `image_size` pixels to `tokens` = (image_size / factor)² tokens out of `codebook_size`.

    Raises UserError for a network that does not take RGB images of that size.
    """

    def __init__(self, network: "VQNetwork", *, image_size: int):
        super().__init__()
        config = network.config
        self.network = network
        self.image_size = image_size
        self.codebook_size: int = config["num_vq_embeddings"]
        self.patch, self.factor = _patch_and_factor(config)
        self.unit_range = bool(config["lookup_from_codebook"])
        if config["in_channels"] != 3 * self.patch**2 or config["norm_type"] != "group":
            raise UserError("this VQModel does not take RGB images with group norms; choose another tokenizer")
        if image_size % self.factor:
            raise UserError(
                f"images of {image_size} pixels do not divide into tokens of {self.factor}; change the size"
            )

    @classmethod
    def from_config(cls, config: ImageTokenizerConfig, *, seed: int = 0) -> "ImageTokenizer":
        """A new tokenizer; its weights follow from ``seed`` alone."""
        stages = len(config.widths)
        code_dim = config.code_dim if stages else 3 * config.patch**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = VQNetwork(
                in_channels=3 * config.patch**2,
                out_channels=3 * config.patch**2,
                down_block_types=("DownEncoderBlock2D",) * stages,
                up_block_types=("UpDecoderBlock2D",) * stages,
                block_out_channels=tuple(config.widths),
                layers_per_block=config.blocks,
                latent_channels=code_dim,
                vq_embed_dim=code_dim,
                num_vq_embeddings=config.codebook_size,
                norm_num_groups=config.groups,
                mid_block_add_attention=config.attention,
                lookup_from_codebook=True,
                sample_size=config.image_size,
            )
            tokenizer = cls(network, image_size=config.image_size)
            tokenizer.init_weights()
        return tokenizer

    def init_weights(self) -> None:
        """Matrices N(0, 1 / inputs), biases 0, norms 1 and 0, codes uniform in ±1/K; residual branches end in 0.

        PyTorch's defaults lose half of the signal at each of the linear layers around the codebook, which start a run
        with hundreds of steps that reconstruct nothing but a mean colour.
        """
        for name, module in self.network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                branch_end = name.endswith(("conv2", "to_out.0"))
                nn.init.normal_(module.weight, std=0.0 if branch_end else module.weight[0].numel() ** -0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.uniform_(self.codebook, -1 / self.codebook_size, 1 / self.codebook_size)
        encoder, decoder = self.network.encoder, self.network.decoder
        if not (isinstance(encoder, _Encoder) and isinstance(decoder, _Decoder)):
            return
        encoder_in, decoder_out = encoder.conv_in, decoder.conv_out
        assert encoder_in.bias is not None
        assert decoder_out.bias is not None
        grey = 0.5 if self.unit_range else 0.0
        with torch.no_grad():  # a grey image goes in as zeros and comes out of zeros
            encoder_in.bias.copy_(-grey * encoder_in.weight.sum((1, 2, 3)))
            decoder_out.bias.fill_(grey)

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return (self.image_size // self.factor) ** 2

    @property
    def codebook(self) -> Tensor:
        """The codes, [K, E]."""
        return self.network.quantize.embedding.weight

    # The differentiable halves, for training

    def pixels_to_input(self, pixels_B3HW: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Bytes to the range the network was trained on."""
        unit_B3HW = pixels_B3HW.to(self.codebook.dtype) / 255
        return unit_B3HW if self.unit_range else unit_B3HW * 2 - 1

    def latents(self, input_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E h w"]:
        """Latents of images in the input's range, before the nearest codes take their place."""
        return self.network.quant_conv(self.network.encoder(F.pixel_unshuffle(input_B3HW, self.patch)))

    def reconstruct(self, quantized_BEhw: Float[Tensor, "B E h w"]) -> Float[Tensor, "B 3 H W"]:
        """Codes to images in the input's range, not clipped."""
        return F.pixel_shuffle(self.network.decoder(self.network.post_quant_conv(quantized_BEhw)), self.patch)

    # Inference

    @torch.no_grad()
    def encode(self, pixels_B3HW: UInt8[Tensor, "B 3 H W"], *, rows: int = 64) -> Int[Tensor, "B N"]:
        """Tokens in raster order, int64, on the tokenizer's device; ``rows`` images at a time.

        Raises UserError for images of another size.
        """
        if pixels_B3HW.shape[-2:] != (self.image_size, self.image_size):
            height, width = pixels_B3HW.shape[-2:]
            raise UserError(
                f"the tokenizer takes {self.image_size}x{self.image_size} images, got {height}x{width}; resize them"
            )
        device = self.codebook.device

        def encode_rows(pixels: Tensor) -> Tensor:
            latents_BEhw = self.latents(self.pixels_to_input(pixels.to(device)))
            latents_ME = latents_BEhw.permute(0, 2, 3, 1).flatten(0, 2)
            return nearest_codes(latents_ME, self.codebook).view(len(pixels), self.tokens)

        with torch.autocast(device.type, enabled=False):
            return _in_pieces(encode_rows, pixels_B3HW, rows)

    @torch.no_grad()
    def decode(self, tokens_BN: Int[Tensor, "B N"], *, rows: int = 64) -> UInt8[Tensor, "B 3 H W"]:
        """Images of tokens in [0, K), on the tokenizer's device; ``rows`` images at a time.

        Raises UserError for another number of tokens than an image of this tokenizer has.
        """
        if tokens_BN.shape[1] != self.tokens:
            raise UserError(f"an image has {self.tokens} tokens, got {tokens_BN.shape[1]}; was the tokenizer changed?")
        side, device = self.image_size // self.factor, self.codebook.device

        def decode_rows(tokens: Tensor) -> Tensor:
            codes_BNE = F.embedding(tokens.to(device), self.codebook)
            image_B3HW = self.reconstruct(codes_BNE.transpose(1, 2).unflatten(2, (side, side)))
            return self.output_to_pixels(image_B3HW)

        with torch.autocast(device.type, enabled=False):
            return _in_pieces(decode_rows, tokens_BN, rows)

    def output_to_pixels(self, image_B3HW: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        """The network's output as bytes, clipped and rounded."""
        unit_B3HW = image_B3HW.float() if self.unit_range else (image_B3HW.float() + 1) / 2
        return unit_B3HW.clamp(0, 1).mul(255).round().to(torch.uint8)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and safetensors for ``VQModel.from_pretrained``. Each file appears whole or not at all."""
        self.network.save(Path(folder), image_size=self.image_size)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, image_size: int | None = None) -> "ImageTokenizer":
        """Any diffusers VQModel: a folder or a hub name, the model itself or a pipeline with one in ``vqvae``.

        ``image_size`` overrides the recorded size. A recorded size of fewer than 4 x 4 tokens is taken for diffusers'
        unset default (32, as in aMUSEd's), and 16 x 16 tokens are assumed instead. Raises UserError for whatever is
        missing, damaged or no VQModel.
        """
        network = VQNetwork.from_folder(_find_folder(name))
        if image_size is None:
            factor = _patch_and_factor(network.config)[1]
            recorded = network.config["sample_size"]
            image_size = recorded if recorded >= 4 * factor else 16 * factor
        return cls(network, image_size=image_size)


def _find_folder(name: str | Path) -> Path:
    """The folder of the VQModel: ``name`` or its ``vqvae``. A hub name is downloaded unless it has been before."""
    if Path(name).is_dir():
        for folder in (Path(name), Path(name) / "vqvae"):
            if _read_config(folder):
                return folder
    else:
        import huggingface_hub

        for part in (None, "vqvae"):
            try:
                files = [huggingface_hub.hf_hub_download(str(name), each, subfolder=part) for each in (CONFIG, WEIGHTS)]
            except (OSError, ValueError, RuntimeError):  # no such name, no such file, no network
                continue
            if _read_config(Path(files[0]).parent):
                return Path(files[0]).parent
    raise UserError(f"{name}: no diffusers VQModel here; give a folder or hub name with a config.json of one")


def _patch_and_factor(config: dict[str, Any]) -> tuple[int, int]:
    patch = math.isqrt(config["in_channels"] // 3)
    return patch, patch * 2 ** max(0, len(config["block_out_channels"]) - 1)


def _in_pieces(function: Callable[[Tensor], Tensor], values: Tensor, rows: int) -> Tensor:
    return torch.cat([function(piece) for piece in values.split(rows)])


# The network


class VQNetwork(nn.Module):
    """Encoder, codes and decoder. Settings that are not given have diffusers' defaults.

    Without blocks it is the codes alone, which diffusers has no model for. Raises UserError for settings that it does
    not know: other blocks, activations or norms.
    """

    def __init__(self, **config: Any):
        super().__init__()
        c = self.config = {**_DEFAULTS, **config}
        _check(c)
        code_dim = c["vq_embed_dim"] or c["latent_channels"]

        def part(kind: type[nn.Module], *sizes: Any) -> nn.Module:
            return kind(*sizes) if c["block_out_channels"] else nn.Identity()

        self.encoder = part(_Encoder, c)
        self.quant_conv = part(nn.Conv2d, c["latent_channels"], code_dim, 1)
        self.quantize = _Codes(c["num_vq_embeddings"], code_dim)
        self.post_quant_conv = part(nn.Conv2d, code_dim, c["latent_channels"], 1)
        self.decoder = part(_Decoder, c)

    @classmethod
    def from_folder(cls, folder: Path) -> "VQNetwork":
        """Read a folder of diffusers. Raises UserError for one that is damaged, or whose two files do not fit."""
        try:
            network = cls(**_read_config(folder))
            weights = {_present_name(name): value for name, value in load_file(folder / WEIGHTS).items()}
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except Exception as error:  # safetensors has its own kinds for a broken file
            reason = first_line(error)
            raise UserError(
                f"{folder}: the tokenizer's weights cannot be read ({reason}); copy or train it again"
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


def _read_config(folder: Path) -> dict[str, Any]:
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
