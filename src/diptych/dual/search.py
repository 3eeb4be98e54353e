"""Which of many vectors lie nearest, exactly.

Shapes: Q queries, N vectors, D width, K hits of a query, B vectors of a block, C of those in the cache.
"""

import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from diptych.data.pixels import SkippedItems, channels_first, decode_files, read_images
from diptych.data.sources import open_finite
from diptych.data.sources.columns import Columns
from diptych.data.sources.text import clean, read_text
from diptych.data.store import ResumableArrayWriter, VectorStore, check_free, finish_vectors
from diptych.dual.metrics import ENSEMBLE, class_embeddings
from diptych.dual.model import DualEncoder
from diptych.errors import UserError
from diptych.io import weights_digest
from diptych.nn.inference import Device, Prediction, top_predictions
from diptych.report.sheet import contact_sheet
from diptych.run_folder import kind_of

BLOCK = 16_384
"""Vectors whose scores are held at once."""
_CACHED = 1024
"""Vectors converted to fp32 at once: they are still in the cache (2 MB at width 512) when they are multiplied."""
_QUERIES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """The best of each query, best first."""

    scores_QK: Float[Tensor, "Q K"]
    """Inner products in fp32: cosines where the vectors have length 1."""
    items_QK: Int[Tensor, "Q K"]


def nearest(queries_QD: Float[Tensor, "Q D"], vectors_ND: np.ndarray, *, k: int, block: int = BLOCK) -> Hits:
    """The ``k`` vectors (all, if there are fewer) with the largest inner product with each query.

    Every vector is scored in fp32 as it is stored, and the best of each ``block`` are merged into the best so far, so
    that there is never a matrix of all similarities. ``vectors_ND`` may be a memory map larger than memory,
    fp16 or fp32. Among equal scores any may come first.
    """
    assert k > 0, k
    stored_ND = _as_tensor(vectors_ND)
    parts = [_nearest(some_QD.float(), stored_ND, k, block) for some_QD in queries_QD.split(_QUERIES)]
    return Hits(
        scores_QK=torch.cat([part.scores_QK for part in parts]), items_QK=torch.cat([part.items_QK for part in parts])
    )


def _nearest(queries_QD: Tensor, stored_ND: Tensor, k: int, block: int) -> Hits:
    scores_BQ = queries_QD.new_empty(min(block, len(stored_ND)), len(queries_QD))
    # Both are written again and again: new memory for each block would cost more than the arithmetic.
    buffer_CD = queries_QD.new_empty(min(_CACHED, len(scores_BQ)), queries_QD.shape[1])
    scores_QK = queries_QD.new_empty(len(queries_QD), 0)
    items_QK = torch.empty_like(scores_QK, dtype=torch.int64)
    for start in range(0, len(stored_ND), len(scores_BQ)):
        vectors_BD = stored_ND[start : start + len(scores_BQ)]
        block_BQ = _score(vectors_BD, queries_QD, buffer_CD, scores_BQ[: len(vectors_BD)])
        found = block_BQ.T.topk(min(k, len(vectors_BD)))
        scores, items = torch.cat([scores_QK, found.values], 1), torch.cat([items_QK, found.indices + start], 1)
        best = scores.topk(min(k, scores.shape[1]))
        scores_QK, items_QK = best.values, items.gather(1, best.indices)
    return Hits(scores_QK=scores_QK, items_QK=items_QK)


def _score(vectors_BD: Tensor, queries_QD: Tensor, buffer_CD: Tensor, scores_BQ: Tensor) -> Tensor:
    """Fills ``scores_BQ``."""
    pieces = zip(vectors_BD.split(len(buffer_CD)), scores_BQ.split(len(buffer_CD)), strict=True)
    for some_CD, scores_CQ in pieces:
        if (some_CD.dtype, some_CD.device) != (buffer_CD.dtype, buffer_CD.device):
            some_CD = buffer_CD[: len(some_CD)].copy_(some_CD)
        torch.mm(some_CD, queries_QD.T, out=scores_CQ)
    return scores_BQ


def _as_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # of memory mapped for reading only, which nobody here writes to
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


# JOINED eval.approximate
#| Searching more vectors than one waits for: an inverted file of faiss beside the store, by the extra ``ann``.
#|
#| The vectors are sorted into about sqrt(N) cells; a query visits the ``PROBES`` cells whose centres lie nearest. What it
#| finds has the scores of exact search (up to fp16), but a neighbour in a cell that was not visited is missed.
#|
#| Shapes: Q queries, N vectors, D width, K hits of a query.


PROBES = 32
_INDEX = "index.faiss"
_SAMPLE = 64
"""Vectors per cell from which the cells are learnt."""


def nearest_approximate(queries_QD: Float[Tensor, "Q D"], store: VectorStore, *, k: int, probes: int = PROBES) -> Hits:
    """As `search.nearest`, by an index that the first call builds and leaves in the store's folder.

    Building takes about half a minute a million vectors on two cores, and memory for all of them in fp16. A query
    whose cells hold fewer than ``k`` vectors gets -1 for the rest. Raises UserError without faiss.
    """
    faiss = _import_faiss()
    file = store.folder / _INDEX
    if not file.exists():
        _build(faiss, store, file)
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise UserError(f"{file}: not a readable index: delete it and the next search builds it anew") from error
    index.nprobe = probes
    scores_QK, items_QK = index.search(np.ascontiguousarray(queries_QD.cpu().float().numpy()), min(k, len(store)))
    return Hits(scores_QK=torch.from_numpy(scores_QK), items_QK=torch.from_numpy(items_QK))


def _build(faiss: Any, store: VectorStore, file: Path) -> None:
    count, width = store.vectors.shape
    cells = max(1, min(round(count**0.5), count // _SAMPLE))
    index = faiss.index_factory(width, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    step = max(1, count // (_SAMPLE * cells))
    index.train(store.vectors[::step].astype(np.float32))
    for start in range(0, count, BLOCK):
        index.add(store.vectors[start : start + BLOCK].astype(np.float32))
    partial = file.with_name(f".{file.name}.partial")
    faiss.write_index(index, str(partial))
    partial.rename(file)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"approximate search needs faiss ({error}): pip install 'diptych[ann]'") from error
    return faiss


# JOINED recipes.dual_runs
#| Commands on runs of dual encoders: embed, search, classify.
#|
#| Shapes: B rows, C classes, D width, H and W pixels.


Side = Literal["images", "texts"]
Method = Literal["exact", "approximate"]
_ROWS = 256
_THUMBNAIL = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    score: float
    """Cosine."""
    key: str
    """Of an image its name in the source; of a text the text."""
    item: int
    """Its place in the source."""


def open_dual(run: Path, *, device: Device) -> DualEncoder:
    """Raises UserError for a run of another kind, or one that is not finished."""
    if (kind := kind_of(run)) != "dual":
        raise UserError(f"{run}: a run of kind {kind!r} holds no dual encoder: give a run of clip, siglip, slip or ito")
    if not (run / "model").is_dir():
        raise UserError(f"{run}: has no model/, so it is no finished run: let `diptych fit` finish it")
    return DualEncoder.from_pretrained(run / "model", device=device)


def embed_run(run: Path, spec: str, *, side: Side, out: Path, workers: int, device: Device) -> tuple[VectorStore, int]:
    """Embeddings of all images or all texts of a source, as a store in half precision. Interrupted, it goes on where it
    stopped.

    Also gives the number of pictures that cannot be read: they are left out and listed in ``skipped.jsonl``.
    """
    check_free(out)
    source = open_finite(spec, Columns())
    if not (source.has_images if side == "images" else source.has_captions):
        raise UserError(f"{source.name}: has no {side} to embed")
    encoder = open_dual(run, device=device)
    manifest = {"side": side, "source": spec, "run": str(run), "model": weights_digest(encoder)}
    writer = ResumableArrayWriter(out, manifest | {"rows": len(source)})
    skipped = SkippedItems(reasons=writer.skipped)
    shown = track(
        range(writer.done, len(source), _ROWS), f"Embedding {side}", console=Console(stderr=True), transient=True,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in shown:
            items = np.arange(begin, min(begin + _ROWS, len(source)))
            if side == "images":
                pixels, items = read_images(source, items, size=encoder.image_size, skipped=skipped, threads=threads)
                skipped.check(len(source))
                keys = [source.key(int(item)) for item in items]
                rows_BD = encoder.embed_images(channels_first(pixels)) if keys else None
            else:
                told = [(text, item) for item in items for text in source.captions(int(item))]
                keys, items = [text for text, _ in told], np.array([item for _, item in told])
                rows_BD = encoder.embed_texts(keys) if keys else None
            arrays = {} if rows_BD is None else {"vectors": rows_BD.half().cpu().numpy(), "items": items}
            writer.append(arrays, keys=keys, done=begin + _ROWS)
    return finish_vectors(writer, manifest), len(skipped)


class Index:
    """A store, and the model that made it."""

    def __init__(self, run: Path, store: Path, *, device: Device) -> None:
        """Raises UserError for a store of another model: its embeddings mean nothing to this one."""
        self.store = VectorStore.open(store)
        self.encoder = open_dual(run, device=device)
        if self.store.manifest.get("model") != weights_digest(self.encoder):
            made_by = self.store.manifest.get("run", "another program")
            raise UserError(f"{store}: made by another model ({made_by}): diptych embed {run} SRC --out NEW")

    def search(self, query: str | Path, *, top: int, method: Method = "exact") -> list[Hit]:
        """What lies nearest to a text or, given its path, to an image."""
        if top < 1:
            raise UserError(f"the best {top}: ask for one hit at least")
        if isinstance(query, Path):
            query_1D = self.encoder.embed_images(decode_files([query], size=self.encoder.image_size))
        elif clean(query):
            query_1D = self.encoder.embed_texts([clean(query)])
        else:
            raise UserError("an empty text finds nothing: say what to look for")
        if method == "exact":
            found = nearest(query_1D, self.store.vectors, k=top)
        else:
            found = nearest_approximate(query_1D, self.store, k=top)
        items = self.store.array("items")
        assert items is not None
        return [
            Hit(score=score, key=self.store.keys[row], item=int(items[row]))
            for score, row in zip(found.scores_QK[0].tolist(), found.items_QK[0].tolist(), strict=True)
            if row >= 0  # an approximate search may find fewer
        ]

    def sheet(self, hits: Sequence[Hit], *, title: str) -> Image.Image:
        """The pictures of the hits. Raises UserError where the source is not what it was, or has no pictures."""
        made_of = self.store.manifest
        if made_of["side"] != "images":
            raise UserError(f"{self.store.folder}: holds texts, which no contact sheet can show: leave --out away")
        source = open_finite(made_of["source"], Columns())
        if any(hit.item >= len(source) or source.key(hit.item) != hit.key for hit in hits):
            raise UserError(f"{source.name}: not what it was when {self.store.folder} was made: embed it again")
        pictures = [source.image(hit.item, _THUMBNAIL) for hit in hits]
        captions = [f"{hit.score:.3f} {hit.key}" for hit in hits]
        return contact_sheet(pictures, captions=captions, title=title, side=_THUMBNAIL)


def classify_run(
    run: Path, images: Sequence[Path], *, classes: Path | None, templates: Path | None, top: int, device: Device
) -> list[list[Prediction]]:
    """The ``top`` most probable classes of each image, by the names in the file ``classes`` alone."""
    encoder = open_dual(run, device=device)
    if classes is None:
        raise UserError(f"{run}: a dual encoder knows no classes of its own: give --classes NAMES.txt")
    names = read_lines(classes, what="class name")
    prompts = read_lines(templates, what="template with {} in it") if templates else ENSEMBLE
    pixels_B3HW = decode_files(images, size=encoder.image_size)
    classes_CD = class_embeddings(encoder.embed_texts, names, templates=prompts)
    logits_BC = encoder.scale * encoder.embed_images(pixels_B3HW) @ classes_CD.T
    return top_predictions(logits_BC.softmax(1), names, top=top)


def read_lines(file: Path, *, what: str) -> list[str]:
    """A file with one text a line, clean. Raises UserError when it holds none, or one of them twice."""
    lines = [text for line in read_text(file).split("\n") if (text := clean(line))]
    if not lines:
        raise UserError(f"{file}: is empty: write one {what} a line")
    if len(set(lines)) < len(lines):
        twice = next(line for number, line in enumerate(lines) if line in lines[:number])
        raise UserError(f"{file}: {twice!r} stands there twice: once is enough")
    return lines
