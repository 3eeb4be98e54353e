"""What UML learns from: features of frozen encoders, kept on disk, and images of classes as pixels.

    labelled_image_features    supervised: features of images with their classes
    class_text_features        supervised: features of the texts about each class
    LabelledImages             supervised: pixels, where the encoder of images is trained
    write_sequences            self-supervised: features of every token or frame (`diptych features`)
    sequence_stream            self-supervised: the sequences of such a store as rows of a batch

The features of images and texts lie in a folder whose name is a digest of all that decides them: the encoder's weights,
how it prepares its input, and the items. They are computed once. A store of sequences holds vectors [items, length,
width] and may have an array ``lengths``; without it all positions are valid. The items of a store of [items, width] are
sequences of one position.

Shapes: N images, T texts, B rows, L positions of the store, S positions of a batch, D and F width of the features,
H and W pixels.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from diptych.data.batch import LabelledImageExamples, LabelledVectorExamples, SequenceExamples
from diptych.data.class_texts import Shots, choose_texts
from diptych.data.pixels import CachedImages, SkippedItems, channels_first, image_batches
from diptych.data.sources import Source, find_files, open_finite
from diptych.data.sources.columns import Columns
from diptych.data.sources.open import remote_files
from diptych.data.sources.remote import is_remote
from diptych.data.splits import Labelled, Subset
from diptych.data.store import VectorStore, check_free, write_vectors
from diptych.data.streams import Stream
from diptych.encoders import (
    ImageEncoder,
    PooledTextEncoder,
    open_audio_encoder,
    open_image_encoder,
    open_text_encoder,
)
from diptych.encoders.audio import AudioTar, MelConfig, write_frames
from diptych.errors import UserError, first_line
from diptych.io import weights_digest
from diptych.nn.inference import Device, eval_mode, pick_device

IMAGE, TEXT = "image", "text"
"""Names of the modalities of supervised UML, and of their streams."""
_CACHE_ROWS = 128
"""Items encoded at once for the cache."""
_SEQUENCE_ROWS = 64
"""Items encoded at once for a store of sequences."""
_STATISTICS_ROWS = 256
"""Items read at once for statistics over a store."""
_SMALLEST_SCALE = 1e-4
"""Smallest standard deviation to divide by, so that a feature that hardly varies is not enlarged."""

SequenceKind = Literal["images", "texts", "audio"]
SequenceBatches = Iterator[tuple[Tensor, Tensor, dict[str, np.ndarray]]]
"""Features [B L D], which positions are valid [B L], and further arrays of the items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFeatures:
    """Feature vectors of any modality, with the class of each."""

    vectors_ND: np.ndarray
    labels_N: np.ndarray

    def stream(self) -> Stream:
        """All rows. Only those of a batch are read from disk."""

        def take(index: np.ndarray, epoch: np.ndarray) -> LabelledVectorExamples:
            vectors_BD = np.asarray(self.vectors_ND[index], np.float32)
            return LabelledVectorExamples(
                vectors_BD=torch.from_numpy(vectors_BD), labels_B=torch.from_numpy(self.labels_N[index])
            )

        return Stream(size=len(self.labels_N), take=take)

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """All vectors [N D], float32, and their labels [N]."""
        vectors_ND = torch.from_numpy(np.array(self.vectors_ND, np.float32))
        return vectors_ND.to(device), torch.from_numpy(self.labels_N).to(device)


class LabelledImages:
    """Images of classes as pixels, for an encoder that is trained. Images are resized to ``size`` pixels a side."""

    def __init__(
        self, labelled: Labelled, items: np.ndarray, *, size: int, skipped: SkippedItems, cache_mb: int
    ) -> None:
        self.labels_N = labelled.labels_N[items]
        self._images = CachedImages([Subset(labelled.source, items)], size=size, skipped=skipped, cache_mb=cache_mb)

    def stream(self) -> Stream:
        """All images."""
        return Stream(size=len(self.labels_N), take=self._take)

    def _take(self, index: np.ndarray, epoch: np.ndarray) -> LabelledImageExamples:
        pixels, index = self._images.take(index)  # an image that replaces an unreadable one brings its own class
        return LabelledImageExamples(
            pixels_B3HW=channels_first(pixels), labels_B=torch.from_numpy(self.labels_N[index])
        )


def labelled_image_features(
    encoder: ImageEncoder, labelled: Labelled, items: np.ndarray, *, cache: Path, skipped: SkippedItems, workers: int
) -> LabelledFeatures:
    """Cached features of those of ``items`` that can be read. The others are recorded in ``skipped``."""
    store = image_features(encoder, labelled.source, items, cache=cache, skipped=skipped, workers=workers)
    found = store.array("items")
    assert found is not None
    return LabelledFeatures(vectors_ND=store.vectors, labels_N=labelled.labels_N[found])


def class_text_features(
    encoder: PooledTextEncoder, texts: Sequence[Sequence[str]], *, shots: Shots, cache: Path, seed: int
) -> LabelledFeatures:
    """Cached features of the texts of each class, of which :func:`choose_shots` takes ``shots``."""
    labels_T = np.repeat(np.arange(len(texts)), [len(of_class) for of_class in texts])
    vectors_TD = text_features(encoder, [text for of_class in texts for text in of_class], cache=cache).vectors
    return choose_shots(LabelledFeatures(vectors_ND=vectors_TD, labels_N=labels_T), shots=shots, seed=seed)


def choose_shots(features: LabelledFeatures, *, shots: Shots, seed: int) -> LabelledFeatures:
    """All features of each class, or ``shots`` random ones, or their mean alone."""
    if shots == "all":
        return features
    if shots == "mean":
        classes = np.unique(features.labels_N)
        means = [features.vectors_ND[features.labels_N == label].mean(0) for label in classes]
        return LabelledFeatures(vectors_ND=np.stack(means), labels_N=classes)
    chosen = choose_texts(features.labels_N, shots, seed=seed)
    return LabelledFeatures(vectors_ND=features.vectors_ND[chosen], labels_N=features.labels_N[chosen])


# Cached vectors


def image_features(
    encoder: ImageEncoder, source: Source, items: np.ndarray, *, cache: Path, skipped: SkippedItems, workers: int = 2
) -> VectorStore:
    """The store of the features of ``items``, in their order; computed if ``cache`` does not have it yet.

    Images that cannot be read are left out and recorded in ``skipped``, which raises UserError for too many of them.
    The store's array ``items`` tells which are there.
    """
    made_by = encoder_identity(encoder) | {"source": source.name, "items": _items_digest(source, items)}

    def batches(keys: list[str]) -> Iterator[dict[str, np.ndarray]]:
        readable = image_batches(
            source, items, size=encoder.image_size, skipped=skipped, workers=workers, rows=_CACHE_ROWS
        )
        with eval_mode(encoder):
            for pixels_B3HW, found in readable:
                keys += [source.key(int(item)) for item in found]
                features_BD = encoder(pixels_B3HW.to(_device_of(encoder)))
                yield {"vectors": features_BD.float().cpu().numpy(), "items": found.astype(np.int64)}

    return _cached(cache, made_by, batches)


def text_features(encoder: PooledTextEncoder, texts: Sequence[str], *, cache: Path) -> VectorStore:
    """The store of the features of ``texts``, in their order; computed if ``cache`` does not have it yet."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    made_by = encoder_identity(encoder) | {"texts": len(texts), "items": digest}

    def batches(keys: list[str]) -> Iterator[np.ndarray]:
        keys += [str(number) for number in range(len(texts))]
        for begin in range(0, len(texts), _CACHE_ROWS):
            yield encoder(texts[begin : begin + _CACHE_ROWS]).float().cpu().numpy()

    return _cached(cache, made_by, batches)


def encoder_identity(encoder: ImageEncoder | PooledTextEncoder) -> dict[str, Any]:
    """What an encoder's features depend on, as JSON values."""
    return {"weights": weights_digest(encoder), "preprocessing": encoder.preprocessing}


def _cached(cache: Path, made_by: dict[str, Any], batches: Callable[[list[str]], Iterator[Any]]) -> VectorStore:
    """The store of ``made_by``, found or computed. ``batches`` yields its arrays and appends its keys to the list."""
    made_by = json.loads(json.dumps(made_by))
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:24]
    if VectorStore.is_one(cache / name):
        store = VectorStore.open(cache / name)
        if store.manifest["made_by"] == made_by:
            return store
    keys: list[str] = []
    return write_vectors(cache / name, batches(keys), keys=keys, manifest={"made_by": made_by})


def _items_digest(source: Source, items: np.ndarray) -> str:
    """A digest of the items' keys, and of size and date of the files that the source was opened from."""
    digest = hashlib.sha256("\n".join(source.key(int(item)) for item in items).encode(errors="surrogateescape"))
    if is_remote(source.name):
        digest.update(" ".join(file.identity for file in remote_files(source.name)).encode())
        return digest.hexdigest()
    try:
        files = find_files(source.name)
    except UserError:
        files = []  # the built-in scenes, or a data set of the hub: its name and revision identify it
    for file in files:
        status = file.stat()
        digest.update(f"{file}:{status.st_size}:{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


# Writing sequences


def write_sequences(
    spec: str, kind: SequenceKind, *, encoder: str | None, out: Path, length: int, hop: int, device: Device = "auto"
) -> VectorStore:
    """Write the store ``out`` of the features of every token or frame [items, length, D], in half precision.

    Images and audio keep their classes as the array ``labels``. Audio, a tar of clips, needs no encoder: without one
    its features are log-mel frames.

    Args:
        spec: Any source of images or texts; for audio the path of a tar.
        kind: What to take from the source.
        encoder: Folder, hub name or run of the encoder.
        out: Folder to write.
        length: Number of positions of an item; further ones are cut off.
        hop: Samples from one log-mel frame to the next.
        device: Where to compute.

    Raises UserError for a source without such items, for images or texts without an encoder, and for an ``out`` that
    holds anything but a store.
    """
    check_free(out)
    if kind == "audio" and encoder is None:
        config = MelConfig(hop=hop)
        return write_frames(Path(spec), out, config=config, seconds=(config.window + (length - 1) * hop) / config.rate)
    if encoder is None:
        raise UserError(f"{kind} have features by an encoder only: give --encoder")
    keys: list[str] = []
    skipped = SkippedItems()
    manifest: dict[str, Any] = {"source": spec, "encoder": encoder, "classes": []}
    source = AudioTar(Path(spec)) if kind == "audio" else open_finite(spec, Columns())
    if isinstance(source, AudioTar):
        batches = _audio_sequences(source, encoder, device, keys, manifest)
    elif not (source.has_images if kind == "images" else source.has_captions):
        raise UserError(f"{spec}: has no {kind}")
    elif kind == "images":
        batches = _image_sequences(source, encoder, device, keys, manifest, skipped)
    else:
        batches = _text_sequences(source, encoder, device, keys)
    store = write_vectors(out, (_cut(*batch, length=length) for batch in batches), keys=keys, manifest=manifest)
    if len(skipped):
        skipped.write(out / "skipped.jsonl")
    return store


def _cut(x_BLD: Tensor, valid_BL: Tensor, further: dict[str, np.ndarray], *, length: int) -> dict[str, np.ndarray]:
    """Arrays of the store: the first ``length`` positions, padded with zeros."""
    x_BLD = x_BLD[:, :length].float().cpu()
    vectors = torch.nn.functional.pad(x_BLD, (0, 0, 0, length - x_BLD.shape[1])).numpy().astype(np.float16)
    return {"vectors": vectors, "lengths": valid_BL[:, :length].sum(1).cpu().numpy(), **further}


def _image_sequences(
    source: Source, name: str, device: Device, keys: list[str], manifest: dict[str, Any], skipped: SkippedItems
) -> SequenceBatches:
    """Tokens of all readable images; appends their keys and sets the manifest's classes."""
    encoder = open_image_encoder(name).to(pick_device(device))
    labelled = None if source.label(0) is None else Labelled.of(source)
    manifest["classes"] = list(labelled.classes) if labelled else []
    every = np.arange(len(source))
    for pixels_B3HW, items in image_batches(
        source, every, size=encoder.image_size, skipped=skipped, rows=_SEQUENCE_ROWS
    ):
        keys.extend(source.key(int(item)) for item in items)
        with eval_mode(encoder):
            x_BLD = encoder.tokens(pixels_B3HW.to(_device_of(encoder)))
        labels = {"labels": labelled.labels_N[items]} if labelled else {}
        yield x_BLD, torch.ones(x_BLD.shape[:2], dtype=torch.bool), labels


def _text_sequences(source: Source, name: str, device: Device, keys: list[str]) -> SequenceBatches:
    """Tokens of all texts; appends the texts to the keys."""
    encoder = open_text_encoder(name).to(pick_device(device))
    for begin in range(0, len(source), _SEQUENCE_ROWS):
        items = range(begin, min(begin + _SEQUENCE_ROWS, len(source)))
        if texts := [text for item in items for text in source.captions(item)]:
            keys.extend(texts)
            with eval_mode(encoder):
                yield *encoder.tokens(texts), {}


def _audio_sequences(
    clips: AudioTar, name: str, device: Device, keys: list[str], manifest: dict[str, Any]
) -> SequenceBatches:
    """Frames of all clips; appends their keys and sets the manifest's classes."""
    encoder = open_audio_encoder(name).to(pick_device(device))
    manifest["classes"], arrays = clips.labels()
    for i, key in enumerate(clips.keys):  # one by one: clips of unequal lengths would be padded to the longest
        keys.append(key)
        with eval_mode(encoder):
            x_BLD, valid_BL = encoder.tokens([clips.wave(i, rate=encoder.rate)])
        yield x_BLD, valid_BL, {name: array[i : i + 1] for name, array in arrays.items()}


# Features from elsewhere


def read_features(file: Path, *, rows: int, width: int) -> np.ndarray:
    """Features [``rows``, ``width``] from a .npy file, or from the column ``features`` of a .parquet file.

    Raises UserError for a file that cannot be read, holds another shape, or values that are not finite.
    """
    import pyarrow.parquet  # a recipe's --help does without it

    try:
        if file.suffix == ".npy":
            found = np.load(file, mmap_mode="r", allow_pickle=False)
        elif file.suffix == ".parquet":
            found = np.stack(pyarrow.parquet.read_table(file, columns=["features"])["features"].to_numpy())
        else:
            raise UserError(f"{file}: features are a .npy file, or a .parquet file with a column `features`")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as features ({first_line(error)})") from error
    if found.shape != (rows, width):
        raise UserError(
            f"{file}: holds {' x '.join(map(str, found.shape))} numbers, but {rows:,} images and an encoder of width "
            f"{width:,} need {rows} x {width}: one row for each image of --data.images, in its order"
        )
    if not np.isfinite(found).all():
        raise UserError(f"{file}: some features are not finite: compute them again")
    return found


# Reading sequences


def sequence_stream(store: VectorStore) -> Stream:
    """All items of a store of sequences. Raises UserError for lengths that its arrays cannot have."""
    lengths = store.array("lengths")
    most = store.vectors.shape[1] if store.vectors.ndim == 3 else 1
    if lengths is not None and len(lengths) and not 1 <= lengths.min() <= lengths.max() <= most:
        raise UserError(
            f"{store.folder}: lengths of {lengths.min()} to {lengths.max()}, but 1 to {most} is possible: make it again"
        )
    return Stream(size=len(store), take=lambda index, _: read_rows(store, index))


def read_rows(store: VectorStore, index: np.ndarray) -> SequenceExamples:
    """The items ``index`` as float32, cut to the longest of them. Padding holds whatever the store holds there."""
    vectors, lengths = store.vectors[index].astype(np.float32), store.array("lengths")
    if vectors.ndim == 2:
        vectors = vectors[:, None]
    count = np.full(len(index), vectors.shape[1]) if lengths is None else np.asarray(lengths[index])
    longest = int(count.max())
    valid_BS = np.arange(longest) < count[:, None]
    return SequenceExamples(features_BSF=torch.from_numpy(vectors[:, :longest]), valid_BS=torch.from_numpy(valid_BS))


def mean_and_scale(store: VectorStore) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over all valid positions of the store, float32 [F] each."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(store), _STATISTICS_ROWS):
        rows = read_rows(store, np.arange(start, min(start + _STATISTICS_ROWS, len(store))))
        found = rows.features_BSF[rows.valid_BS].numpy().astype(np.float64)
        count, total, squares = count + len(found), total + found.sum(0), squares + np.square(found).sum(0)
    mean = np.asarray(total) / count
    scale = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0)).clip(_SMALLEST_SCALE)
    return mean.astype(np.float32), scale.astype(np.float32)
