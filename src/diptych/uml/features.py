"""Feature sequences of a vector store as rows of a batch: tokens of an image or a text, frames of a sound.

A store of [items, length, width] may have an array `lengths` (default: all positions are real); items of a store of
[items, width] are sequences of one position.

Shapes: B rows, L positions, F width of the features.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diptych.data.audio import AudioTar, MelConfig, write_frames
from diptych.data.batch import SequenceExamples
from diptych.data.pixels import SkippedItems, image_batches
from diptych.data.sources import Source, find_files, open_finite
from diptych.data.sources.columns import Columns
from diptych.data.splits import Labelled
from diptych.data.store import VectorStore, check_free, write_vectors
from diptych.data.streams import Stream
from diptych.encoders import open_audio_encoder, open_image_encoder, open_text_encoder
from diptych.encoders.image import ImageEncoder
from diptych.encoders.text import PooledTextEncoder
from diptych.errors import UserError
from diptych.io import weights_digest
from diptych.nn.inference import Device, eval_mode, pick_device

_ROWS = 256
"""Examples read at once where all are read."""
_SMALLEST_SCALE = 1e-4
"""A feature that hardly varies is not blown up."""


def sequence_stream(store: VectorStore) -> Stream:
    """All items. Raises UserError for lengths that cannot be."""
    lengths = store.array("lengths")
    most = store.vectors.shape[1] if store.vectors.ndim == 3 else 1
    if lengths is not None and len(lengths) and not 1 <= lengths.min() <= lengths.max() <= most:
        raise UserError(
            f"{store.folder}: lengths of {lengths.min()} to {lengths.max()}, but 1 to {most} is possible: make it again"
        )
    return Stream(size=len(store), take=lambda index, _: read_rows(store, index))


def read_rows(store: VectorStore, index: np.ndarray) -> SequenceExamples:
    """The items ``index``, padded with whatever the store holds there to the longest of them."""
    vectors, lengths = store.vectors[index].astype(np.float32), store.array("lengths")
    if vectors.ndim == 2:
        vectors = vectors[:, None]
    count = np.full(len(index), vectors.shape[1]) if lengths is None else np.asarray(lengths[index])
    longest = int(count.max())
    valid = np.arange(longest) < count[:, None]
    return SequenceExamples(features_BSF=torch.from_numpy(vectors[:, :longest]), valid_BS=torch.from_numpy(valid))


def feature_statistics(store: VectorStore) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over all valid positions, float32 [F]."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(store), _ROWS):
        rows = read_rows(store, np.arange(start, min(start + _ROWS, len(store))))
        found = rows.features_BSF[rows.valid_BS].numpy().astype(np.float64)
        count, total, squares = count + len(found), total + found.sum(0), squares + np.square(found).sum(0)
    mean = np.asarray(total) / count
    scale = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0)).clip(_SMALLEST_SCALE)
    return mean.astype(np.float32), scale.astype(np.float32)


# JOINED recipes.features
#| LabelledFeatures of frozen encoders: computed once, kept on disk, memory-mapped.
#|
#| A store's folder is named by what decides its content: the encoder's weights, how it prepares its input, and the items.
#|
#| Shapes: B rows, H and W pixels, D width of the features.


_ROWS = 128


def image_features(
    encoder: ImageEncoder, source: Source, items: np.ndarray, *, cache: Path, skipped: SkippedItems, workers: int = 2
) -> VectorStore:
    """LabelledFeatures of ``items``, in their order. Pictures that cannot be read are left out and recorded in ``skips``; the
    array ``items`` of the store tells which ones are there."""
    made_by = made_of(encoder) | {"source": source.name, "items": _digest_of_source(source, items)}

    def batches(keys: list[str]) -> Iterator[dict[str, np.ndarray]]:
        pictures = image_batches(
            source, items, size=encoder.image_size, skipped=skipped, workers=workers, rows=_ROWS
        )  # fmt: skip
        with eval_mode(_module(encoder)):
            for pixels_B3HW, found in pictures:
                keys += [source.key(int(item)) for item in found]
                features_BD = encoder(pixels_B3HW.to(_device(encoder)))
                yield {"vectors": features_BD.float().cpu().numpy(), "items": found.astype(np.int64)}

    return _once(cache, made_by, batches)


def text_features(encoder: PooledTextEncoder, texts: Sequence[str], *, cache: Path) -> VectorStore:
    """LabelledFeatures of ``texts``, in their order."""
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


# JOINED recipes.sequences
#| Token and frame features of images, texts or sounds: stores that `fit uml-ssl` learns from.
#|
#| Shapes: B rows, L positions, D width of the features, H and W pixels.


Kind = Literal["images", "texts", "sounds"]
_ROWS = 64

Sequences = Iterator[tuple[Tensor, Tensor, dict[str, np.ndarray]]]
"""LabelledFeatures [B L D], which of them are real [B L], and further arrays."""


def write_sequences(
    spec: str, kind: Kind, *, encoder: str | None, out: Path, length: int, hop: int, device: Device = "auto"
) -> VectorStore:
    """The store ``out`` [items, length, D] of ``encoder``'s features, in half precision.

    Images and sounds keep their classes as ``labels``. Sounds, a tar of them, need no encoder: without one they become
    log-mel frames every ``hop`` samples.
    """
    check_free(out)
    if kind == "sounds" and encoder is None:
        config = MelConfig(hop=hop)
        return write_frames(Path(spec), out, config=config, seconds=(config.window + (length - 1) * hop) / config.rate)
    if encoder is None:
        raise UserError(f"{kind} have features by an encoder only: give --encoder")
    keys: list[str] = []
    skipped = SkippedItems()
    manifest: dict[str, Any] = {"source": spec, "encoder": encoder, "classes": []}
    source = AudioTar(Path(spec)) if kind == "sounds" else open_finite(spec, Columns())
    if isinstance(source, AudioTar):
        found = _sounds(source, encoder, device, keys, manifest)
    elif not (source.has_images if kind == "images" else source.has_captions):
        raise UserError(f"{spec}: has no {kind}")
    elif kind == "images":
        found = _images(source, encoder, device, keys, manifest, skipped)
    else:
        found = _texts(source, encoder, device, keys)
    store = write_vectors(out, (_cut(*each, length=length) for each in found), keys=keys, manifest=manifest)
    if len(skipped):
        skipped.write(out / "skipped.jsonl")
    return store


def _cut(x_BLD: Tensor, valid_BL: Tensor, further: dict[str, np.ndarray], *, length: int) -> dict[str, np.ndarray]:
    """The first ``length`` positions, filled up with zeros."""
    x_BLD = x_BLD[:, :length].float().cpu()
    vectors = torch.nn.functional.pad(x_BLD, (0, 0, 0, length - x_BLD.shape[1])).numpy().astype(np.float16)
    return {"vectors": vectors, "lengths": valid_BL[:, :length].sum(1).cpu().numpy(), **further}


def _images(
    source: Source, name: str, device: Device, keys: list[str], manifest: dict[str, Any], skipped: SkippedItems
) -> Sequences:
    encoder = open_image_encoder(name).to(pick_device(device))
    labelled = None if source.label(0) is None else Labelled.of(source)
    manifest["classes"] = list(labelled.classes) if labelled else []
    place, every = next(encoder.parameters()).device, np.arange(len(source))
    for pixels_B3HW, items in image_batches(source, every, size=encoder.image_size, skipped=skipped, rows=_ROWS):
        keys.extend(source.key(int(item)) for item in items)
        with eval_mode(encoder):
            x_BLD = encoder.tokens(pixels_B3HW.to(place))
        labels = {"labels": labelled.labels_N[items]} if labelled else {}
        yield x_BLD, torch.ones(x_BLD.shape[:2], dtype=torch.bool), labels


def _texts(source: Source, name: str, device: Device, keys: list[str]) -> Sequences:
    encoder = open_text_encoder(name).to(pick_device(device))
    for begin in range(0, len(source), _ROWS):
        items = range(begin, min(begin + _ROWS, len(source)))
        if texts := [text for item in items for text in source.captions(item)]:
            keys.extend(texts)
            with eval_mode(encoder):
                yield *encoder.tokens(texts), {}


def _sounds(clips: AudioTar, name: str, device: Device, keys: list[str], manifest: dict[str, Any]) -> Sequences:
    encoder = open_audio_encoder(name).to(pick_device(device))
    manifest["classes"], arrays = clips.labels()
    for i, key in enumerate(clips.keys):  # one by one: clips of unequal lengths would be padded to the longest
        keys.append(key)
        with eval_mode(encoder):
            found = encoder.tokens([clips.wave(i, rate=encoder.rate)])
        yield *found, {name: array[i : i + 1] for name, array in arrays.items()}
