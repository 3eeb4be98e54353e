"""What a name stands for, and what can be known of a model without loading it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import transformers
from torch import nn
from transformers.utils import logging

from diptych.errors import UserError

Modality = Literal["image", "text", "audio"]
T = TypeVar("T")

PARTS: dict[Modality, tuple[str, ...]] = {
    "image": ("encoder", "model"),
    "text": ("text_encoder", "model"),
    "audio": ("encoder",),
}
"""Where a run folder keeps its encoder: a classifier run in ``encoder``, a dual encoder in ``model``."""


def resolve(name: str | Path, modality: Modality) -> str:
    """The folder or hub name that is meant: a run folder stands for its encoder of this modality."""
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
    """Options of the loaders of transformers: nothing touches the network for a folder."""
    return {"local_files_only": Path(name).is_dir()}


def load(name: str, what: str, loader: Callable[..., T], **options: Any) -> T:
    """``loader(name)``; whatever a broken or missing file raises becomes a UserError of one line."""
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2):
        raise UserError(f"{name}: no such folder; give the folder or hub name of {what}")
    try:
        return loader(name, **offline(name), **options)
    except Exception as error:  # every library below has its own idea of what a broken file raises
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(f"{name} cannot be loaded as {what}: {reason}") from error


def load_config(name: str, what: str) -> "transformers.PretrainedConfig":
    return load(name, what, transformers.AutoConfig.from_pretrained)


def is_projected(config: "transformers.PretrainedConfig") -> bool:
    """Whether the model is (a tower of) a CLIP, whose pooled features are its shared embedding."""
    names = getattr(config, "architectures", None) or ()
    return config.model_type == "clip" or any(name.endswith("ModelWithProjection") for name in names)


def width_of(config: "transformers.PretrainedConfig", modality: Modality) -> int:
    """Width of the pooled features."""
    if is_projected(config):
        return config.projection_dim
    towers = {"image": "vision_config", "text": "text_config", "audio": "audio_config"}
    config = getattr(config, towers[modality], None) or config
    sizes = getattr(config, "hidden_sizes", None)  # of each stage of a convolutional network
    return sizes[-1] if sizes else config.hidden_size


def encoder_width(name: str | Path, modality: Modality) -> int:
    """Width of an encoder's pooled features, from its configuration: a 3B model is not loaded for one number."""
    if modality == "image" and is_itit(found := resolve(name, modality)):
        return json.loads((Path(found) / "model" / "config.json").read_text())["width"]
    return width_of(load_config(resolve(name, modality), f"an encoder of {modality}s"), modality)


def load_weights(
    name: str, what: str, kind: Any, *, tower: "transformers.PretrainedConfig | None" = None
) -> tuple[Any, bool]:
    """The model and whether its pooler was in the file. Raises UserError for any other weight that was not:
    transformers would fill it with random numbers and only warn.

    ``tower`` is the configuration of the half of a CLIP that ``kind`` stands for.
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
    """The configuration of one tower of a CLIP. Its width is the whole's, whatever the part says."""
    tower = getattr(config, part, config)
    tower.projection_dim, tower.architectures = config.projection_dim, [kind.__name__]
    return tower


def fuse_gelu(t5: "transformers.PreTrainedModel") -> "transformers.PreTrainedModel":
    """Replaces T5 v1.1's GELU, seven small operations in `transformers`, by the one kernel that computes the same."""
    for module in t5.modules():
        if isinstance(getattr(module, "act", None), transformers.activations.NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")
    return t5
