"""What one training step receives: rows of every stream, and the step's random numbers.

Shapes: B rows of a stream on this process, N image tokens, L text tokens, F width of the frozen text features,
D width of a cached feature vector, H and W pixels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and names, e.g. ``derive_seed(seed, "split", 3)``; equal parts, equal seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of one step, the same however its rows are split over processes.

    Every draw is made for all ``global_rows`` rows of a stream from (seed, step, name) and cut to the rows of this
    process. That is free on one process; on many it buys losses that do not depend on their number.
    """

    seed: int
    step: int
    rank: int = 0
    world: int = 1

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(derive_seed(self.seed, self.step, name))

    def uniform(self, name: str, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1) of shape [rows, *shape], where ``rows`` counts this process's rows."""
        noise = torch.rand(rows * self.world, *shape, generator=self.generator(name, device), device=device)
        return noise[self.rank * rows : (self.rank + 1) * rows]

    def gumbel(self, name: str, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard Gumbel numbers, fp32: lower precisions have too few distinct values."""
        exponential = -torch.log(self.uniform(name, rows, *shape, device=device).clamp_min(1e-20))
        return -torch.log(exponential.clamp_min(1e-20))  # neither end of [0, 1) may give infinity


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
