"""States of frozen towers, computed once and kept on disk: what :class:`~diptych.dual.towers.Heads` learns from.

Each image has the states of its views, which are drawn once; each caption has its own. Nothing else of images and
captions is needed while the heads train, and no tower computes anything.

Shapes: N images, V views of an image, S states of a view, L states of a caption, F width of a tower, B rows, M captions
of a row.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.data.augment import ViewConfig, draw_view, make_view
from diptych.data.batch import CaptionedStateExamples
from diptych.data.pixels import SkippedItems, channels_first, read_images
from diptych.data.sources import Source
from diptych.data.sources.content import content_digest
from diptych.data.store import ResumableArrayWriter
from diptych.data.streams import Stream
from diptych.dual.data import CaptionIds
from diptych.dual.towers import TowersEncoder
from diptych.io import weights_digest
from diptych.nn.inference import Precision, autocast, eval_mode
from diptych.report.progress import ProgressLine
from diptych.rng import RowRNG

_IMAGES, _TEXTS = 128, 2048
"""Images and captions between two points to which an interrupted computation returns."""
_TEXT_ROWS = 128
"""Captions that a tower computes at once."""
_THREADS = 2
"""Threads that decode images."""
_TIMED = 32
"""Images by which the time of all is estimated."""
_LARGEST = 65504.0
"""Largest number in half precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesConfig:
    """What decides the states besides the towers and the data."""

    views: Sequence[ViewConfig]
    """How the views of an image are drawn, each once."""
    keep_tokens: bool
    """Whether cells and tokens are kept beside the pooled features."""
    size: int
    """Side in pixels of the decoded images, from which views are cropped."""
    precision: Precision
    """Number format of the towers' matrix products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The states of images and of their captions, mapped into memory, in half precision."""

    images_NVSF: np.ndarray
    rows_N: np.ndarray
    """Number of each image among the captioned items; those that cannot be read are left out."""
    texts: np.ndarray
    """The states [all of them, F] of all captions, end to end."""
    starts: np.ndarray
    """Where each caption begins in ``texts``, and one more entry for the end."""

    def stream(self, captions: CaptionIds, *, per_image: int, seed: int) -> Stream[CaptionedStateExamples]:
        """Every image once an epoch, with the states of ``per_image`` of its captions."""

        def take(index: np.ndarray, epoch: np.ndarray) -> CaptionedStateExamples:
            number_BM = captions.choose(self.rows_N[index], epoch, captions=per_image, seed=seed)
            states_BMLF, valid_BML = self._captions(number_BM)
            return CaptionedStateExamples(
                images_BVSF=_to_torch(self.images_NVSF[index]), texts_BMLF=states_BMLF, valid_BML=valid_BML
            )

        return Stream(size=len(self.rows_N), take=take)

    def _captions(self, number_BM: np.ndarray) -> tuple[Tensor, Tensor]:
        """The states of captions, padded with zeros, and which of their tokens are valid."""
        start_BM = self.starts[number_BM]
        length_BM = self.starts[number_BM + 1] - start_BM
        valid_BML = np.arange(length_BM.max()) < length_BM[..., None]
        found = np.zeros((*valid_BML.shape, self.texts.shape[1]), self.texts.dtype)
        found[valid_BML] = self.texts[(start_BM[..., None] + np.arange(valid_BML.shape[-1]))[valid_BML]]
        return _to_torch(found), torch.from_numpy(valid_BML[..., 1:])


def _to_torch(array: np.ndarray) -> Tensor:
    # Converted by NumPy: torch would start a team of OpenMP threads in each preparing thread, which then spin.
    return torch.from_numpy(array.astype(np.float32))


def cached_states(
    encoder: TowersEncoder,
    source: Source,
    captions: CaptionIds,
    config: StatesConfig,
    *,
    cache: Path,
    skipped: SkippedItems,
) -> States:
    """The states of the captioned images of ``source``, computed as far as the folder ``cache`` does not have them.

    An interrupted computation goes on where it stopped. Raises UserError when too many images cannot be read; the
    others of them are recorded in ``skipped`` and left out.
    """
    width, dtype = encoder.text_tower_width, _precision(encoder, config)
    shared = {"keep_tokens": config.keep_tokens, "precision": dtype}
    made_by: dict[str, Any] = {"weights": weights_digest(encoder.clip.vision_model)}
    made_by |= {"views": [asdict(each) for each in config.views]}
    made_by |= {"mean": encoder.mean_311.flatten().tolist(), "std": encoder.std_311.flatten().tolist()}
    made_by |= {"size": [config.size, encoder.image_size], "source": source.name, "files": content_digest(source)}
    images = _cached(cache, "images", made_by | shared | {"items": _digest(captions.items)})
    with ThreadPoolExecutor(_THREADS) as threads, eval_mode(encoder):
        _write_images(images, encoder, source, captions.items, config, skipped, threads)
    made_by = {"weights": weights_digest(encoder.clip.text_model), "ids": _digest(captions.ids, captions.starts)}
    texts = _cached(cache, "texts", made_by | shared)
    with eval_mode(encoder):
        _write_texts(texts, encoder, captions, config)
    counts = texts.map("counts")
    return States(
        images_NVSF=images.map("states"),
        rows_N=images.map("rows"),
        texts=texts.map("states").reshape(-1, width),
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
    )


def seconds_of_states(encoder: TowersEncoder, source: Source, captions: CaptionIds, config: StatesConfig) -> float:
    """Seconds that the states of an image with its captions take, by some of them."""
    tried = np.linspace(0, len(captions.items) - 1, min(_TIMED, len(captions.items))).astype(int)
    numbers = np.concatenate([np.arange(captions.first[row], captions.first[row + 1]) for row in tried])
    skipped = SkippedItems(max_skipped_share=1.0)
    began = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as threads, eval_mode(encoder):
        pixels, found = read_images(source, captions.items[tried], size=config.size, skipped=skipped, threads=threads)
        if len(found):
            image_states(encoder, channels_first(pixels), found, config)
        text_states(encoder, captions, numbers, config)
    return (time.monotonic() - began) / len(tried)


@dataclass(frozen=True, slots=True)
class _Cached:
    """A folder of arrays, finished or not, whose name tells what decides its content."""

    folder: Path
    made_by: dict[str, Any]

    @property
    def finished(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    def map(self, name: str) -> np.ndarray:
        """An array, mapped into memory; rows of an `np.memmap` itself are slower to take."""
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))


def _cached(cache: Path, kind: str, made_by: dict[str, Any]) -> _Cached:
    made_by = json.loads(json.dumps(made_by))
    name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:24]
    return _Cached(cache / f"{kind}-{name}", made_by)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:24]


def _precision(encoder: TowersEncoder, config: StatesConfig) -> str:
    with _autocast(encoder, config):
        return "bf16" if torch.is_autocast_enabled(encoder.mean_311.device.type) else "fp32"


def _autocast(encoder: TowersEncoder, config: StatesConfig) -> AbstractContextManager[object]:
    return autocast(encoder.mean_311.device, config.precision)


def _half(states: Tensor) -> np.ndarray:
    return states.float().clamp(-_LARGEST, _LARGEST).cpu().numpy().astype(np.float16)


def _write_images(
    cached: _Cached,
    encoder: TowersEncoder,
    source: Source,
    items: np.ndarray,
    config: StatesConfig,
    skipped: SkippedItems,
    threads: ThreadPoolExecutor,
) -> None:
    if cached.finished:
        for key, reason in json.loads((cached.folder / "manifest.json").read_text())["skipped"].items():
            skipped.record(key, reason)
        return
    cached.folder.parent.mkdir(parents=True, exist_ok=True)
    writer = ResumableArrayWriter(cached.folder, cached.made_by)
    skipped.reasons.update(writer.skipped)
    advance = ProgressLine("computing the features of images")
    for begin in range(writer.done, len(items), _IMAGES):
        some = items[begin : begin + _IMAGES]
        pixels, found = read_images(source, some, size=config.size, skipped=skipped, threads=threads)
        skipped.check(len(items))
        writer.skipped.update(skipped.reasons)
        arrays = {}
        if len(found):
            states_BVSF = image_states(encoder, channels_first(pixels), found, config)
            arrays = {"states": states_BVSF, "rows": begin + np.searchsorted(some, found)}
        writer.append(arrays, done=begin + len(some))
        advance(begin + len(some), len(items))
    writer.finish("manifest.json", {"made_by": cached.made_by, "skipped": writer.skipped}, lambda folder: folder)


def image_states(encoder: TowersEncoder, pixels_B3HW: Tensor, items: np.ndarray, config: StatesConfig) -> np.ndarray:
    """The states [B V S F] of the views of images; those of an image follow from its item alone."""
    pixels_B3HW = pixels_B3HW.to(encoder.mean_311.device)
    rng = RowRNG(0, 0, row_seeds=tuple(items.tolist()))
    views = []
    with _autocast(encoder, config):
        for number, view in enumerate(config.views):
            drawn = draw_view(rng, f"view{number}", len(items))
            seen = make_view(pixels_B3HW, drawn, view, size=encoder.image_size)
            views.append(_half(encoder.image_states(seen, keep_tokens=config.keep_tokens)))
    return np.stack(views, axis=1)


def _write_texts(cached: _Cached, encoder: TowersEncoder, captions: CaptionIds, config: StatesConfig) -> None:
    if cached.finished:
        return
    cached.folder.parent.mkdir(parents=True, exist_ok=True)
    writer = ResumableArrayWriter(cached.folder, cached.made_by)
    advance = ProgressLine("computing the features of captions")
    total = len(captions.starts) - 1
    for begin in range(writer.done, total, _TEXTS):
        end = min(begin + _TEXTS, total)
        states = text_states(encoder, captions, np.arange(begin, end), config)
        counts = np.array([len(each) for each in states])
        writer.append({"states": np.concatenate(states), "counts": counts}, done=end)
        advance(end, total)
    writer.finish("manifest.json", {"made_by": cached.made_by}, lambda folder: folder)


def text_states(
    encoder: TowersEncoder, captions: CaptionIds, numbers: np.ndarray, config: StatesConfig
) -> list[np.ndarray]:
    """The states [L F] of each caption; texts of about the same length are computed together."""
    device, pad = encoder.mean_311.device, encoder.tokenizer.pad_token_id
    order = numbers[np.argsort(np.diff(captions.starts)[numbers], kind="stable")]
    found: dict[int, np.ndarray] = {}
    for begin in range(0, len(order), _TEXT_ROWS):
        some = order[begin : begin + _TEXT_ROWS]
        ids_BL, valid_BL = captions.padded(some, pad=pad)
        with _autocast(encoder, config):
            states_BLF = encoder.text_states(ids_BL.to(device), valid_BL.to(device), keep_tokens=config.keep_tokens)
        lengths = 1 + valid_BL.sum(1) if config.keep_tokens else torch.ones(len(some), dtype=torch.long)
        for number, states, length in zip(some.tolist(), _half(states_BLF), lengths.tolist(), strict=True):
            found[number] = states[:length]
    return [found[number] for number in numbers.tolist()]
