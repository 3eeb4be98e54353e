"""The commands `embed`, `search` and `classify` on runs of dual encoders, and the nearest-neighbour search below them.

Search is exact (:func:`nearest`) or approximate (:func:`nearest_approximate`, which needs the extra ``ann``).

Shapes: Q queries, N stored vectors, D width, K hits of a query, B rows of a batch or vectors of a block, C vectors of a
block that are in the cache or classes, H and W pixels, S side of an image.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from diptych.data.check import note_on_lengths
from diptych.data.class_texts import read_names
from diptych.data.engine import LOCAL, Engine, ResumableArrayWriter, Rows
from diptych.data.pixels import SkippedItems, channels_first, decode_files, read_block
from diptych.data.sources import Source, open_finite
from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import decode
from diptych.data.sources.text import clean, read_text
from diptych.data.store import VectorStore, check_free, finish_vectors
from diptych.dual.metrics import ENSEMBLE, class_embeddings
from diptych.dual.model import DualEncoder, open_dual
from diptych.errors import UserError
from diptych.io import replace_folder, weights_digest
from diptych.nn.inference import Device, Prediction, top_predictions
from diptych.report.sheet import contact_sheet
from diptych.report.terminal import ProgressLine

Side = Literal["images", "texts"]
Method = Literal["exact", "approximate"]

BLOCK = 16_384
"""Number of vectors whose scores are held at once."""
_CACHED = 1024
"""Number of vectors converted to fp32 at once: few enough to stay in the cache (2 MB at width 512) until multiplied."""
_QUERIES = 256
"""Number of queries searched at once."""
PROBES = 32
"""Number of cells that an approximate search visits for each query."""
_SAMPLE = 64
"""Number of vectors for each cell from which the centres of the cells are learnt."""
_INDEX = "index.faiss"
"""File, in the folder of a store, of an index of whole vectors."""
_CODES = "ivfpq"
"""Folder, in that of a store, of the parts of an index of short codes."""
_FEWEST = 10_000
"""Smallest number of vectors from which 256 codes for each part of a vector can be learnt well."""
_SAMPLE_BYTES = 256 * 2**20
"""Bytes of the sample from which an index of codes is learnt."""
_PART = 4_000_000
"""Number of vectors whose codes are in memory at once while an index is built."""
_RANKED = 20
"""Number of vectors found by their codes that are then compared exactly, for each hit that is wanted."""
_IN_A_GROUP = 16_384
"""Number of vectors in a row group of parquet: what a reader holds at once."""
_ROWS = 256
"""Number of items of a source after which an interrupted `embed` can resume."""
_THUMBNAIL = 160
"""Side of an image on a contact sheet, in pixels."""


# Nearest neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """The nearest vectors of each query, best first."""

    scores_QK: Float[Tensor, "Q K"]
    """Inner products in fp32: cosines where the vectors have length 1."""
    items_QK: Int[Tensor, "Q K"]
    """Rows of the vectors; -1 where an approximate search found fewer than K."""


def nearest(queries_QD: Float[Tensor, "Q D"], vectors_ND: np.ndarray, *, k: int, block: int = BLOCK) -> Hits:
    """The ``k`` vectors (all, if there are fewer) with the largest inner product with each query: an exact search.

    The vectors are scored in fp32, one ``block`` after another, and the best of each block are merged into the best so
    far, so that the matrix of all similarities never exists. ``vectors_ND`` is fp16 or fp32 and may be a memory map
    larger than memory. The order among equal scores is not defined.
    """
    assert k > 0, k
    stored_ND = _as_tensor(vectors_ND)
    parts = [_nearest(some_QD.float(), stored_ND, k, block) for some_QD in queries_QD.split(_QUERIES)]
    return Hits(
        scores_QK=torch.cat([part.scores_QK for part in parts]), items_QK=torch.cat([part.items_QK for part in parts])
    )


def _nearest(queries_QD: Tensor, stored_ND: Tensor, k: int, block: int) -> Hits:
    scores_BQ = queries_QD.new_empty(min(block, len(stored_ND)), len(queries_QD))
    # Both buffers are used again for every block: new memory for each would cost more than the arithmetic.
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
    """Fill ``scores_BQ`` with the inner products and return it; ``buffer_CD`` holds vectors converted to fp32."""
    pieces = zip(vectors_BD.split(len(buffer_CD)), scores_BQ.split(len(buffer_CD)), strict=True)
    for some_CD, scores_CQ in pieces:
        if (some_CD.dtype, some_CD.device) != (buffer_CD.dtype, buffer_CD.device):
            some_CD = buffer_CD[: len(some_CD)].copy_(some_CD)
        torch.mm(some_CD, queries_QD.T, out=scores_CQ)
    return scores_BQ


def _as_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # torch warns that the memory map is read-only; nothing here writes to it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def nearest_approximate(queries_QD: Float[Tensor, "Q D"], store: VectorStore, *, k: int, probes: int = PROBES) -> Hits:
    """As :func:`nearest`, for so many vectors that exact search is too slow, by an inverted file of faiss.

    The vectors are sorted into about sqrt(N) cells, and a query visits the ``probes`` cells with the nearest centres.
    The scores are those of exact search (up to fp16), but a neighbour in a cell that is not visited is missed. A query
    whose cells hold fewer than ``k`` vectors gets item -1 for the rest.

    If :func:`build_ivfpq` left an index in the store's folder, it finds candidates by their codes, which are then
    compared by their vectors. Else the first call builds an index of the whole vectors there. This takes about half a
    minute for each million vectors on two cores, and memory for all of them in fp16. Raises UserError where faiss is
    not installed.
    """
    faiss = import_faiss()
    queries = np.ascontiguousarray(queries_QD.cpu().float().numpy())
    k = min(k, len(store))
    if (store.folder / _CODES).is_dir():
        return _nearest_by_codes(faiss, queries, store, k=k, probes=probes)
    file = store.folder / _INDEX
    if not file.exists():
        _build(faiss, store, file)
    scores_QK, items_QK = _open_index(faiss, file, probes).search(queries, k)
    return Hits(scores_QK=torch.from_numpy(scores_QK), items_QK=torch.from_numpy(items_QK))


def _open_index(faiss: Any, file: Path, probes: int) -> Any:
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        mend = "and the next search builds it anew" if file.name == _INDEX else f"{file.parent} and embed again"
        raise UserError(f"{file}: not a readable index: delete it {mend}") from error
    index.nprobe = probes
    return index


def _nearest_by_codes(faiss: Any, queries_QD: np.ndarray, store: VectorStore, *, k: int, probes: int) -> Hits:
    """The best by their codes in each part of the index, compared as they are."""
    near_QR = np.empty((len(queries_QD), 0), np.int64)
    scores_QR = np.empty(near_QR.shape, np.float32)
    for file in sorted((store.folder / _CODES).iterdir()):
        scores, rows = _open_index(faiss, file, probes).search(queries_QD, min(_RANKED * k, len(store)))
        scores_QR, near_QR = np.concatenate([scores_QR, scores], 1), np.concatenate([near_QR, rows], 1)
        best = np.argsort(-scores_QR, axis=1, kind="stable")[:, : scores.shape[1]]
        scores_QR, near_QR = np.take_along_axis(scores_QR, best, 1), np.take_along_axis(near_QR, best, 1)
    scores_QK = torch.full((len(queries_QD), k), -torch.inf)
    items_QK = torch.full(scores_QK.shape, -1)
    for row, near_R in enumerate(near_QR):
        held = np.sort(near_R[near_R >= 0])  # in the order in which they lie on disk
        found = nearest(torch.from_numpy(queries_QD[row : row + 1]), store.vectors[held], k=k)
        count = found.items_QK.shape[1]
        scores_QK[row, :count], items_QK[row, :count] = found.scores_QK[0], torch.from_numpy(held)[found.items_QK[0]]
    return Hits(scores_QK=scores_QK, items_QK=items_QK)


def _build(faiss: Any, store: VectorStore, file: Path) -> None:
    count, width = store.vectors.shape
    cells = max(1, min(round(count**0.5), count // _SAMPLE))
    index = faiss.index_factory(width, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    step = max(1, count // (_SAMPLE * cells))
    index.train(store.vectors[::step].astype(np.float32))
    _add(index, store.vectors, range(count))
    fresh = file.with_name(f".{file.name}.partial")
    faiss.write_index(index, str(fresh))
    fresh.rename(file)


def _add(index: Any, vectors_ND: np.ndarray, rows: range) -> None:
    for start in range(rows.start, rows.stop, BLOCK):
        end = min(start + BLOCK, rows.stop)
        index.add_with_ids(vectors_ND[start:end].astype(np.float32), np.arange(start, end))


def build_ivfpq(store: VectorStore, *, advance: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Build an index for :func:`nearest_approximate` in the folder of the store: an inverted file of short codes.

    A vector takes an eighth of a byte for each of its numbers (product quantization; Jegou et al., "Product
    Quantization for Nearest Neighbor Search", 2011) and eight bytes for its row. Memory holds the sample from which
    cells and codes are learnt (256 MB at most) and the codes of four million vectors, however many there are; the rest
    is on disk, and stays there when it is searched. Raises UserError for fewer than 10,000 vectors and where faiss is
    not installed.
    """
    faiss = import_faiss()
    count, width = store.vectors.shape
    if count < _FEWEST:
        raise UserError(
            f"{store.folder}: {count:,} embeddings, too few to learn an ivfpq index from ({_FEWEST:,}); "
            "leave --index away: exact search is fast"
        )
    sample = min(count, max(_FEWEST, min(_SAMPLE * round(count**0.5), _SAMPLE_BYTES // (4 * width))))
    cells = min(round(count**0.5), sample // _SAMPLE)
    codes = max(size for size in range(1, max(1, width // 8) + 1) if width % size == 0)
    index = faiss.index_factory(width, f"IVF{cells},PQ{codes}", faiss.METRIC_INNER_PRODUCT)
    index.do_polysemous_training = False  # an order of the codes that is not used here, and most of the time
    index.train(store.vectors[np.linspace(0, count - 1, sample).astype(np.int64)].astype(np.float32))
    folder, fresh = store.folder / _CODES, store.folder / f".{_CODES}.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for number, start in enumerate(range(0, count, _PART)):
        rows = range(start, min(start + _PART, count))
        _add(index, store.vectors, rows)
        faiss.write_index(index, str(fresh / f"{number:05d}.faiss"))
        index.reset()
        advance(rows.stop, count)
    replace_folder(fresh, folder)
    return folder


def import_faiss() -> Any:
    """faiss. Raises UserError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"an index needs faiss ({error}): pip install 'diptych[ann]'") from error
    return faiss


# The commands


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """An image or a text that a search found."""

    score: float
    """Cosine with the query."""
    key: str
    """Of an image, its name in the source; of a text, the text."""
    item: int
    """Number of the item in the source."""


def open_with_source(run: Path, spec: str, device: Device) -> tuple[DualEncoder, Source]:
    """A dual encoder, and a source for it to go through."""
    return open_dual(run, device=device), open_finite(spec, Columns())


def embed_run(
    run: Path, spec: str, *, side: Side, out: Path, workers: int, device: Device, engine: Engine = LOCAL
) -> tuple[VectorStore, int]:
    """Embed all images or all texts of the source ``spec`` into the store ``out``, in half precision.

    An interrupted call resumes where it stopped. Returns the store and the number of unreadable images, which are left
    out and listed in ``skipped.jsonl``. Raises UserError for a source without that side, and when too many images are
    unreadable.
    """
    check_free(out)
    opened = partial(open_with_source, run, spec, device)
    encoder, source = opened()
    if not (source.has_images if side == "images" else source.has_captions):
        raise UserError(f"{source.name}: has no {side} to embed")
    manifest = {"side": side, "source": spec, "run": str(run), "model": weights_digest(encoder)}
    writer = ResumableArrayWriter(out, manifest | {"rows": len(source)})
    skipped = SkippedItems(reasons=writer.skipped)
    replace(engine, reopen=opened).write(
        writer,
        partial(_embed_block, side=side, workers=workers),
        (encoder, source),
        np.arange(len(source)),
        rows=_ROWS,
        skipped=skipped,
        advance=ProgressLine(f"embedding {side}"),
    )
    return finish_vectors(writer, manifest), len(skipped)


def embed_into_parquet(out: Path, **arguments: Any) -> tuple[int, int]:
    """As :func:`embed_run`, into a table for a vector database, `out.parquet`. Returns the numbers of rows and skipped.

    The store is made beside it in a hidden folder, and what is skipped is listed in `out.skipped.jsonl`.
    """
    folder = out.with_name(f".{out.name}.vectors")
    store, skipped = embed_run(out=folder, **arguments)
    _write_parquet(store, out)
    if skipped:
        os.replace(folder / "skipped.jsonl", out.with_suffix(".skipped.jsonl"))
    shutil.rmtree(folder)
    return len(store), skipped


def _write_parquet(store: VectorStore, out: Path) -> None:
    """Write a store as one table, as vector databases take it: `key`, the further arrays, and `vector` in fp32.

    The manifest is in the metadata of the schema, as JSON under `diptych`. The file appears when it is complete.
    """
    import pyarrow
    import pyarrow.parquet

    width = store.vectors.shape[1]
    types = {"key": pyarrow.string()}
    types |= {name: pyarrow.from_numpy_dtype(array.dtype) for name, array in store.further.items()}
    types["vector"] = pyarrow.list_(pyarrow.float32(), width)
    schema = pyarrow.schema(types.items(), metadata={"diptych": json.dumps(store.manifest)})
    fresh = out.with_name(f".{out.name}.fresh")  # one a kill left is written anew
    with pyarrow.parquet.ParquetWriter(fresh, schema) as writer:
        for start in range(0, len(store), _IN_A_GROUP):
            rows = slice(start, start + _IN_A_GROUP)
            flat = np.asarray(store.vectors[rows], np.float32).reshape(-1)
            # File names may be bytes that no text holds; a table has no place for them.
            keys = [key.encode("utf-8", "replace").decode() for key in store.keys[rows]]
            columns = [pyarrow.array(keys), *(pyarrow.array(array[rows]) for array in store.further.values())]
            columns.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), width))
            writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    os.replace(fresh, out)


def _embed_block(tools: tuple[DualEncoder, Source], items: np.ndarray, *, side: Side, workers: int) -> Rows:
    encoder, source = tools
    skipped: dict[str, str] = {}
    if side == "images":
        pixels, items, skipped = read_block(source, items, size=encoder.image_size, workers=workers)
        keys = [source.key(int(item)) for item in items]
        rows_BD = encoder.embed_images(channels_first(pixels)) if keys else None
    else:
        captions = [(text, item) for item in items for text in source.captions(int(item))]
        keys, items = [text for text, _ in captions], np.array([item for _, item in captions])
        rows_BD = encoder.embed_texts(keys) if keys else None
    arrays = {} if rows_BD is None else {"vectors": rows_BD.half().cpu().numpy(), "items": items}
    return Rows(arrays=arrays, keys=keys, skipped=skipped)


class Index:
    """A store of embeddings together with the model that made it."""

    def __init__(self, run: Path, store: Path, *, device: Device = "auto", encoder: DualEncoder | None = None) -> None:
        """``encoder`` is that of the run, if it is loaded already.

        Raises UserError for a store that another model made, whose embeddings cannot be compared with this model's.
        """
        self.store = VectorStore.open(store)
        self.encoder = encoder or open_dual(run, device=device)
        if self.store.manifest.get("model") != weights_digest(self.encoder):
            made_by = self.store.manifest.get("run", "another program")
            raise UserError(f"{store}: made by another model ({made_by}): diptych embed {run} SRC --out NEW")

    def search(
        self, query: str | Path | UInt8[np.ndarray, "S S 3"], *, top: int, method: Method | None = None
    ) -> list[SearchResult]:
        """The ``top`` items of the store nearest to a text, to the image at a path or to pixels, best first.

        Without a ``method`` it is approximate where :func:`build_ivfpq` left an index, else exact.

        Raises UserError for an empty text, an unreadable image, and a ``top`` below 1.
        """
        if top < 1:
            raise UserError(f"the best {top}: ask for one hit at least")
        if isinstance(query, Path):
            query_1D = self.encoder.embed_images(decode_files([query], size=self.encoder.image_size))
        elif isinstance(query, np.ndarray):
            query_1D = self.encoder.embed_images(channels_first(query[None]))
        elif clean(query):
            query_1D = self.encoder.embed_texts([clean(query)])
            if note := note_on_lengths([len(self.encoder.ids(clean(query))[0])], self.encoder.max_text_len):
                print(note, file=sys.stderr)
        else:
            raise UserError("an empty text finds nothing: say what to look for")
        if method is None:
            method = "approximate" if (self.store.folder / _CODES).is_dir() else "exact"
        if method == "exact":
            found = nearest(query_1D, self.store.vectors, k=top)
        else:
            found = nearest_approximate(query_1D, self.store, k=top)
        items = self.store.array("items")
        assert items is not None
        return [
            SearchResult(score=score, key=self.store.keys[row], item=int(items[row]))
            for score, row in zip(found.scores_QK[0].tolist(), found.items_QK[0].tolist(), strict=True)
            if row >= 0
        ]

    @property
    def holds_images(self) -> bool:
        """Whether the store holds embeddings of images, not of texts."""
        return self.store.manifest["side"] == "images"

    @cached_property
    def _source(self) -> Source:
        return open_finite(self.store.manifest["source"], Columns())

    def images(self, results: Sequence[SearchResult]) -> list[UInt8[np.ndarray, "S S 3"]]:
        """Thumbnails of the images that were found. Raises UserError where the source is not what was embedded."""
        source = self._source
        if any(result.item >= len(source) or source.key(result.item) != result.key for result in results):
            raise UserError(f"{source.name}: not what it was when {self.store.folder} was made: embed it again")
        return [source.image(result.item, _THUMBNAIL) for result in results]

    def sheet(self, results: Sequence[SearchResult], *, query: str | Path) -> Image.Image:
        """A contact sheet of the images that were found, after the image that was searched for.

        Raises UserError where the source has changed since it was embedded, and for a store of texts.
        """
        if not self.holds_images:
            raise UserError(f"{self.store.folder}: holds texts, which no contact sheet can show: leave --out away")
        images = self.images(results)
        captions = [f"{result.score:.3f} {result.key}" for result in results]
        if isinstance(query, Path):
            images.insert(0, decode(query, _THUMBNAIL))
            captions.insert(0, f"searched for: {query.name}")
        return contact_sheet(images, captions=captions, title=str(query), side=_THUMBNAIL)


class ZeroShotClassifier:
    """Classifies images by the names of the classes alone."""

    def __init__(self, encoder: DualEncoder, names: Sequence[str], *, templates: Sequence[str] = ENSEMBLE) -> None:
        """``templates`` are prompts with {} for the name of a class. Raises UserError for one without {}."""
        self.encoder, self.names, self.image_size = encoder, names, encoder.image_size
        self._classes_CD = class_embeddings(encoder.embed_texts, names, templates=templates)

    @classmethod
    def open(cls, run: Path, *, classes: Path, templates: Path | None, device: Device) -> "ZeroShotClassifier":
        """The dual encoder of ``run``, with a file of the name of a class on each line, and one of templates if wanted.

        A name that occurs twice counts once. Raises UserError for a file that cannot be read.
        """
        names = list(dict.fromkeys(read_names(classes)))
        prompts = read_templates(templates) if templates else ENSEMBLE
        return cls(open_dual(run, device=device), names, templates=prompts)

    def predictions(self, pixels_B3SS: UInt8[Tensor, "B 3 S S"], *, top: int) -> list[list[Prediction]]:
        """The ``top`` most probable classes of each image, best first."""
        logits_BC = self.encoder.scale * self.encoder.embed_images(pixels_B3SS) @ self._classes_CD.T
        return top_predictions(logits_BC.softmax(1), self.names, top=top)


def read_templates(file: Path) -> list[str]:
    """The different lines of a file. Raises UserError when it holds none."""
    lines = list(dict.fromkeys(text for line in read_text(file).split("\n") if (text := clean(line))))
    if not lines:
        raise UserError(f"{file}: is empty: write one template with {{}} in it a line")
    return lines
