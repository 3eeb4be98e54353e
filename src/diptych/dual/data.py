"""Pictures with their captions as one stream: what dual encoders learn from.

Shapes: B rows, M captions of a row, L tokens of a caption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diptych.data.batch import CaptionedImageExamples
from diptych.data.pixels import CachedImages, SkippedItems, channels_first
from diptych.data.sources import Source
from diptych.data.splits import Subset
from diptych.data.streams import Stream, choose
from diptych.errors import UserError

_AT_ONCE = 4096

Tokenize = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts to ids, not padded."""


@dataclass(frozen=True, slots=True)
class CaptionIds:
    """The captions of many items as ids, end to end: some 50 bytes a caption."""

    items: np.ndarray
    """CaptionedImageExamples of the source that have captions."""
    first: np.ndarray
    """Number of each item's first caption, and one more for the end."""
    starts: np.ndarray
    """Where each caption begins in ``ids``, and one more for the end."""
    ids: np.ndarray

    @classmethod
    def read(cls, source: Source, items: np.ndarray, tokenize: Tokenize) -> "CaptionIds":
        """Raises UserError when no item has a caption."""
        counts, lengths, flat = [], [], []
        waiting: list[str] = []

        def tokenize_waiting() -> None:
            for row in tokenize(waiting) if waiting else []:
                lengths.append(len(row))
                flat.append(np.asarray(row, np.int32))
            waiting.clear()

        for item in items:
            captions = source.captions(int(item))
            counts.append(len(captions))
            waiting += captions
            if len(waiting) >= _AT_ONCE:
                tokenize_waiting()
        tokenize_waiting()
        if not flat:
            raise UserError(f"{source.name}: no item has a caption")
        count = np.array(counts)
        first, starts = (np.concatenate([[0], np.cumsum(sizes)]) for sizes in (count[count > 0], lengths))
        return cls(items[count > 0], first, starts, np.concatenate(flat))

    def take(
        self, index: np.ndarray, epoch: np.ndarray, *, captions: int, seed: int, pad: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and validity [B, M L] of ``captions`` of each item, drawn anew for each epoch, all different where there are enough."""
        count = np.diff(self.first)[index]
        chosen_BM = choose(count, index, epoch, seed)[:, None] + np.arange(captions)
        number_N = (self.first[index][:, None] + chosen_BM % count[:, None]).ravel()
        start_N, end_N = self.starts[number_N], self.starts[number_N + 1]
        valid_NL = np.arange((end_N - start_N).max()) < (end_N - start_N)[:, None]
        ids_NL = np.full(valid_NL.shape, pad, np.int64)
        ids_NL[valid_NL] = np.concatenate([self.ids[a:b] for a, b in zip(start_N, end_N, strict=True)])
        rows = len(index)
        return torch.from_numpy(ids_NL.reshape(rows, -1)), torch.from_numpy(valid_NL.reshape(rows, -1))


def pair_stream(
    source: Source,
    captions: CaptionIds,
    *,
    size: int,
    per_image: int,
    pad: int,
    skipped: SkippedItems,
    cache_mb: int,
    seed: int,
) -> Stream:
    """Every captioned picture once an epoch, with ``per_image`` of its captions side by side: ids [B, M L]."""
    images = CachedImages([Subset(source, captions.items)], size=size, skipped=skipped, cache_mb=cache_mb)

    def take(index: np.ndarray, epoch: np.ndarray) -> CaptionedImageExamples:
        pixels, index = images.take(index)  # an image that stands in brings its own captions
        ids_BL, valid_BL = captions.take(index, epoch, captions=per_image, seed=seed, pad=pad)
        return CaptionedImageExamples(pixels_B3HW=channels_first(pixels), ids_BL=ids_BL, valid_BL=valid_BL)

    return Stream(size=images.count, take=take)
