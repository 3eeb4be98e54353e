"""Images to tokens and texts to ids, ahead of training.

Shapes: B rows, N image tokens, L text tokens, F width of the text features.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diptych.data.images import UnreadableImage
from diptych.data.pixels import channels_first
from diptych.data.skips import Skips
from diptych.data.sources import Source
from diptych.data.store import MANIFEST, Store
from diptych.errors import UserError
from diptych.report.files import write_bytes

_CHUNK = 512
"""Items encoded between two points to which an interrupted run returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coders:
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
    coders: Coders,
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
    writer = _Writer(out.with_name(f".{out.name}.partial"), origin(source, coders, chosen))
    skips = Skips(max_skipped_share=max_skipped_share, reasons=writer.skipped)
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in range(writer.done, len(chosen), _CHUNK):
            items = chosen[begin : begin + _CHUNK]
            writer.append(_encode_chunk(source, items, coders, skips, threads), done=begin + len(items))
            skips.check(len(chosen))
            advance(begin + len(items), len(chosen))
    skips.check(len(chosen))
    if writer.items == 0:
        raise UserError(f"{source.name}: nothing to encode")
    return writer.finish(out)


def origin(source: Source, coders: Coders, indices: np.ndarray) -> dict[str, str]:
    """What a store is made of, as its manifest tells it under ``made_by``."""
    digest = hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest()[:16]
    return {"source": source.name, "coders": coders.fingerprint, "chosen": digest}


def _encode_chunk(
    source: Source, items: np.ndarray, coders: Coders, skips: Skips, threads: ThreadPoolExecutor
) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    if coders.tokens is not None:
        pixels, items = read_pictures(source, items, coders.image_size, skips, threads)
        if len(items):
            arrays["tokens"] = coders.tokens(channels_first(pixels)).cpu().numpy()
    if coders.ids is not None:
        captions = [source.captions(int(item)) for item in items]
        arrays["counts"] = np.array([len(texts) for texts in captions], np.int32)
        texts = [text for group in captions for text in group]
        if texts:
            ids = coders.ids(texts)
            arrays["ids"] = ids.cpu().numpy()
            if coders.features is not None:
                arrays["features"] = coders.features(ids).half().cpu().numpy()
    arrays["keys"] = [source.key(int(item)) for item in items]
    return arrays


def read_pictures(
    source: Source, items: np.ndarray, size: int, skips: Skips, threads: ThreadPoolExecutor
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [B H W 3] of the readable items, and those items."""
    together = getattr(source, "images", None)
    if together is not None:  # sources that draw their pictures do it faster in one go
        return together(items, size), items

    def read(item: int) -> np.ndarray | None:
        try:
            return source.image(item, size)
        except UnreadableImage as error:
            skips.record(source.key(item), error)
            return None

    pictures = list(threads.map(read, (int(item) for item in items)))
    readable = np.array([picture is not None for picture in pictures], bool)
    kept = [picture for picture in pictures if picture is not None]
    return (np.stack(kept) if kept else np.empty((0, size, size, 3), np.uint8)), items[readable]


def picture_batches(
    source: Source, items: np.ndarray, *, size: int, skips: Skips, workers: int = 2, rows: int = _CHUNK
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The readable pictures of ``items`` as uint8 [B 3 H W], at most ``rows`` at a time, and the items they are.

    The others are recorded in ``skips``, whose tolerance is checked on the way.
    """
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in range(0, len(items), rows):
            pixels, found = read_pictures(source, items[begin : begin + rows], size, skips, threads)
            skips.check(len(items))
            if len(found):
                yield channels_first(pixels), found


class _Writer:
    """Appends to raw files in a hidden folder and renames it when all is there."""

    def __init__(self, folder: Path, made_by: dict[str, str]) -> None:
        self.folder = folder
        self.state: dict[str, Any] = {"made_by": made_by, "arrays": {}, "skipped": {}}
        self.state |= {"done": 0, "items": 0, "key_bytes": 0}
        progress = folder / "progress.json"
        if progress.is_file():
            found = json.loads(progress.read_text())
            if found["made_by"] == made_by:
                self.state = found
        if self.state["done"] == 0:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        sizes = dict(self._sizes())
        for file in folder.glob("*.bin"):  # an array may have begun in the chunk that was interrupted
            if file.name not in sizes:
                file.unlink()
        for name, size in sizes.items():
            os.truncate(folder / name, size)

    @property
    def done(self) -> int:
        return self.state["done"]

    @property
    def items(self) -> int:
        return self.state["items"]

    @property
    def skipped(self) -> dict[str, str]:
        return self.state["skipped"]

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for name, array in self.state["arrays"].items():
            yield f"{name}.bin", int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize
        if self.done:
            yield "keys.txt", self.state["key_bytes"]

    def append(self, arrays: dict[str, Any], *, done: int) -> None:
        names = [" ".join(key.splitlines()) for key in arrays.pop("keys")]
        keys = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")  # file names may be any bytes
        with (self.folder / "keys.txt").open("ab") as file:
            file.write(keys)
        self.state["key_bytes"] += len(keys)
        self.state["items"] += len(names)
        for name, array in arrays.items():
            known = self.state["arrays"].setdefault(name, {"shape": [0, *array.shape[1:]], "dtype": _small(array)})
            with (self.folder / f"{name}.bin").open("ab") as file:
                file.write(np.ascontiguousarray(array, known["dtype"]).tobytes())
            known["shape"][0] += len(array)
        self.state["done"] = done
        _write_json(self.folder / "progress.json", self.state)

    def finish(self, out: Path) -> Store:
        lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in sorted(self.skipped.items())]
        if lines:
            (self.folder / "skipped.jsonl").write_text("".join(lines))
        manifest = {name: self.state[name] for name in ("made_by", "items", "arrays")} | {"skipped": len(lines)}
        _write_json(self.folder / MANIFEST, manifest)
        (self.folder / "progress.json").unlink()
        if out.exists():
            shutil.rmtree(out)
        os.replace(self.folder, out)
        return Store.open(out)


def _small(array: np.ndarray) -> str:
    """Ids and tokens fit 4 bytes; features come in half precision."""
    return "<i4" if np.issubdtype(array.dtype, np.integer) else array.dtype.newbyteorder("<").str


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value).encode())
