"""The batch of one training step: examples of every stream, and the step's random numbers.

Shapes: B rows of a stream on this process, N image tokens, L text tokens, F width of features, G width of a pretrained
encoder's image features, T width of a teacher's, S positions of a feature sequence, D width of a feature vector, H and
W pixels, V views of an image, M captions of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from diptych.errors import UserError
from diptych.rng import StepRNG


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Rows of one stream, which the first axis of every field runs over. Each kind of stream has a class of its own."""

    def __len__(self) -> int:
        return len(next(iter(self._tensors().values())))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return replace(self, **{name: value[rows] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        pairs = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in pairs if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageExamples(Examples):
    """Images as pixels."""

    pixels_B3HW: UInt8[Tensor, "B 3 H W"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenExamples(Examples):
    """Images as tokens of the image tokenizer."""

    tokens_BN: Int[Tensor, "B N"]
    image_features_BG: Float[Tensor, "B G"] | None = None
    """Features of a pretrained image encoder; None where the run has none."""
    teacher_features_BT: Float[Tensor, "B T"] | None = None
    """Features of the vision model that teaches the encoder; None where the run has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextExamples(Examples):
    """Texts as ids of the text tokenizer."""

    ids_BL: Int[Tensor, "B L"]
    """They end in `</s>` and are padded with 0."""
    valid_BL: Bool[Tensor, "B L"]
    """True where an id is real, False where it is padding."""
    features_BLF: Float[Tensor, "B L F"] | None = None
    """Cached features of the frozen text encoder; None where the objective is to compute them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExamples(Examples):
    """Image tokens with the ids of one caption each; fields as in `ImageTokenExamples` and `TextExamples`."""

    tokens_BN: Int[Tensor, "B N"]
    ids_BL: Int[Tensor, "B L"]
    valid_BL: Bool[Tensor, "B L"]
    features_BLF: Float[Tensor, "B L F"] | None = None
    image_features_BG: Float[Tensor, "B G"] | None = None
    teacher_features_BT: Float[Tensor, "B T"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImageExamples(Examples):
    """Pixels with the ids of one or several captions each, for dual encoders."""

    pixels_B3HW: UInt8[Tensor, "B 3 H W"]
    ids_BL: Int[Tensor, "B L"]
    """The M captions of an image side by side, each padded to the same number of tokens: L is M times that number."""
    valid_BL: Bool[Tensor, "B L"]
    """True where an id is real, False where it is padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedStateExamples(Examples):
    """What frozen towers make of images and of their captions, for the heads of a dual encoder."""

    images_BVSF: Float[Tensor, "B V S F"]
    """States of the V views of an image: its pooled feature, then S - 1 cells."""
    texts_BMLF: Float[Tensor, "B M L E"]
    """States of M captions: the pooled feature, then those of the tokens; zero at padding."""
    valid_BML: Bool[Tensor, "B M K"]
    """Which tokens are valid; K is L - 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledImageExamples(Examples):
    """Pixels with the index of a class each."""

    pixels_B3HW: UInt8[Tensor, "B 3 H W"]
    labels_B: Int[Tensor, "B"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledVectorExamples(Examples):
    """Cached feature vectors of any modality, with the index of a class each."""

    vectors_BD: Float[Tensor, "B D"]
    labels_B: Int[Tensor, "B"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceExamples(Examples):
    """Sequences of features: of the tokens of an image or a text, or of the frames of audio."""

    features_BSF: Float[Tensor, "B S F"]
    valid_BS: Bool[Tensor, "B S"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The examples of each stream at one step. An objective knows which class of examples each of its streams holds."""

    rng: StepRNG
    streams: Mapping[str, Any]
    """Name of a stream -> its `Examples`."""

    def __getitem__(self, stream: str) -> Any:
        return self.streams[stream]

    def to(self, device: torch.device | str) -> Self:
        return replace(self, streams={name: examples.to(device) for name, examples in self.streams.items()})


def count_rows(batch: Batch) -> int:
    """Rows of all streams together."""
    return sum(len(examples) for examples in batch.streams.values())


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut every stream of ``batch`` into ``parts`` equal runs of rows.

    A micro-batch has the random numbers of one more process: part i of rank r in a world of w is rank r * parts + i
    in a world of w * parts. So every row keeps its numbers.

    Raises:
        UserError: a stream's rows do not divide by ``parts``.
    """
    if parts == 1:
        return [batch]
    streams = batch.streams
    for name, examples in streams.items():
        if len(examples) % parts:
            raise UserError(
                f"train.grad_accum_steps is {parts}, but a process gets {len(examples)} rows of {name}, "
                "which do not divide by it; change train.grad_accum_steps or train.batch_size."
            )
    rng = batch.rng
    return [
        Batch(
            rng=replace(rng, rank=rng.rank * parts + part, world=rng.world * parts),
            streams={name: _part(examples, part, parts) for name, examples in streams.items()},
        )
        for part in range(parts)
    ]


def _part(examples: Examples, part: int, parts: int) -> Examples:
    rows = len(examples) // parts
    return examples[part * rows : (part + 1) * rows]
