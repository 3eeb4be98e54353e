"""Pictures as batches of pixels: decoded while training, or from files.

Shapes: B rows, H and W pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from diptych.data.batch import ImageExamples
from diptych.data.scenes.source import ENDLESS, ScenesSource
from diptych.data.skipped import SkippedItems
from diptych.data.sources import Source
from diptych.data.sources.decode import UnreadableImage, decode
from diptych.data.streams import Stream, choose
from diptych.errors import UserError

Chosen = list[tuple[Source, np.ndarray]]
"""Sources and which of their items to use."""


class Pictures:
    """All chosen pictures, counted through, resized to ``size``; kept in memory once read if all fit ``cache_mb``.

    A picture that cannot be read is recorded in ``skips`` and the next one stands in, so that a batch stays a pure
    function of its step.
    """

    def __init__(self, chosen: Chosen, *, size: int, skipped: SkippedItems, cache_mb: int = 0) -> None:
        lengths = np.array([len(items) for _, items in chosen])
        self._chosen, self._size, self._skips = chosen, size, skipped
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self.count = int(self._ends[-1])
        self._kept: np.ndarray | None = None
        if self.count * size * size * 3 <= cache_mb * 2**20:
            self._kept = np.empty((self.count, size, size, 3), np.uint8)  # takes memory as it fills
            self._used = np.full(self.count, -1)

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [B H W 3] at ``index``, and the index of each picture that they really show."""
        # NumPy throughout: torch would start a team of OpenMP threads in each preparing thread, which then spin.
        together = getattr(self._chosen[0][0], "images", None) if len(self._chosen) == 1 else None
        if together and self._kept is None:
            return together(self._chosen[0][1][index], self._size), index
        if self._kept is None:
            read = [self._read(int(i)) for i in index]
            return np.stack([pixels for pixels, _ in read]), np.array([used for _, used in read])
        for i in index[self._used[index] < 0]:
            # Two threads may read the same picture: both write the same.
            self._kept[i], self._used[i] = self._read(int(i))
        return self._kept[index], self._used[index]

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        for attempt in range(self.count):
            place = (index + attempt) % self.count
            part = int(np.searchsorted(self._ends, place, side="right"))
            source, items = self._chosen[part]
            item = int(items[place - self._starts[part]])
            try:
                return source.image(item, self._size), place
            except UnreadableImage as error:
                self._skips.record(source.key(item), error)
                self._skips.check(self.count)
        raise UserError(f"{self._chosen[0][0].name}: no picture can be read")


def pixel_stream(chosen: Chosen, *, size: int, skipped: SkippedItems, flip: bool, seed: int) -> Stream[ImageExamples]:
    """All chosen pictures as one stream, resized to ``size``; every other one mirrored if ``flip``."""
    pictures = Pictures(chosen, size=size, skipped=skipped)

    def take(index: np.ndarray, epoch: np.ndarray) -> ImageExamples:
        pixels, _ = pictures.take(index)
        if flip:
            mirrored = choose(np.full(len(index), 2), index, epoch, seed) == 1
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return ImageExamples(pixels_B3HW=channels_first(pixels))

    return Stream(size=pictures.count, take=take)


def decode_files(files: Sequence[str | Path], *, size: int) -> torch.Tensor:
    """Image files as one batch uint8 [B 3 S S]. Raises UnreadableImage for one that cannot be."""
    return channels_first(np.stack([decode(Path(file), size) for file in files]))


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    """[B H W 3] to a tensor [B 3 H W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def read_captioned(source: Source, *, limit: int | None, size: int) -> tuple[list[int], np.ndarray]:
    """The first ``limit`` readable items that have a caption, and their pixels [B S S 3].

    Raises UserError for a source without images or captions, and when too many images are unreadable.
    """
    if not (source.has_images and source.has_captions):
        raise UserError(f"{source.name}: scores need images and captions, and it does not have both")
    return read_images(source, limit=limit, size=size, wanted=lambda item: bool(source.captions(item)))


def read_images(
    source: Source, *, limit: int | None, size: int, wanted: Callable[[int], bool] = lambda item: True
) -> tuple[list[int], np.ndarray]:
    """The first ``limit`` readable items that are ``wanted``, and their pixels [B S S 3]. Raises as above."""
    if not source.has_images:
        raise UserError(f"{source.name}: has no images")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} images: at least one is needed")
    if isinstance(source, ScenesSource):
        items = list(range(min(len(source), limit or (1000 if len(source) == ENDLESS else len(source)))))
        return items, source.images(items, size)
    skipped, items, pixels = SkippedItems(), [], []
    for item in range(len(source)):
        if limit is not None and len(items) == limit:
            break
        if not wanted(item):
            continue
        try:
            pixels.append(source.image(item, size))
            items.append(item)
        except UnreadableImage as error:
            skipped.record(source.key(item), error)
            skipped.check(len(source))
    if not items:
        raise UserError(f"{source.name}: no image to score")
    return items, np.stack(pixels)
