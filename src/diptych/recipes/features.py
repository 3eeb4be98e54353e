"""Features of frozen encoders: computed once, kept on disk, memory-mapped.

A store's folder is named by what decides its content: the encoder's weights, how it prepares its input, and the items.

Shapes: B rows, H and W pixels, D width of the features.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.data.encode import picture_batches
from diptych.data.skips import Skips
from diptych.data.sources import Source, find_files
from diptych.data.vectors import VectorStore, write_vectors
from diptych.errors import UserError
from diptych.models.encoders.image import ImageEncoder
from diptych.models.encoders.text import PooledTextEncoder
from diptych.nn.inference import evaluating
from diptych.nn.weights import weights_digest

_ROWS = 128


def image_features(
    encoder: ImageEncoder, source: Source, items: np.ndarray, *, cache: Path, skips: Skips, workers: int = 2
) -> VectorStore:
    """Features of ``items``, in their order. Pictures that cannot be read are left out and recorded in ``skips``; the
    array ``items`` of the store tells which ones are there."""
    made_by = made_of(encoder) | {"source": source.name, "items": _digest_of_source(source, items)}

    def batches(keys: list[str]) -> Iterator[dict[str, np.ndarray]]:
        pictures = picture_batches(
            source, items, size=encoder.image_size, skips=skips, workers=workers, rows=_ROWS
        )  # fmt: skip
        with evaluating(_module(encoder)):
            for pixels_B3HW, found in pictures:
                keys += [source.key(int(item)) for item in found]
                features_BD = encoder(pixels_B3HW.to(_device(encoder)))
                yield {"vectors": features_BD.float().cpu().numpy(), "items": found.astype(np.int64)}

    return _once(cache, made_by, batches)


def text_features(encoder: PooledTextEncoder, texts: Sequence[str], *, cache: Path) -> VectorStore:
    """Features of ``texts``, in their order."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    made_by = made_of(encoder) | {"texts": len(texts), "items": digest}

    def batches(keys: list[str]) -> Iterator[np.ndarray]:
        keys += [str(number) for number in range(len(texts))]
        for begin in range(0, len(texts), _ROWS):
            yield encoder(texts[begin : begin + _ROWS]).float().cpu().numpy()

    return _once(cache, made_by, batches)


def made_of(encoder: Any) -> dict[str, Any]:
    """What of an encoder decides its features."""
    return {"weights": weights_digest(encoder), "preprocessing": encoder.preprocessing}


def _once(cache: Path, made_by: dict[str, Any], batches: Callable[[list[str]], Iterator[Any]]) -> VectorStore:
    """The store of ``made_by``, found or made; ``batches`` yields its arrays and appends its keys to the list."""
    made_by = json.loads(json.dumps(made_by))
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:24]
    if VectorStore.is_one(cache / name):
        store = VectorStore.open(cache / name)
        if store.manifest["made_by"] == made_by:
            return store
    keys: list[str] = []
    return write_vectors(cache / name, batches(keys), keys=keys, manifest={"made_by": made_by})


def _digest_of_source(source: Source, items: np.ndarray) -> str:
    """Names of the items, and size and date of the files that the source was opened from."""
    digest = hashlib.sha256("\n".join(source.key(int(item)) for item in items).encode(errors="surrogateescape"))
    try:
        files = find_files(source.name)
    except UserError:
        files = []  # the built-in scenes, or a data set of the hub, whose name and revision say it all
    for file in files:
        status = file.stat()
        digest.update(f"{file}:{status.st_size}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _module(encoder: Any) -> nn.Module:
    assert isinstance(encoder, nn.Module)
    return encoder


def _device(encoder: Any) -> torch.device:
    weight: Tensor = next(_module(encoder).parameters())
    return weight.device
