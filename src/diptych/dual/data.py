"""Images with their captions: what dual encoders learn from.

Shapes: B rows, M captions of a row, L tokens of a caption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diptych.data.batch import CaptionedImageExamples
from diptych.data.pixels import CachedImages, SkippedItems, channels_first, shard_order
from diptych.data.sources import Source
from diptych.data.sources.columns import Columns
from diptych.data.splits import Subset
from diptych.data.streams import Stream, choose
from diptych.errors import UserError

_AT_ONCE = 4096
"""Number of captions tokenized at once."""

Tokenize = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts to ids, not padded."""


@dataclass(kw_only=True, slots=True)
class PairsData:
    """Sources of the captioned images, and how they are read."""

    pairs: str
    """Captioned images to learn from: folder, table, tars, hub:owner/name or scenes:."""
    valid: str | None = None
    """Captioned images on which retrieval is measured while training."""
    valid_images: int = 1000
    """Number of images that retrieval is measured on: the first ones of `valid`, as by `diptych evaluate --limit`."""
    columns: Columns = field(default_factory=Columns)
    """Names of table columns that cannot be guessed."""
    decode_size: int | None = None
    """Side of decoded images, in pixels; views are cropped from these. Not given: 1.5 times the side of a view, for
    frozen towers just that side."""
    cache: Path | None = None
    """Folder for the features of frozen towers, which runs may share; if not given, one in the run folder."""
    cache_mb: int = 1024
    """Memory for decoded images, in MB. They are kept only if all of them fit."""
    shards_together: int = 0
    """Number of tars that are shuffled together, so that a step reads few of them; 0 shuffles all images together."""
    max_skipped_share: float = 0.01
    """Largest share of unreadable images that is left out without stopping, 0 to 1."""


@dataclass(frozen=True, slots=True)
class CaptionIds:
    """The captions of many items as ids, end to end: some 50 bytes for each caption."""

    items: np.ndarray
    """Items of the source that have captions."""
    first: np.ndarray
    """Number of each item's first caption, and one more entry for the end."""
    starts: np.ndarray
    """Where each caption begins in ``ids``, and one more entry for the end."""
    ids: np.ndarray

    @classmethod
    def read(cls, source: Source, items: np.ndarray, tokenize: Tokenize) -> "CaptionIds":
        """Tokenize all captions of ``items``. Raises UserError when no item has a caption."""
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

    def in_random_order(self) -> "CaptionIds":
        """The same with the items in a random order, which is always the same."""
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(self.items))
        numbers = np.concatenate([np.arange(self.first[item], self.first[item + 1]) for item in order])
        first, starts = (
            np.concatenate([[0], np.cumsum(sizes)])
            for sizes in (np.diff(self.first)[order], np.diff(self.starts)[numbers])
        )
        ids = np.concatenate([self.ids[self.starts[number] : self.starts[number + 1]] for number in numbers])
        return CaptionIds(self.items[order], first, starts, ids)

    def choose(self, index: np.ndarray, epoch: np.ndarray, *, captions: int, seed: int) -> np.ndarray:
        """Numbers [B, M] of ``captions`` captions of each item.

        They are drawn anew in each epoch, and all different where the item has enough.
        """
        count = np.diff(self.first)[index]
        chosen_BM = choose(count, index, epoch, seed)[:, None] + np.arange(captions)
        return self.first[index][:, None] + chosen_BM % count[:, None]

    def padded(self, number_N: np.ndarray, *, pad: int) -> tuple[Tensor, Tensor]:
        """Ids and validity [N, L] of captions by their numbers; L is the length of the longest."""
        start_N, end_N = self.starts[number_N], self.starts[number_N + 1]
        valid_NL = np.arange((end_N - start_N).max()) < (end_N - start_N)[:, None]
        ids_NL = np.full(valid_NL.shape, pad, np.int64)
        ids_NL[valid_NL] = np.concatenate([self.ids[a:b] for a, b in zip(start_N, end_N, strict=True)])
        return torch.from_numpy(ids_NL), torch.from_numpy(valid_NL)

    def take(
        self, index: np.ndarray, epoch: np.ndarray, *, captions: int, seed: int, pad: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and validity [B, M L] of ``captions`` captions of each item, as :meth:`choose` draws them."""
        number_N = self.choose(index, epoch, captions=captions, seed=seed).ravel()
        ids_NL, valid_NL = self.padded(number_N, pad=pad)
        return ids_NL.reshape(len(index), -1), valid_NL.reshape(len(index), -1)


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
    shards_together: int = 0,
) -> Stream[CaptionedImageExamples]:
    """Every captioned image once an epoch, resized to ``size``, with ``per_image`` of its captions side by side.

    The captions of a row are ids [B, M L], padded with ``pad``. ``shards_together`` is as in `shard_order`, and raises
    UserError as there.
    """
    subset = Subset(source, captions.items)
    images = CachedImages([subset], size=size, skipped=skipped, cache_mb=cache_mb)

    def take(index: np.ndarray, epoch: np.ndarray) -> CaptionedImageExamples:
        pixels, index = images.take(index)  # an image that replaces an unreadable one brings its own captions
        ids_BL, valid_BL = captions.take(index, epoch, captions=per_image, seed=seed, pad=pad)
        return CaptionedImageExamples(pixels_B3HW=channels_first(pixels), ids_BL=ids_BL, valid_BL=valid_BL)

    return Stream(size=images.count, take=take, shards=shard_order([subset], shards_together))
