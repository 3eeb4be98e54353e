"""Token and frame features of images, texts or sounds: stores that `fit uml-ssl` learns from.

Shapes: B rows, L positions, D width of the features, H and W pixels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diptych.data.audio import ClipTar, MelConfig, write_frames
from diptych.data.columns import Columns
from diptych.data.encode import picture_batches
from diptych.data.labelled import Labelled
from diptych.data.skips import Skips
from diptych.data.sources import Source
from diptych.data.vectors import VectorStore, check_free, write_vectors
from diptych.errors import UserError
from diptych.models.encoders import open_audio_encoder, open_image_encoder, open_text_encoder
from diptych.nn.inference import Device, evaluating, pick_device
from diptych.recipes.data import open_finite

Kind = Literal["images", "texts", "sounds"]
_ROWS = 64

Sequences = Iterator[tuple[Tensor, Tensor, dict[str, np.ndarray]]]
"""Features [B L D], which of them are real [B L], and further arrays."""


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
    skips = Skips()
    manifest: dict[str, Any] = {"source": spec, "encoder": encoder, "classes": []}
    source = ClipTar(Path(spec)) if kind == "sounds" else open_finite(spec, Columns())
    if isinstance(source, ClipTar):
        found = _sounds(source, encoder, device, keys, manifest)
    elif not (source.has_images if kind == "images" else source.has_captions):
        raise UserError(f"{spec}: has no {kind}")
    elif kind == "images":
        found = _images(source, encoder, device, keys, manifest, skips)
    else:
        found = _texts(source, encoder, device, keys)
    store = write_vectors(out, (_cut(*each, length=length) for each in found), keys=keys, manifest=manifest)
    if len(skips):
        skips.write(out / "skipped.jsonl")
    return store


def _cut(x_BLD: Tensor, valid_BL: Tensor, further: dict[str, np.ndarray], *, length: int) -> dict[str, np.ndarray]:
    """The first ``length`` positions, filled up with zeros."""
    x_BLD = x_BLD[:, :length].float().cpu()
    vectors = torch.nn.functional.pad(x_BLD, (0, 0, 0, length - x_BLD.shape[1])).numpy().astype(np.float16)
    return {"vectors": vectors, "lengths": valid_BL[:, :length].sum(1).cpu().numpy(), **further}


def _images(
    source: Source, name: str, device: Device, keys: list[str], manifest: dict[str, Any], skips: Skips
) -> Sequences:
    encoder = open_image_encoder(name).to(pick_device(device))
    labelled = None if source.label(0) is None else Labelled.of(source)
    manifest["classes"] = list(labelled.classes) if labelled else []
    place, every = next(encoder.parameters()).device, np.arange(len(source))
    for pixels_B3HW, items in picture_batches(source, every, size=encoder.image_size, skips=skips, rows=_ROWS):
        keys.extend(source.key(int(item)) for item in items)
        with evaluating(encoder):
            x_BLD = encoder.tokens(pixels_B3HW.to(place))
        labels = {"labels": labelled.labels_N[items]} if labelled else {}
        yield x_BLD, torch.ones(x_BLD.shape[:2], dtype=torch.bool), labels


def _texts(source: Source, name: str, device: Device, keys: list[str]) -> Sequences:
    encoder = open_text_encoder(name).to(pick_device(device))
    for begin in range(0, len(source), _ROWS):
        items = range(begin, min(begin + _ROWS, len(source)))
        if texts := [text for item in items for text in source.captions(item)]:
            keys.extend(texts)
            with evaluating(encoder):
                yield *encoder.tokens(texts), {}


def _sounds(clips: ClipTar, name: str, device: Device, keys: list[str], manifest: dict[str, Any]) -> Sequences:
    encoder = open_audio_encoder(name).to(pick_device(device))
    manifest["classes"], arrays = clips.labels()
    for i, key in enumerate(clips.keys):  # one by one: clips of unequal lengths would be padded to the longest
        keys.append(key)
        with evaluating(encoder):
            found = encoder.tokens([clips.wave(i, rate=encoder.rate)])
        yield *found, {name: array[i : i + 1] for name, array in arrays.items()}
