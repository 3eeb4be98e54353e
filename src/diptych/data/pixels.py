"""Images as pixels: read from sources, with the unreadable ones skipped and counted, or from files.

One unreadable image among thousands must not stop a run, and must not vanish in silence either: every loop over images
goes through `read_image`, which records in `SkippedItems` what it cannot read.

Shapes: B images, S pixels of a side.
"""

import io
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from diptych.data.batch import ImageExamples
from diptych.data.scenes import ENDLESS, ScenesSource
from diptych.data.sources import Source, require_pairs
from diptych.data.sources.columns import is_address
from diptych.data.sources.decode import UnreadableImage, decode
from diptych.data.sources.open import HasShards
from diptych.data.splits import Subset, at
from diptych.data.streams import ShardOrder, Stream, choose
from diptych.errors import UserError
from diptych.io import write_bytes

_ROWS = 512
"""Images read at once where a caller does not say how many."""


@dataclass(kw_only=True, slots=True)
class SkippedItems:
    """The items that were left out, and why. Any thread may record one."""

    max_skipped_share: float = 0.01
    """Share of unreadable items that is tolerated, 0 to 1."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Key of each skipped item -> the reason."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self.reasons)

    def record(self, key: str, error: Exception | str) -> None:
        with self._lock:
            self.reasons[key] = str(error)

    def check(self, total: int) -> None:
        """Raise UserError when more than the tolerated share of ``total`` items is skipped, or every one of them.

        With the total known, it may be called at any time: the share only grows.
        """
        count = len(self)
        if count == 0 or (count < total and count <= self.max_skipped_share * total):
            return
        first = "; ".join(sorted(self.reasons.values())[:3])
        more = f"; and {count - 3} more" if count > 3 else ""
        raise UserError(
            f"{count} of {total} items are unreadable, over the tolerated {self.max_skipped_share:.1%}: {first}{more}; "
            "mend or remove them, or raise max-skipped-share where the command has it"
        )

    def write(self, path: Path) -> None:
        """Write one JSON object {key, reason} a line, in the order of the keys, atomically."""
        lines = [json.dumps({"key": key, "reason": self.reasons[key]}) + "\n" for key in sorted(self.reasons)]
        write_bytes(path, "".join(lines).encode())

    def report(self, path: Path) -> list[str]:
        """A line for the user about what is skipped, after it is written to ``path``; nothing where nothing is."""
        if not len(self):
            return []
        self.write(path)
        first = min(self.reasons.values())
        return [f"{len(self)} images cannot be read, listed in {path}; the first: {first}"]


def read_image(source: Source, item: int, *, size: int, skipped: SkippedItems) -> UInt8[np.ndarray, "S S 3"] | None:
    """The pixels of one image, or None and a record in ``skipped`` where it cannot be read."""
    try:
        return source.image(item, size)
    except UnreadableImage as error:
        skipped.record(source.key(item), error)
        return None


def read_images(
    source: Source, items: np.ndarray, *, size: int, skipped: SkippedItems, threads: Executor
) -> tuple[UInt8[np.ndarray, "B S S 3"], np.ndarray]:
    """Pixels of the readable ones of ``items``, and those items [B]. Whether too many are unreadable is not checked."""
    if isinstance(source, ScenesSource):  # it draws many images at once a hundred times faster
        return source.images(items, size), items
    images = list(threads.map(lambda item: read_image(source, int(item), size=size, skipped=skipped), items))
    readable = np.array([image is not None for image in images], bool)
    kept = [image for image in images if image is not None]
    return (np.stack(kept) if kept else np.empty((0, size, size, 3), np.uint8)), items[readable]


def read_block(
    source: Source, items: np.ndarray, *, size: int, workers: int = 2
) -> tuple[UInt8[np.ndarray, "B S S 3"], np.ndarray, dict[str, str]]:
    """Pixels of the readable ones of ``items``, those items [B], and why the others, by their keys, are left out."""
    skipped = SkippedItems()
    with ThreadPoolExecutor(max(1, workers)) as threads:
        return *read_images(source, items, size=size, skipped=skipped, threads=threads), skipped.reasons


def image_batches(
    source: Source,
    items: np.ndarray | range,
    *,
    size: int,
    skipped: SkippedItems,
    workers: int = 2,
    rows: int = _ROWS,
) -> Iterator[tuple[UInt8[Tensor, "B 3 S S"], np.ndarray]]:
    """The readable ones of ``items`` in batches of at most ``rows``: pixels, and the items [B] that they show.

    Raises UserError as soon as too many of ``items`` are unreadable.
    """
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in range(0, len(items), rows):
            pixels, found = read_images(
                source, np.asarray(items[begin : begin + rows]), size=size, skipped=skipped, threads=threads
            )
            skipped.check(len(items))
            if len(found):
                yield channels_first(pixels), found


class ReadableImages:
    """The readable ones of ``items``, read as :func:`image_batches` does, as often as it is iterated over.

    They stay in memory after the first time if all of them fit into ``cache_mb``. Each score reads its images through
    this class or :func:`read_first_images`: in training and afterwards alike.
    """

    def __init__(
        self,
        source: Source,
        items: np.ndarray | range,
        *,
        size: int,
        skipped: SkippedItems,
        rows: int,
        workers: int = 2,
        cache_mb: int = 0,
    ) -> None:
        self.source, self.items = source, items
        self._read = lambda: image_batches(source, items, size=size, skipped=skipped, workers=workers, rows=rows)
        self._keep = len(items) * size * size * 3 <= cache_mb * 2**20
        self._kept: list[tuple[Tensor, np.ndarray]] | None = None

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "B 3 S S"], np.ndarray]]:
        """Pixels, and the items [B] that they show. Raises UserError when too many are unreadable."""
        if self._kept is None and self._keep:
            self._kept = list(self._read())
        return iter(self._kept) if self._kept is not None else self._read()


def read_first_images(
    source: Source,
    *,
    limit: int | None,
    size: int,
    skipped: SkippedItems,
    wanted: Callable[[int], bool] = lambda item: True,
) -> tuple[list[int], UInt8[np.ndarray, "B S S 3"]]:
    """The first ``limit`` readable items that are ``wanted``, and their pixels.

    Without a limit all of them, of endless scenes the first 1000. Raises UserError for a source without such images,
    and when too many of those that were looked at are unreadable.
    """
    if not source.has_images:
        raise UserError(f"{source.name}: has no images")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} images: at least one is needed")
    if limit is None:
        limit = 1000 if isinstance(source, ScenesSource) and len(source) == ENDLESS else len(source)
    candidates = (item for item in range(len(source)) if wanted(item))
    items: list[int] = []
    looked_at = 0
    pixels: list[np.ndarray] = []
    with ThreadPoolExecutor(2) as threads:
        # As many are read as are still missing, so that no image behind the last one needed is looked at.
        while chunk := list(itertools.islice(candidates, min(_ROWS, limit - len(items)))):
            some, readable = read_images(source, np.array(chunk), size=size, skipped=skipped, threads=threads)
            skipped.check(len(source))
            items += readable.tolist()
            pixels.append(some)
            looked_at += len(chunk)
    skipped.check(looked_at)
    if not items:
        raise UserError(f"{source.name}: no image to score")
    return items, np.concatenate(pixels)


def captioned_items(source: Source) -> Int[np.ndarray, "N"]:
    """Numbers of the items that have a caption, ascending."""
    return np.array([item for item in range(len(source)) if source.captions(item)], dtype=np.int64)


def paired_items(source: Source) -> Int[np.ndarray, "N"]:
    """As :func:`captioned_items`. Raises UserError for a source without images and where none has a caption."""
    require_pairs(source, source.name)
    items = captioned_items(source)
    if not len(items):
        raise UserError(f"{source.name}: none of its images has a caption")
    return items


def read_captioned(
    source: Source, *, limit: int | None, size: int, skipped: SkippedItems
) -> tuple[list[int], UInt8[np.ndarray, "B S S 3"]]:
    """The first ``limit`` readable items that have a caption, and their pixels. Raises as `read_first_images`."""
    require_pairs(source, source.name)
    return read_first_images(
        source, limit=limit, size=size, skipped=skipped, wanted=lambda item: bool(source.captions(item))
    )


class CachedImages:
    """The images of one or several subsets, numbered through and resized to ``size``.

    They are kept in memory once they are read, if all of them fit into ``cache_mb``. An image that cannot be read is
    recorded in ``skipped`` and the next readable one stands in, so that a batch stays a pure function of its step.
    """

    def __init__(
        self, subsets: Sequence[Subset[Source]], *, size: int, skipped: SkippedItems, cache_mb: int = 0
    ) -> None:
        lengths = np.array([len(subset.items) for subset in subsets])
        self._subsets, self._size, self._skipped = subsets, size, skipped
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self.count = int(self._ends[-1])
        self._cache: np.ndarray | None = None
        if self.count * size * size * 3 <= cache_mb * 2**20:
            self._cache = np.empty((self.count, size, size, 3), np.uint8)  # takes memory as it fills
            self._shown = np.full(self.count, -1)

    def take(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [B S S 3] at ``index`` [B], and the index [B] of the image that each row really shows."""
        # NumPy throughout: torch would start a team of OpenMP threads in each preparing thread, which then spin.
        if self._cache is None:
            source = self._subsets[0].source
            if len(self._subsets) == 1 and isinstance(source, ScenesSource):
                return source.images(at(self._subsets[0].items, index), self._size), index
            read = [self._read(int(i)) for i in index]
            return np.stack([pixels for pixels, _ in read]), np.array([shown for _, shown in read])
        for i in index[self._shown[index] < 0]:
            # Two threads may read the same image: both write the same.
            self._cache[i], self._shown[i] = self._read(int(i))
        return self._cache[index], self._shown[index]

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        for attempt in range(self.count):
            place = (index + attempt) % self.count
            number = int(np.searchsorted(self._ends, place, side="right"))
            subset = self._subsets[number]
            item = int(subset.items[place - self._starts[number]])
            pixels = read_image(subset.source, item, size=self._size, skipped=self._skipped)
            if pixels is not None:
                return pixels, place
            self._skipped.check(self.count)
        raise UserError(f"{self._subsets[0].source.name}: no image can be read")


def shard_order(subsets: Sequence[Subset[Source]], together: int) -> ShardOrder | None:
    """The order of a stream of the subsets' items in turn that shuffles ``together`` shards at a time; None for 0.

    Raises UserError for a source without shards.
    """
    if together < 0:
        raise UserError(f"shards-together {together}: it must be 0 (shuffle all items together) or a number of tars")
    if not together:
        return None
    ends: list[np.ndarray] = []
    for subset in subsets:
        if not isinstance(subset.source, HasShards):
            raise UserError(f"{subset.source.name}: shards-together is for tars: leave it out")
        last = np.flatnonzero(np.diff(subset.source.shards[subset.items], append=-1))
        ends.append(last + 1 + (int(ends[-1][-1]) if ends else 0))
    return ShardOrder(np.concatenate(ends), together)


def pixel_stream(
    subsets: Sequence[Subset[Source]],
    *,
    size: int,
    skipped: SkippedItems,
    flip: bool,
    seed: int,
    shards_together: int = 0,
) -> Stream[ImageExamples]:
    """All images of the subsets as one stream, resized to ``size``; each mirrored with probability 1/2 if ``flip``.

    ``shards_together`` is as in :func:`shard_order`, and raises UserError as there.
    """
    images = CachedImages(subsets, size=size, skipped=skipped)

    def take(index: np.ndarray, epoch: np.ndarray) -> ImageExamples:
        pixels, _ = images.take(index)
        if flip:
            mirrored = choose(np.full(len(index), 2), index, epoch, seed) == 1
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return ImageExamples(pixels_B3HW=channels_first(pixels))

    return Stream(size=images.count, take=take, shards=shard_order(subsets, shards_together))


def decode_files(files: Sequence[str | Path], *, size: int) -> UInt8[Tensor, "B 3 S S"]:
    """Image files as one batch. Raises UnreadableImage for one that cannot be read."""
    return channels_first(np.stack([decode(Path(file), size) for file in files]))


ImageLike = str | Path | bytes | Image.Image | np.ndarray
"""A path, the bytes of an image file, a Pillow image, or uint8 pixels [H W 3]."""


def to_pixels(image: Any, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The centre square of an ``ImageLike``, resized to ``size``. A Pillow image gives what its file would give.

    Raises UserError for arrays of another kind and for what is no image, and UnreadableImage for images that cannot be
    used.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UserError(f"an image of {image.dtype} {image.shape}: give uint8 [height, width, 3]")
        if image.shape[:2] == (size, size):
            return image
        return decode(Image.fromarray(image), size)
    if not isinstance(image, str | Path | bytes | Image.Image):
        raise UserError(
            f"an image of the type {type(image).__name__}: give a path, the bytes of a file, a Pillow image, or uint8 "
            "[height, width, 3] as a NumPy array"
        )
    if isinstance(image, str) and is_address(image):
        raise UserError(f"{image}: web addresses are not fetched; download the image first")
    return decode(Path(image) if isinstance(image, str) else image, size)


def one_or_more(images: Any) -> list[Any]:
    """A list of images, also of a single one; :func:`to_pixels` sees what they are. An array with four axes is a list
    of its rows."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "biuf":
        return [images] if images.ndim < 4 else list(images)
    if isinstance(images, str | Path | bytes | Image.Image | io.IOBase | Mapping) or not isinstance(images, Iterable):
        return [images]
    return list(images)


def check_batch(images: Tensor, size: int) -> None:
    """Raise UserError for a tensor that is not uint8 [B 3 size size]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise UserError(
            f"images of {images.dtype} {tuple(images.shape)}: give uint8 [images, 3, {size}, {size}], or a list of "
            "NumPy arrays uint8 [height, width, 3] of any size"
        )


def channels_first(pixels: np.ndarray) -> Tensor:
    """[B H W 3] to a tensor [B 3 H W]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
