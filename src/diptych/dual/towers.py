"""A dual encoder of two pretrained models: a plain `transformers.VisionTextDualEncoderModel` with its processor.

A tower gives *states*: the pooled feature of an image and, if asked for, the cells of a coarse grid of it; the pooled
feature of a text and its tokens. The heads, a matrix for each tower and the temperature, make embeddings of states. So
the states of frozen towers are computed once (`dual/data.py`), and :class:`Heads` alone is trained.

Shapes: B rows, H and W pixels, L text tokens, S states of an image or a text (the pooled one first), F width of a
tower, D width of the common space, N tokens of a vision model, C cells of the grid.
"""

import copy
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diptych.dual.model import DualEncoder, Temperature, TowerOutput, Tune
from diptych.encoders import PooledTextEncoder, open_image_encoder, open_text_encoder
from diptych.encoders.image import CPU_ROWS, FoldedCopy, HubImageEncoder
from diptych.errors import UserError
from diptych.io import weights_digest, write_bytes

_GRID = 3
"""Cells of a side of the grid to which the map of an image is averaged, for ITO's fusion."""
_NEARLY_LINEAR = 0.1
"""Diagonal of a pooler that does not change the first token: tanh(0.1 x) is nearly linear."""
_AVERAGE = 1e4
"""Factor of the mean of all tokens in an averaging layer: so large that the first token itself does not count."""


class _Projected(Temperature):
    """Embeddings of states. The matrices and the temperature are `transformers`' own."""

    visual_projection: nn.Linear
    text_projection: nn.Linear
    dropout: float
    training: bool

    def _embed(self, states_BSF: Tensor, projection: nn.Linear, *, first: int, keep_tokens: bool) -> TowerOutput:
        """``first`` is the first state that becomes a token."""
        shown_BSF = states_BSF if keep_tokens else states_BSF[:, :1]
        embedded_BSD = projection(F.dropout(shown_BSF, self.dropout, self.training))
        tokens = embedded_BSD[:, first:] if keep_tokens else None
        return TowerOutput(pooled_BD=embedded_BSD[:, 0], state_BW=states_BSF[:, 0], tokens_BSD=tokens)


class TowersEncoder(DualEncoder, _Projected):
    """Two towers of `transformers`, each with a pooled feature of its own, and a linear head on each."""

    def __init__(self, clip: "transformers.VisionTextDualEncoderModel", processor: Any) -> None:
        super().__init__(clip, processor)
        self._folded = FoldedCopy()
        self._averaging = [_averaging_layer(clip.text_model)]  # in a list, as it is a part of clip already
        self._known: dict[str, Tensor] | None = None
        self.set_trainable("heads")

    @classmethod
    def from_towers(cls, image: str, text: str, *, width: int, max_text_len: int, seed: int) -> "TowersEncoder":
        """The towers that :func:`open_image_encoder` and :func:`open_text_encoder` find by these names, frozen.

        The heads are random and follow from ``seed`` alone. Raises UserError for models that cannot be loaded, and for
        those for which `VisionTextDualEncoderModel` has no place.
        """
        vision, language = open_image_encoder(image), open_text_encoder(text, length=max_text_len)
        if not isinstance(vision, HubImageEncoder):
            raise UserError(f"{image}: an ITIT run is no image tower; give a vision model of transformers")
        text_config, weights = _pooled_as_trained(language)
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            _with_width(vision), text_config, projection_dim=width
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip = transformers.VisionTextDualEncoderModel(config)
            for head in (clip.visual_projection, clip.text_projection):
                nn.init.normal_(head.weight, std=head.in_features**-0.5)
        _adopt(clip.vision_model, vision.network.state_dict(), image)
        _adopt(clip.text_model, weights, text)
        clip.eval()
        encoder = cls(clip, _processor(vision, language))
        encoder._try(image, text)
        return encoder

    def _input_sizes(self, config: Any) -> tuple[int, int]:
        return self.processor.image_processor.crop_size["height"], self.processor.tokenizer.model_max_length

    @property
    def visual_projection(self) -> nn.Linear:  # type: ignore[override]
        return self.clip.visual_projection

    @property
    def text_projection(self) -> nn.Linear:  # type: ignore[override]
        return self.clip.text_projection

    # Training

    def set_trainable(self, tune: Tune, *, dropout: float = 0.0) -> None:
        """Train the heads and, with `text` or `all`, the text tower or both; the rest is frozen from now on."""
        self.tune, self.dropout = tune, dropout
        self.learned_images = tune == "all"
        self.clip.vision_model.requires_grad_(tune == "all")
        self.clip.text_model.requires_grad_(tune != "heads")
        if self._averaging[0] is not None:
            self._averaging[0].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TowersEncoder":
        """Frozen towers stay in evaluation mode, as do all batch norms: a batch is too small for their statistics."""
        super().train(mode)
        for tower, learned in (
            (self.clip.vision_model, self.tune == "all"),
            (self.clip.text_model, self.tune != "heads"),
        ):
            for part in tower.modules():
                part.training = mode and learned and not isinstance(part, nn.modules.batchnorm._BatchNorm)
        if self._averaging[0] is not None:
            self._averaging[0].eval()
        return self

    @property
    def frozen(self) -> bool:
        """Whether neither tower is trained."""
        return self.tune == "heads"

    def training_settings(self) -> dict[str, Any]:
        """What the losses depend on besides the configuration and the weights, such as a digest of the towers."""
        towers = [weights_digest(tower) for tower in (self.clip.vision_model, self.clip.text_model)]
        return {"tune": self.tune, "dropout": self.dropout, "towers": towers}

    def remember(self, folder: Path) -> None:
        """From now on keep the pooled features of every batch that frozen towers see outside of training.

        A validation that sees the same batches again then computes nothing, and its scores stay the same to the last
        bit. ``folder`` has the features that an earlier call of :meth:`save_cache` wrote for these towers.
        """
        digest = weights_digest(self.clip.vision_model), weights_digest(self.clip.text_model)
        self._kept_in = folder / f"validation-{'-'.join(digest)}.safetensors"
        self._known = load_file(self._kept_in) if self._kept_in.is_file() else {}
        # Copied: the file's tensors begin at any 8th byte, and on some CPUs a product rounds differently for a matrix
        # that torch has not aligned itself.
        self._known = {key: value.to(self.mean_311.device, copy=True) for key, value in self._known.items()}

    def save_cache(self) -> None:
        """Write the kept features, for this run when it is resumed and for others."""
        assert self._known is not None
        write_bytes(self._kept_in, save({key: value.cpu().contiguous() for key, value in self._known.items()}))

    def _once(self, compute: Callable[..., Tensor], *inputs: Tensor, keep_tokens: bool) -> Tensor:
        if self._known is None or keep_tokens:
            return compute(*inputs, keep_tokens=keep_tokens)
        key = hashlib.blake2b(digest_size=16)
        for each in inputs:
            key.update(each.contiguous().cpu().numpy().data)
        if key.hexdigest() not in self._known:
            self._known[key.hexdigest()] = compute(*inputs, keep_tokens=False)
        return self._known[key.hexdigest()]

    def heads(self) -> "Heads":
        """The heads alone, on weights that are shared with this encoder."""
        return Heads(self)

    def tune_for_training(self) -> None:
        """Nothing: the towers stay as their library has them."""

    def recompute_image_activations(self) -> None:
        """Nothing: the towers stay as their library has them."""

    @property
    def image_tokens(self) -> int:
        """The pooled feature and the cells of the grid."""
        return 1 + _GRID**2

    def text_positions(self, length: int) -> Float[Tensor, "L D"]:
        """Zeros: the states of a pretrained tower tell their positions themselves."""
        return self.mean_311.new_zeros(length, self.width)

    # From pixels and ids to states, and to embeddings

    def image_states(self, pixels_B3HW: Float[Tensor, "B 3 H W"], *, keep_tokens: bool) -> Float[Tensor, "B S F"]:
        """The pooled feature and, with ``keep_tokens``, the cells. ``pixels_B3HW`` lie in [0, 1]."""
        normal_B3HW = (pixels_B3HW - self.mean_311) / self.std_311
        if self.learned_images and torch.is_grad_enabled():
            return _image_states(self.clip.vision_model, normal_B3HW, keep_tokens=keep_tokens)
        with torch.no_grad():
            network = self._folded.of(self.clip.vision_model)
            rows = CPU_ROWS if normal_B3HW.device.type == "cpu" else len(normal_B3HW)
            normal_B3HW = normal_B3HW.contiguous(memory_format=torch.channels_last)
            return torch.cat(
                [_image_states(network, part, keep_tokens=keep_tokens) for part in normal_B3HW.split(rows)]
            )

    def text_states(
        self, ids_BL: Int[Tensor, "B L"], valid_BL: Bool[Tensor, "B L"], *, keep_tokens: bool
    ) -> Float[Tensor, "B S F"]:
        """The pooled feature and, with ``keep_tokens``, the tokens, where S is L + 1."""
        learned = self.tune != "heads" and torch.is_grad_enabled()
        with torch.set_grad_enabled(learned):
            output = self.clip.text_model(
                input_ids=ids_BL, attention_mask=valid_BL.long(), output_hidden_states=keep_tokens
            )
        pooled_B1F = output.pooler_output[:, None]
        if not keep_tokens:
            return pooled_B1F
        last = -1 if self._averaging[0] is None else -2
        return torch.cat([pooled_B1F, output.hidden_states[last]], 1)

    def encode_images(self, pixels_B3HW: Float[Tensor, "B 3 H W"], *, keep_tokens: bool = False) -> TowerOutput:
        states_BSF = self._once(self.image_states, pixels_B3HW, keep_tokens=keep_tokens)
        return self._embed(states_BSF, self.visual_projection, first=0, keep_tokens=keep_tokens)

    def encode_texts(
        self, ids_BL: Int[Tensor, "B L"], valid_BL: Bool[Tensor, "B L"], *, keep_tokens: bool = False
    ) -> TowerOutput:
        states_BSF = self._once(self.text_states, ids_BL, valid_BL, keep_tokens=keep_tokens)
        return self._embed(states_BSF, self.text_projection, first=1, keep_tokens=keep_tokens)

    @torch.no_grad()
    def _try(self, image: str, text: str) -> None:
        """Raise UserError for a tower whose pooled feature is no vector of its width."""
        given = {"pixel_values": torch.zeros(1, 3, self.image_size, self.image_size)}
        _check_pooled(lambda: self.clip.vision_model(**given), self.image_tower_width, image)
        ids_1L, _ = self.tokenize("a")
        _check_pooled(lambda: self.clip.text_model(input_ids=ids_1L), self.text_tower_width, text)


class Heads(nn.Module, _Projected):
    """The heads of a :class:`TowersEncoder`, which objectives train on states as they train a dual encoder on pixels.

    A view of an image is its states [B S F]; a caption is its states, the pooled one before those of its tokens.
    """

    learned_images = False

    def __init__(self, encoder: TowersEncoder) -> None:
        super().__init__()
        self.visual_projection, self.text_projection = encoder.visual_projection, encoder.text_projection
        self.logit_scale = encoder.logit_scale
        self.dropout = encoder.dropout
        self.width, self.image_size, self.image_tokens = encoder.width, encoder.image_size, encoder.image_tokens
        self.image_tower_width = encoder.image_tower_width

    def recompute_image_activations(self) -> None:
        """Does nothing: no tower is used."""

    def text_positions(self, length: int) -> Float[Tensor, "L D"]:
        """As :meth:`TowersEncoder.text_positions`."""
        return self.logit_scale.new_zeros(length, self.width)

    def encode_images(self, states_BSF: Float[Tensor, "B S F"], *, keep_tokens: bool = False) -> TowerOutput:
        return self._embed(states_BSF, self.visual_projection, first=0, keep_tokens=keep_tokens)

    def encode_texts(
        self, states_BSF: Float[Tensor, "B S F"], valid_BL: Bool[Tensor, "B L"], *, keep_tokens: bool = False
    ) -> TowerOutput:
        return self._embed(states_BSF, self.text_projection, first=1, keep_tokens=keep_tokens)


def _image_states(network: Any, normal_B3HW: Tensor, *, keep_tokens: bool) -> Tensor:
    output = network(pixel_values=normal_B3HW)
    pooled_B1F = output.pooler_output[:, None]
    return torch.cat([pooled_B1F, _cells(output.last_hidden_state)], 1) if keep_tokens else pooled_B1F


def _cells(hidden: Tensor) -> Float[Tensor, "B C F"]:
    """The means of a grid of cells. ``hidden`` is a map [B F H W], or tokens [B N F], those of the patches last."""
    if hidden.ndim == 3:
        side = math.isqrt(hidden.shape[1])
        hidden = hidden[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(hidden, _GRID).flatten(2).transpose(1, 2)


# Building


def _with_width(vision: HubImageEncoder) -> "transformers.PretrainedConfig":
    """The configuration, with the width where `VisionTextDualEncoderModel` looks for it."""
    config: Any = vision.network.config
    if not isinstance(getattr(config, "hidden_size", None), int):
        config.hidden_size = vision.width
    return config


def _adopt(tower: nn.Module, given: dict[str, Tensor], name: str) -> None:
    """Give ``tower`` the weights ``given``. A pooler that these lack leaves the first token nearly as it is.

    Raises UserError where other weights are missing.
    """
    weights = {}
    for key, value in tower.state_dict().items():
        found = next((given[k] for k in (key, f"vision_model.{key}", f"text_model.{key}") if k in given), None)
        if found is None and "pooler." in key:
            found = _NEARLY_LINEAR * torch.eye(*value.shape) if value.ndim == 2 else torch.zeros_like(value)
        if found is None or found.shape != value.shape:
            raise UserError(f"{name}: {type(tower).__name__} needs weights that it does not have ({key}): take another")
        weights[key] = found
    tower.load_state_dict(weights)


def _pooled_as_trained(language: PooledTextEncoder) -> tuple["transformers.PretrainedConfig", dict[str, Tensor]]:
    """Configuration and weights of a text tower whose pooler gives the same features as the encoder's pooling.

    `transformers` pools BERT and its like by a layer on the first token. Where the encoder takes the mean of the
    tokens, the tower gets one more layer, whose attention is the same for all tokens, so that its first token is their
    mean after a LayerNorm. The pooler itself is then left out, as :func:`_adopt` does.
    """
    config, weights = copy.deepcopy(language.network.config), language.network.state_dict()
    first = "encoder.layer.0."
    if language.pooling not in ("mean", "cls") or f"{first}attention.self.query.weight" not in weights:
        return config, weights
    weights = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    if language.pooling == "mean":
        new = f"encoder.layer.{config.num_hidden_layers}."
        config.num_hidden_layers += 1
        layer = {name.removeprefix(first): value for name, value in weights.items() if name.startswith(first)}
        weights |= {new + name: _averaging(name, value) for name, value in layer.items()}
    return config, weights


def _averaging(name: str, like: Tensor) -> Tensor:
    """The weight ``name`` of a layer of BERT that makes each token the mean of all."""
    if name == "attention.self.value.weight":
        return torch.eye(*like.shape)
    if name == "attention.output.dense.weight":
        return _AVERAGE * torch.eye(*like.shape)
    return torch.ones_like(like) if name.endswith("LayerNorm.weight") else torch.zeros_like(like)


def _averaging_layer(network: Any) -> nn.Module | None:
    """The last layer, where it takes the mean."""
    layers: Any = getattr(getattr(network, "encoder", None), "layer", None)
    if layers is None:
        return None
    query = getattr(getattr(getattr(layers[-1], "attention", None), "self", None), "query", None)
    return layers[-1] if query is not None and not query.weight.any() else None


def _check_pooled(run: Callable[[], Any], width: int, name: str) -> None:
    pooled = getattr(run(), "pooler_output", None)
    if pooled is None or pooled.shape != (1, width):
        found = "no pooled feature" if pooled is None else f"a pooled feature {[*pooled.shape]}"
        raise UserError(
            f"{name}: has {found}, where VisionTextDualEncoderModel needs [1, {width}]: "
            "give a ViT, DINOv2, CLIP, ConvNeXt or EfficientNet for images, a BERT, RoBERTa or CLIP for texts"
        )


def _processor(vision: HubImageEncoder, language: PooledTextEncoder) -> Any:
    """The text tokenizer, and a processor of images as of :class:`DualEncoder`: centre square, size, scale."""
    side = {"height": vision.image_size, "width": vision.image_size}
    to_unit = 255 * vision.scale  # this processor makes values in [0, 1] before it normalizes them
    pixels = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": vision.image_size},
        crop_size=side,
        image_mean=(vision.image_mean / to_unit).flatten().tolist(),
        image_std=(vision.image_std / to_unit).flatten().tolist(),
    )
    language.tokenizer.model_max_length = language.length
    return transformers.VisionTextDualEncoderProcessor(pixels, language.tokenizer)
