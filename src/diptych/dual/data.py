"""What dual encoders learn from: images with their captions, or states of frozen towers, computed once.

    PairsData, pair_stream     pixels and ids of captions
    States, cached_states      states of the towers of a `dual/towers.py:TowersEncoder`, kept on disk, from which
                               :class:`~diptych.dual.towers.Heads` learns

The views of an image are drawn once, and the states of each view and of each caption are stored. While the heads train,
the towers are not used, and neither pixels nor texts are read.

Shapes: B rows, M captions of a row, L tokens or states of a caption, N images, V views of an image, K random numbers of
a view, S states of a view, F width of a tower.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.data.augment import ViewConfig, draw_view, make_view
from diptych.data.batch import CaptionedImageExamples, CaptionedStateExamples
from diptych.data.check import content_digest
from diptych.data.engine import ResumableArrayWriter
from diptych.data.pixels import CachedImages, SkippedItems, channels_first, read_images, shard_order
from diptych.data.sources import Source
from diptych.data.sources.columns import Columns
from diptych.data.splits import Subset
from diptych.data.streams import Stream, choose
from diptych.dual.towers import TowersEncoder
from diptych.errors import UserError
from diptych.io import weights_digest
from diptych.nn.inference import Precision, autocast, eval_mode
from diptych.report.terminal import ProgressLine
from diptych.rng import RowRNG

_AT_ONCE = 4096
"""Number of captions tokenized at once."""

Tokenize = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts to ids, not padded."""
_ITEMS = 128
"""Number of images, with their captions, after which an interrupted computation can resume."""
_TEXT_ROWS = 128
"""Number of captions that a tower encodes at once."""
_THREADS = 2
"""Number of threads that decode images."""
_LARGEST = 65504.0
"""Largest number that half precision can hold."""


@dataclass(kw_only=True, slots=True)
class PairsData:
    """Sources of the captioned images, and how they are read."""

    pairs: str
    """Captioned images to learn from: folder, table, tars, hub:owner/name or scenes:."""
    valid: str | None = None
    """Captioned images on which retrieval is measured while training."""
    valid_images: int = 1000
    """Number of images that retrieval is measured on: the first ones of `valid`, as by `diptych evaluate --limit`."""
    columns: Columns = field(default_factory=Columns)
    """Names of table columns that cannot be guessed."""
    decode_size: int | None = None
    """Side of decoded images, in pixels; views are cropped from these. Not given: 1.5 times the side of a view, for
    frozen towers just that side."""
    cache: Path | None = None
    """Folder for the features of frozen towers, which runs may share; if not given, one in the run folder."""
    cache_mb: int = 1024
    """Memory for decoded images, in MB. They are kept only if all of them fit."""
    shards_together: int = 0
    """Number of tars that are shuffled together, so that a step reads few of them; 0 shuffles all images together."""
    max_skipped_share: float = 0.01
    """Largest share of unreadable images that is left out without stopping, 0 to 1."""


@dataclass(frozen=True, slots=True)
class CaptionIds:
    """The captions of many items as ids, end to end: some 50 bytes for each caption."""

    items: np.ndarray
    """Items of the source that have captions."""
    first: np.ndarray
    """Number of each item's first caption, and one more entry for the end."""
    starts: np.ndarray
    """Where each caption begins in ``ids``, and one more entry for the end."""
    ids: np.ndarray

    @classmethod
    def read(cls, source: Source, items: np.ndarray, tokenize: Tokenize) -> "CaptionIds":
        """Tokenize all captions of ``items``. Raises UserError when no item has a caption."""
        counts, lengths, flat = [], [], []
        waiting: list[str] = []

        def tokenize_waiting() -> None:
            for row in tokenize(waiting) if waiting else []:
                lengths.append(len(row))
                flat.append(np.asarray(row, np.int32))
            waiting.clear()

        for item in items:
            captions = source.captions(int(item))
            counts.append(len(captions))
            waiting += captions
            if len(waiting) >= _AT_ONCE:
                tokenize_waiting()
        tokenize_waiting()
        if not flat:
            raise UserError(f"{source.name}: no item has a caption")
        count = np.array(counts)
        first, starts = (np.concatenate([[0], np.cumsum(sizes)]) for sizes in (count[count > 0], lengths))
        return cls(items[count > 0], first, starts, np.concatenate(flat))

    def in_random_order(self) -> "CaptionIds":
        """The same with the items in a random order, which is always the same."""
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(self.items))
        numbers = np.concatenate([np.arange(self.first[item], self.first[item + 1]) for item in order])
        first, starts = (
            np.concatenate([[0], np.cumsum(sizes)])
            for sizes in (np.diff(self.first)[order], np.diff(self.starts)[numbers])
        )
        ids = np.concatenate([self.ids[self.starts[number] : self.starts[number + 1]] for number in numbers])
        return CaptionIds(self.items[order], first, starts, ids)

    def choose(self, index: np.ndarray, epoch: np.ndarray, *, captions: int, seed: int) -> np.ndarray:
        """Numbers [B, M] of ``captions`` captions of each item.

        They are drawn anew in each epoch, and all different where the item has enough.
        """
        count = np.diff(self.first)[index]
        chosen_BM = choose(count, index, epoch, seed)[:, None] + np.arange(captions)
        return self.first[index][:, None] + chosen_BM % count[:, None]

    def padded(self, number_N: np.ndarray, *, pad: int) -> tuple[Tensor, Tensor]:
        """Ids and validity [N, L] of captions by their numbers; L is the length of the longest."""
        start_N, end_N = self.starts[number_N], self.starts[number_N + 1]
        valid_NL = np.arange((end_N - start_N).max()) < (end_N - start_N)[:, None]
        ids_NL = np.full(valid_NL.shape, pad, np.int64)
        ids_NL[valid_NL] = np.concatenate([self.ids[a:b] for a, b in zip(start_N, end_N, strict=True)])
        return torch.from_numpy(ids_NL), torch.from_numpy(valid_NL)

    def take(
        self, index: np.ndarray, epoch: np.ndarray, *, captions: int, seed: int, pad: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and validity [B, M L] of ``captions`` captions of each item, as :meth:`choose` draws them."""
        number_N = self.choose(index, epoch, captions=captions, seed=seed).ravel()
        ids_NL, valid_NL = self.padded(number_N, pad=pad)
        return ids_NL.reshape(len(index), -1), valid_NL.reshape(len(index), -1)


def pair_stream(
    source: Source,
    captions: CaptionIds,
    *,
    size: int,
    per_image: int,
    pad: int,
    skipped: SkippedItems,
    cache_mb: int,
    seed: int,
    shards_together: int = 0,
) -> Stream[CaptionedImageExamples]:
    """Every captioned image once an epoch, resized to ``size``, with ``per_image`` of its captions side by side.

    The captions of a row are ids [B, M L], padded with ``pad``. ``shards_together`` is as in `shard_order`, and raises
    UserError as there.
    """
    subset = Subset(source, captions.items)
    images = CachedImages([subset], size=size, skipped=skipped, cache_mb=cache_mb)

    def take(index: np.ndarray, epoch: np.ndarray) -> CaptionedImageExamples:
        pixels, index = images.take(index)  # an image that replaces an unreadable one brings its own captions
        ids_BL, valid_BL = captions.take(index, epoch, captions=per_image, seed=seed, pad=pad)
        return CaptionedImageExamples(pixels_B3HW=channels_first(pixels), ids_BL=ids_BL, valid_BL=valid_BL)

    return Stream(size=images.count, take=take, shards=shard_order([subset], shards_together))


# States of frozen towers


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesConfig:
    """What the states depend on besides the towers and the data."""

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
    title: str = "computing the features of images and captions",
) -> tuple[States, int]:
    """The states of the captioned images of ``source``, computed as far as the folder ``cache`` does not have them.

    ``enough`` is called after each block with the number of items so far; once it returns True, no more are computed.
    ``title`` stands before the progress. Also returns the number of items that have states: all of ``captions``, or as
    many as were enough.

    An interrupted computation resumes where it stopped. Images that cannot be read are recorded in ``skipped`` and left
    out; raises UserError for too many of them.
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
    advance = ProgressLine(title)
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
    """A folder of arrays, named by a digest of what its content depends on. A run may use it before it is complete."""

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
        """Rename the hidden folder, which is complete."""
        if self.writer is not None:
            content = {"made_by": self.writer.state["made_by"], "skipped": self.skipped}
            self.writer.finish("manifest.json", content, lambda folder: folder)
            self.writer = None

    def map(self, name: str) -> np.ndarray:
        """An array, mapped into memory; rows of an `np.memmap` itself are slower to take."""
        if self.writer is not None:
            return np.asarray(self.writer.map(name))
        return np.asarray(np.load(self._folder / f"{name}.npy", mmap_mode="r"))


def _cached(cache: Path, kind: str, made_by: dict[str, Any], *, keep_tokens: bool) -> _Cached:
    """The folder for ``made_by``. If tokens are not needed, a finished folder that has them will do."""
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
            arrays = {"states": states_BSF, "rows": block.start + np.flatnonzero(np.isin(some, found))}
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
