"""Commands on runs of dual encoders: embed, search, classify.

Shapes: B rows, C classes, D width, H and W pixels.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from diptych.data.columns import Columns
from diptych.data.encode import read_pictures
from diptych.data.growing import Growing
from diptych.data.pixels import channels_first, decode_files
from diptych.data.skips import Skips
from diptych.data.texts import clean, read_text
from diptych.data.vectors import VectorStore, check_free, finish_vectors
from diptych.errors import UserError
from diptych.eval.guesses import Guess, best_guesses
from diptych.eval.search import nearest
from diptych.eval.zeroshot import ENSEMBLE, class_embeddings
from diptych.models.dual_encoder import DualEncoder
from diptych.nn.inference import Device
from diptych.nn.weights import weights_digest
from diptych.recipes.data import open_finite
from diptych.recipes.folders import kind_of
from diptych.report.sheet import contact_sheet

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
    growing = Growing(out, manifest | {"rows": len(source)}, format="npy")
    skips = Skips(reasons=growing.skipped)
    shown = track(
        range(growing.done, len(source), _ROWS), f"Embedding {side}", console=Console(stderr=True), transient=True,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with ThreadPoolExecutor(max(1, workers)) as threads:
        for begin in shown:
            items = np.arange(begin, min(begin + _ROWS, len(source)))
            if side == "images":
                pixels, items = read_pictures(source, items, encoder.image_size, skips, threads)
                skips.check(len(source))
                keys = [source.key(int(item)) for item in items]
                rows_BD = encoder.embed_images(channels_first(pixels)) if keys else None
            else:
                told = [(text, item) for item in items for text in source.captions(int(item))]
                keys, items = [text for text, _ in told], np.array([item for _, item in told])
                rows_BD = encoder.embed_texts(keys) if keys else None
            arrays = {} if rows_BD is None else {"vectors": rows_BD.half().cpu().numpy(), "items": items}
            growing.append(arrays, keys=keys, done=begin + _ROWS)
    return finish_vectors(growing, manifest), len(skips)


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
            from diptych.eval.approximate import nearest_approximate

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
) -> list[list[Guess]]:
    """The ``top`` most probable classes of each image, by the names in the file ``classes`` alone."""
    encoder = open_dual(run, device=device)
    if classes is None:
        raise UserError(f"{run}: a dual encoder knows no classes of its own: give --classes NAMES.txt")
    names = read_lines(classes, what="class name")
    prompts = read_lines(templates, what="template with {} in it") if templates else ENSEMBLE
    pixels_B3HW = decode_files(images, size=encoder.image_size)
    classes_CD = class_embeddings(encoder.embed_texts, names, templates=prompts)
    logits_BC = encoder.scale * encoder.embed_images(pixels_B3HW) @ classes_CD.T
    return best_guesses(logits_BC.softmax(1), names, top=top)


def read_lines(file: Path, *, what: str) -> list[str]:
    """A file with one text a line, clean. Raises UserError when it holds none, or one of them twice."""
    lines = [text for line in read_text(file).split("\n") if (text := clean(line))]
    if not lines:
        raise UserError(f"{file}: is empty: write one {what} a line")
    if len(set(lines)) < len(lines):
        twice = next(line for number, line in enumerate(lines) if line in lines[:number])
        raise UserError(f"{file}: {twice!r} stands there twice: once is enough")
    return lines
