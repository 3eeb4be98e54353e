"""Loading encoders: which folder a name stands for, what a configuration tells, and weights that are all there.

Shapes: B rows, S side of an image in pixels, D width of the features.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from torch import nn
from transformers.utils import logging

from diptych.encoders import packages
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
    if packages.is_package(str(name)):
        found = packages.find(str(name), modality)
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
    if packages.is_package(name):
        return packages.lite0_config()
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
    name: str, what: str, kind: Any, *, tower: "transformers.PretrainedConfig | None" = None
) -> tuple[Any, bool]:
    """The model, and whether its pooler was in the file.

    Raises UserError for any other weight that was not in the file: `transformers` would fill it with random numbers
    and only warn. ``tower`` is the configuration of the tower of a CLIP that ``kind`` stands for.
    """
    options = {"config": tower} if tower is not None else {}
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
