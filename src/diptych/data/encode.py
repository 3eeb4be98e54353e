"""Images to tokens and texts to ids, ahead of training.

Shapes: B rows, N image tokens, L text tokens, F width of the text features.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from diptych.data.array_writer import ResumableArrayWriter
from diptych.data.pixels import channels_first
from diptych.data.skipped import SkippedItems
from diptych.data.sources import Source
from diptych.data.sources.decode import UnreadableImage
from diptych.data.store import MANIFEST, Store
from diptych.errors import UserError

_CHUNK = 512
"""Examples encoded between two points to which an interrupted run returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTokenizers:
    """What turns pixels into tokens and texts into ids. None leaves that side out."""

    image_size: int = 0
    tokens: Callable[[Tensor], Tensor] | None = None
    """uint8 pixels [B 3 H W] to tokens [B N]."""
    ids: Callable[[list[str]], Tensor] | None = None
    """Texts to ids [B L], padded with 0."""
    features: Callable[[Tensor], Tensor] | None = None
    """Ids to frozen features [B L F], to be stored in half precision."""
    fingerprint: str = ""
    """Tells these coders from others; a store of other coders is not to be mixed in."""


def encode(
    source: Source,
    out: Path,
    tokenizers: DataTokenizers,
    *,
    indices: np.ndarray | None = None,
    max_skipped_share: float = 0.01,
    workers: int = 2,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """Encode ``indices`` (default: all) of a source into the folder ``out``, which appears when it is complete.

    An interrupted call with the same arguments goes on where it stopped. Unreadable images are left out, counted and
    listed in ``skipped.jsonl``; more than ``max_skipped_share`` of them raise UserError. So does an ``out`` that holds
    anything but encoded data, which alone is replaced.
    """
    if out.exists() and not Store.is_one(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and holds no encoded data: choose another folder")
    chosen = np.arange(len(source)) if indices is None else indices
    writer = ResumableArrayWriter(out, origin(source, tokenizers, chosen))
    skipped = SkippedItems(max_skipped_share=max_skipped_share, reasons=writer.skipped)
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in range(writer.done, len(chosen), _CHUNK):
            items = chosen[begin : begin + _CHUNK]
            arrays, keys = _encode_chunk(source, items, tokenizers, skipped, threads)
            writer.append(arrays, keys=keys, done=begin + len(items))
            skipped.check(len(chosen))
            advance(begin + len(items), len(chosen))
    skipped.check(len(chosen))
    if writer.items == 0:
        raise UserError(f"{source.name}: nothing to encode")
    manifest = {name: writer.state[name] for name in ("made_by", "items", "arrays")}
    return writer.finish(MANIFEST, manifest | {"skipped": len(skipped)}, Store.open)


def origin(source: Source, tokenizers: DataTokenizers, indices: np.ndarray) -> dict[str, str]:
    """What a store is made of, as its manifest tells it under ``made_by``."""
    digest = hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()[:16]
    return {"source": source.name, "coders": tokenizers.fingerprint, "chosen": digest}


def _encode_chunk(
    source: Source, items: np.ndarray, tokenizers: DataTokenizers, skipped: SkippedItems, threads: ThreadPoolExecutor
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of the chunk, integers in four bytes, and the keys of its readable items."""
    arrays: dict[str, np.ndarray] = {}
    if tokenizers.tokens is not None:
        pixels, items = read_pictures(source, items, tokenizers.image_size, skipped, threads)
        if len(items):
            arrays["tokens"] = tokenizers.tokens(channels_first(pixels)).cpu().numpy().astype(np.int32)
    if tokenizers.ids is not None:
        captions = [source.captions(int(item)) for item in items]
        arrays["counts"] = np.array([len(texts) for texts in captions], np.int32)
        texts = [text for group in captions for text in group]
        if texts:
            ids = tokenizers.ids(texts)
            arrays["ids"] = ids.cpu().numpy().astype(np.int32)
            if tokenizers.features is not None:
                arrays["features"] = tokenizers.features(ids).half().cpu().numpy()
    return arrays, [source.key(int(item)) for item in items]


def read_pictures(
    source: Source, items: np.ndarray, size: int, skipped: SkippedItems, threads: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [B H W 3] of the readable items, and those items."""
    together = getattr(source, "images", None)
    if together is not None:  # sources that draw their pictures do it faster in one go
        return together(items, size), items

    def read(item: int) -> np.ndarray | None:
        try:
            return source.image(item, size)
        except UnreadableImage as error:
            skipped.record(source.key(item), error)
            return None

    pictures = list(threads.map(read, (int(item) for item in items)))
    readable = np.array([picture is not None for picture in pictures], bool)
    kept = [picture for picture in pictures if picture is not None]
    return (np.stack(kept) if kept else np.empty((0, size, size, 3), np.uint8)), items[readable]


def picture_batches(
    source: Source, items: np.ndarray, *, size: int, skipped: SkippedItems, workers: int = 2, rows: int = _CHUNK
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The readable pictures of ``items`` as uint8 [B 3 H W], at most ``rows`` at a time, and the items they are.

    The others are recorded in ``skips``, whose tolerance is checked on the way.
    """
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in range(0, len(items), rows):
            pixels, found = read_pictures(source, items[begin : begin + rows], size, skipped, threads)
            skipped.check(len(items))
            if len(found):
                yield channels_first(pixels), found
