"""States of frozen towers, computed once and kept on disk: what :class:`~diptych.dual.towers.Heads` learns from.

Each image has the states of its views, which are drawn once; each caption has its own. Nothing else of images and
captions is needed while the heads train, and no tower computes anything.

Shapes: N images, V views of an image, K random numbers of a view, S states of a view, L states of a caption, F width of
a tower, B rows, M captions of a row.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
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
from diptych.data.check import content_digest
from diptych.data.pixels import SkippedItems, channels_first, read_images
from diptych.data.sources import Source
from diptych.data.store import ResumableArrayWriter
from diptych.data.streams import Stream
from diptych.dual.data import CaptionIds
from diptych.dual.towers import TowersEncoder
from diptych.io import weights_digest
from diptych.nn.inference import Precision, autocast, eval_mode
from diptych.report.terminal import ProgressLine
from diptych.rng import RowRNG

_ITEMS = 128
"""Images, with their captions, between two points to which an interrupted computation returns."""
_TEXT_ROWS = 128
"""Captions that a tower computes at once."""
_THREADS = 2
"""Threads that decode images."""
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

    @property
    def drawn(self) -> list[tuple[ViewConfig, int]]:
        """Each view, with its number among those that are drawn alike."""
        return [(view, list(self.views[:place]).count(view)) for place, view in enumerate(self.views)]


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """The states of images and of their captions, mapped into memory, in half precision."""

    views: list[np.ndarray]
    """The states [N, S, F] of each view."""
    rows_N: np.ndarray
    """Number of each image among the captioned items; those that cannot be read are left out."""
    texts: np.ndarray
    """The states [all of them, F] of all captions, end to end."""
    starts: np.ndarray
    """Where each caption begins in ``texts``."""
    lengths: np.ndarray
    """Number of states of each caption."""

    def stream(self, captions: CaptionIds, *, per_image: int, seed: int) -> Stream[CaptionedStateExamples]:
        """Every image once an epoch, with the states of ``per_image`` of its captions."""

        def take(index: np.ndarray, epoch: np.ndarray) -> CaptionedStateExamples:
            number_BM = captions.choose(self.rows_N[index], epoch, captions=per_image, seed=seed)
            states_BMLF, valid_BML = self._captions(number_BM)
            images_BVSF = _to_torch(np.stack([view[index] for view in self.views], axis=1))
            return CaptionedStateExamples(images_BVSF=images_BVSF, texts_BMLF=states_BMLF, valid_BML=valid_BML)

        return Stream(size=len(self.rows_N), take=take)

    def _captions(self, number_BM: np.ndarray) -> tuple[Tensor, Tensor]:
        """The states of captions, padded with zeros, and which of their tokens are valid."""
        start_BM, length_BM = self.starts[number_BM], self.lengths[number_BM]
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
    enough: Callable[[int], bool] = lambda items: False,
) -> tuple[States, int]:
    """The states of the captioned images of ``source``, computed as far as the folder ``cache`` does not have them.

    ``enough`` is asked after each block of items, with the number of items so far, whether to leave it at that. Also
    returns the number of items that have states: all of ``captions``, or as many as were enough.

    An interrupted computation goes on where it stopped. Raises UserError when too many images cannot be read; the
    others of them are recorded in ``skipped`` and left out.
    """
    width, kept = encoder.text_tower_width, {"keep_tokens": config.keep_tokens}
    shared: dict[str, Any] = {"precision": _precision(encoder, config)}
    made_by = shared | {"weights": weights_digest(encoder.clip.vision_model), "items": _digest(captions.items)}
    made_by |= {"mean": encoder.mean_311.flatten().tolist(), "std": encoder.std_311.flatten().tolist()}
    made_by |= {"size": [config.size, encoder.image_size], "source": source.name, "files": content_digest(source)}
    views = [
        _cached(cache, "images", made_by | {"view": asdict(view), "draw": draw}, **kept) for view, draw in config.drawn
    ]
    for view in views:
        skipped.reasons.update(view.skipped)
    made_by = shared | {"weights": weights_digest(encoder.clip.text_model), "first": _digest(captions.first)}
    texts = _cached(cache, "texts", made_by | {"ids": _digest(captions.ids, captions.starts)}, **kept)
    done, total = 0, len(captions.items)
    advance = ProgressLine("computing the features of images and captions")
    with ThreadPoolExecutor(_THREADS) as threads, eval_mode(encoder):
        while done < total and not (done and enough(done)):
            block = range(done, min(done + _ITEMS, total))
            _write_images(views, encoder, source, captions.items, block, config, skipped, threads)
            _write_texts(texts, encoder, captions, block, config)
            done = block.stop
            advance(done, total)
    if done == total:
        for each in (*views, texts):
            each.finish()
    rows, counts = views[0].map("rows"), texts.map("counts")[: captions.first[done]]
    states = States(
        views=[view.map("states")[:, : None if config.keep_tokens else 1] for view in views],
        rows_N=rows[rows < done],
        texts=texts.map("states").reshape(-1, width),
        starts=np.cumsum(counts, dtype=np.int64) - counts,
        lengths=counts if config.keep_tokens else np.ones_like(counts),
    )
    return states, done


class _Cached:
    """A folder of arrays whose name tells what decides its content. A run may use it before all of it is there."""

    def __init__(self, folder: Path, made_by: dict[str, Any]) -> None:
        self._folder, manifest = folder, folder / "manifest.json"
        self.writer: ResumableArrayWriter | None = None
        if manifest.is_file():
            self.skipped: dict[str, str] = json.loads(manifest.read_text())["skipped"]
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.writer = ResumableArrayWriter(folder, made_by)
        self.skipped = self.writer.skipped

    def finish(self) -> None:
        """Give the folder its name, now that everything is there."""
        if self.writer is not None:
            content = {"made_by": self.writer.state["made_by"], "skipped": self.skipped}
            self.writer.finish("manifest.json", content, lambda folder: folder)
            self.writer = None

    def map(self, name: str) -> np.ndarray:
        """An array, mapped into memory; rows of an `np.memmap` itself are slower to take."""
        folder = self._folder if self.writer is None else self.writer.readable()
        return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))


def _cached(cache: Path, kind: str, made_by: dict[str, Any], *, keep_tokens: bool) -> _Cached:
    """The folder for what ``made_by`` decides; the one with tokens serves those who need none, if it is finished."""
    folders = []
    for tokens in (True, keep_tokens):
        content = json.loads(json.dumps(made_by | {"keep_tokens": tokens}))
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
        folders.append((cache / f"{kind}-{name}", content))
    with_tokens, wanted = folders
    return _Cached(*(with_tokens if (with_tokens[0] / "manifest.json").is_file() else wanted))


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
    views: list[_Cached],
    encoder: TowersEncoder,
    source: Source,
    items: np.ndarray,
    block: range,
    config: StatesConfig,
    skipped: SkippedItems,
    threads: ThreadPoolExecutor,
) -> None:
    """Compute the states of a block of images in the views that do not have them yet, all in one pass."""
    missing = [
        (view.writer, drawn)
        for view, drawn in zip(views, config.drawn, strict=True)
        if view.writer is not None and view.writer.done < block.stop
    ]
    if not missing:
        return
    some = items[block.start : block.stop]
    pixels, found = read_images(source, some, size=config.size, skipped=skipped, threads=threads)
    skipped.check(len(items))
    for writer, drawn in missing:
        writer.skipped.update(skipped.reasons)
        arrays = {}
        if len(found):
            states_BSF = image_states(encoder, channels_first(pixels), found, *drawn, config)
            arrays = {"states": states_BSF, "rows": block.start + np.searchsorted(some, found)}
        writer.append(arrays, done=block.stop)


def image_states(
    encoder: TowersEncoder, pixels_B3HW: Tensor, items: np.ndarray, view: ViewConfig, draw: int, config: StatesConfig
) -> np.ndarray:
    """The states [B S F] of a view of images; that of an image follows from its item and ``draw`` alone."""
    rng = RowRNG(0, draw, row_seeds=tuple(items.tolist()))
    drawn_BK = draw_view(rng, "view", len(items))
    with _autocast(encoder, config):
        seen = make_view(pixels_B3HW.to(encoder.mean_311.device), drawn_BK, view, size=encoder.image_size)
        return _half(encoder.image_states(seen, keep_tokens=config.keep_tokens))


def _write_texts(
    texts: _Cached, encoder: TowersEncoder, captions: CaptionIds, block: range, config: StatesConfig
) -> None:
    """Compute the states of the captions of a block of images, if they are not there yet."""
    if texts.writer is None or texts.writer.done >= block.stop:
        return
    states = text_states(encoder, captions, np.arange(captions.first[block.start], captions.first[block.stop]), config)
    counts = np.array([len(each) for each in states])
    texts.writer.append({"states": np.concatenate(states), "counts": counts}, done=block.stop)


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
