"""Encoding ahead of training: images to tokens and texts to ids, as a `Store`.

Shapes: B rows, N image tokens, L text tokens, F width of the text features, G width of the image features,
S pixels of a side.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from diptych.data.check import content_digest
from diptych.data.pixels import SkippedItems, channels_first, read_images
from diptych.data.sources import Source
from diptych.data.store import STORE_MANIFEST, STORE_VERSION, ResumableArrayWriter, Store
from diptych.errors import UserError

_CHUNK = 512
"""Items encoded between two points at which an interrupted run goes on."""
_DIGESTED = 2**20
"""Indices of items that are digested at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTokenizers:
    """The functions that turn pixels into tokens and texts into ids. None leaves that side out."""

    image_size: int = 0
    """Pixels of a side S of the images that ``tokenize_images`` and ``image_features`` take."""
    tokenize_images: Callable[[Tensor], Tensor] | None = None
    """uint8 pixels [B 3 S S] to tokens [B N]."""
    image_features: Callable[[Tensor], Tensor] | None = None
    """uint8 pixels [B 3 S S] to features of a pretrained encoder [B G], which are stored in half precision. They need
    ``tokenize_images`` beside them."""
    teacher_size: int = 0
    """Pixels of a side of the images that ``teacher_features`` takes. They are read apart, so that the tokens of an
    image do not depend on a teacher."""
    teacher_features: Callable[[Tensor], Tensor] | None = None
    """uint8 pixels [B 3 H W] to features of the model that teaches [B T], which are stored in half precision. They need
    ``tokenize_images`` beside them."""
    tokenize_texts: Callable[[list[str]], Tensor] | None = None
    """Texts to ids [B L], padded with 0."""
    text_features: Callable[[Tensor], Tensor] | None = None
    """Ids [B L] to features of the frozen text encoder [B L F], which are stored in half precision."""
    fingerprint: str = ""
    """Differs for other weights or settings. Data of different fingerprints must not be mixed."""


def encode(
    source: Source,
    out: Path,
    tokenizers: DataTokenizers,
    *,
    indices: np.ndarray | range | None = None,
    max_skipped_share: float = 0.01,
    workers: int = 2,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """Encode ``indices`` (default: all) of a source into the folder ``out``, which appears when it is complete.

    An interrupted call with the same arguments goes on where it stopped. Unreadable images are left out, counted and
    listed in ``skipped.jsonl``; more than ``max_skipped_share`` of them raise UserError. So does an ``out`` that holds
    anything but encoded data; encoded data is replaced.

    Args:
        source: Images, texts or both.
        out: Folder to write.
        tokenizers: What to encode with.
        indices: Items of the source to encode, in this order.
        max_skipped_share: Share of unreadable images that is tolerated, 0 to 1.
        workers: Number of threads that decode images.
        advance: Called after each chunk with the numbers of items done and of items in all.
    """
    if out.exists() and not Store.is_one(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and holds no encoded data: choose another folder")
    items = range(len(source)) if indices is None else indices
    writer = ResumableArrayWriter(out, origin(source, tokenizers, items))
    skipped = SkippedItems(max_skipped_share=max_skipped_share, reasons=writer.skipped)
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in range(writer.done, len(items), _CHUNK):
            chunk = np.asarray(items[begin : begin + _CHUNK])
            arrays, keys = _encode_chunk(source, chunk, tokenizers, skipped, threads)
            writer.append(arrays, keys=keys, done=begin + len(chunk))
            skipped.check(len(items))
            advance(begin + len(chunk), len(items))
    skipped.check(len(items))
    if writer.items == 0:
        raise UserError(f"{source.name}: nothing to encode")
    manifest = {name: writer.state[name] for name in ("made_by", "items", "arrays")}
    manifest |= {"version": STORE_VERSION, "skipped": len(skipped)}
    return writer.finish(STORE_MANIFEST, manifest, Store.open)


def origin(source: Source, tokenizers: DataTokenizers, indices: np.ndarray | range) -> dict[str, str]:
    """What decides the content of a store, as its manifest holds it under ``made_by``."""
    digest = hashlib.sha256()
    for begin in range(0, len(indices), _DIGESTED):
        digest.update(np.asarray(indices[begin : begin + _DIGESTED], "<i8").tobytes())
    found = {"source": source.name, "tokenizers": tokenizers.fingerprint, "items": digest.hexdigest()[:16]}
    return found | {"content": content_digest(source)}


def _encode_chunk(
    source: Source, items: np.ndarray, tokenizers: DataTokenizers, skipped: SkippedItems, threads: Executor
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays of the chunk, integers in four bytes, and the keys of its readable items."""
    arrays: dict[str, np.ndarray] = {}
    if tokenizers.tokenize_images is not None:
        pixels, items = read_images(source, items, size=tokenizers.image_size, skipped=skipped, threads=threads)
        if len(items):
            pixels_B3SS = channels_first(pixels)
            arrays["tokens"] = tokenizers.tokenize_images(pixels_B3SS).cpu().numpy().astype(np.int32)
            if tokenizers.image_features is not None:
                arrays["image_features"] = tokenizers.image_features(pixels_B3SS).half().cpu().numpy()
            if tokenizers.teacher_features is not None:
                size = tokenizers.teacher_size
                pixels, _ = read_images(source, items, size=size, skipped=skipped, threads=threads)
                features = tokenizers.teacher_features(channels_first(pixels))
                arrays["teacher_features"] = features.half().cpu().numpy()
    if tokenizers.tokenize_texts is not None:
        captions = [source.captions(int(item)) for item in items]
        arrays["counts"] = np.array([len(texts) for texts in captions], np.int32)
        texts = [text for group in captions for text in group]
        if texts:
            ids = tokenizers.tokenize_texts(texts)
            arrays["ids"] = ids.cpu().numpy().astype(np.int32)
            if tokenizers.text_features is not None:
                arrays["features"] = tokenizers.text_features(ids).half().cpu().numpy()
    return arrays, [source.key(int(item)) for item in items]
