"""What one training step receives: rows of every stream, and the step's random numbers.

Shapes: B rows of a stream on this process, N image tokens, L text tokens, F width of the frozen text features,
D width of a cached feature vector, H and W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from diptych.rng import Draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Rows of one stream. A field is None where the stream does not carry it."""

    pixels_B3HW: UInt8[Tensor, "B 3 H W"] | None = None
    tokens_BN: Int[Tensor, "B N"] | None = None
    ids_BL: Int[Tensor, "B L"] | None = None
    """Text ids ending in `</s>`, padded with 0."""
    valid_BL: Bool[Tensor, "B L"] | None = None
    features_BLF: Float[Tensor, "B L F"] | None = None
    """Cached features of the frozen text encoder; None means: compute them."""
    vectors_BD: Float[Tensor, "B D"] | None = None
    """One cached feature vector for each item."""
    labels_B: Int[Tensor, "B"] | None = None

    # The same fields for an objective that cannot do without them.

    @property
    def tokens(self) -> Int[Tensor, "B N"]:
        assert self.tokens_BN is not None
        return self.tokens_BN

    @property
    def ids(self) -> Int[Tensor, "B L"]:
        assert self.ids_BL is not None
        return self.ids_BL

    @property
    def valid(self) -> Bool[Tensor, "B L"]:
        assert self.valid_BL is not None
        return self.valid_BL

    def __len__(self) -> int:
        return next(len(value) for value in self._present().values())

    def _present(self) -> dict[str, Tensor]:
        pairs = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in pairs if value is not None}

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in self._present().items()})

    def __getitem__(self, rows: slice) -> Self:
        return replace(self, **{k: v[rows] for k, v in self._present().items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's rows of each stream. ``pairs`` carries both sides, ``images`` and ``texts`` one."""

    draws: Draws
    pairs: Items | None = None
    images: Items | None = None
    texts: Items | None = None
    labelled: Items | None = None
    more: Mapping[str, Items] = field(default_factory=dict)
    """Streams of any other name, e.g. one for each modality of UML."""

    @classmethod
    def of(cls, draws: Draws, streams: Mapping[str, Items]) -> Self:
        usual = {name: streams[name] for name in _USUAL if name in streams}
        return cls(draws=draws, more={k: v for k, v in streams.items() if k not in usual}, **usual)

    @property
    def streams(self) -> dict[str, Items]:
        """All streams that the batch has, by name."""
        usual = {name: items for name in _USUAL if (items := getattr(self, name)) is not None}
        return usual | dict(self.more)

    def to(self, device: torch.device | str) -> Self:
        return self.of(self.draws, {name: items.to(device) for name, items in self.streams.items()})


_USUAL = ("pairs", "images", "texts", "labelled")
