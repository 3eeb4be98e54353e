"""What is wrong with a data set: pairs that do not fit, images and captions that are there twice, odd sizes.

A run says how well a caption fits its image (`pair_fits` of `itit/` and `dual/`); the rest needs no run. The findings
become a table, a sheet of the worst pairs, and a list of what to keep, which `?keep=` makes a source of.

Shapes: N images, B bits of a print, P pairs.
"""

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from diptych.data.check import open_images
from diptych.data.engine import LOCAL, Engine, Rows
from diptych.data.pixels import SkippedItems, read_image
from diptych.data.sources import Source
from diptych.io import write_bytes
from diptych.report.sheet import contact_sheet, save_png

_SMALL = 8
"""Side in cells of the averages that make an image's print."""
_CELLS = (_SMALL, _SMALL, 3)
_BLOCK = 256
"""Images that are opened between two points to which an interrupted audit returns."""
_BITS = 10
"""Largest number of the 112 bits of two prints in which near duplicates differ."""
_COLOUR = 10.0
"""Largest mean difference of their averages, on the scale from 0 to 255."""
_ROWS = 2048
"""Number of images that are compared with all others at a time."""
_LONGEST = 60
"""Words beyond which a caption is called long: text encoders cut captions at 64 tokens or 77."""
_WIDE = 3.0
"""Ratio of the sides from which an image is called odd: its centre square shows less than a third of it."""
_ON_SHEET = 24
_HAS_OPTIONS = re.compile(r"\?\w+=")


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a caption fits its image. Only the order of the values matters; a smaller value is worse."""

    item: int
    caption: int
    """Which of the item's captions."""
    fit: float


def fits_of(items: Int[np.ndarray, "N"], counts: Int[np.ndarray, "N"], fits: Float[np.ndarray, "P"]) -> list[Fit]:
    """The fits of the pairs of ``items``, so many of each as ``counts`` says, in their order."""
    places = [(int(item), number) for item, count in zip(items, counts, strict=True) for number in range(count)]
    return [Fit(item, number, fit) for (item, number), fit in zip(places, fits.tolist(), strict=True)]


@dataclass(slots=True, kw_only=True)
class Finding:
    """An image with one of its captions, or an image without any."""

    item: int
    key: str
    caption: str = ""
    fit: float | None = None
    rank: float | None = None
    """Share of all pairs that fit worse, 0 to 1."""
    same_image: str = ""
    """Key of an earlier image that is the same or nearly so."""
    reasons: list[str] = field(default_factory=list)
    """What is to be looked at; empty for a pair that nothing speaks against."""
    decided: bool | None = None
    """Whether a user wants to keep it; None where none has said so."""

    @property
    def kept(self) -> bool:
        """Whether the caption stays with its image: as the user says, else if nothing grave speaks against it."""
        return self.decided if self.decided is not None else _GRAVE.isdisjoint(self.reasons)


def audit(
    source: Source,
    fits: Sequence[Fit] | None,
    *,
    worst: float,
    engine: Engine = LOCAL,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """The findings on every pair and every image without a caption of ``source``, those that fit worst first.

    Pairs in the ``worst`` share of ``fits`` are marked for a look; near duplicates are compared by their centre
    squares. The ``reopen`` of another engine than the local gives the source.
    """
    items = np.arange(len(source))
    images = {}
    if source.has_images:
        images = engine.gather(
            "images", _look, source, items, source=source, rows=_BLOCK, skipped=SkippedItems(), advance=advance
        )
    twins = _near(images["cells"], images["readable"]) if images else {}
    findings, of_pair = [], {}
    seen: dict[str, str] = {}
    for item in range(len(source)):
        key, captions = source.key(item), source.captions(item)
        for number, caption in enumerate(captions or [""]):
            found = Finding(item=item, key=key, caption=caption)
            findings.append(found)
            of_pair[item, number] = found
            if images and not images["readable"][item]:
                found.reasons.append("unreadable image")
            elif images and max(size := images["sizes"][item].tolist()) >= _WIDE * max(1, min(size)):
                found.reasons.append(f"sides of {size[0] / size[1]:.1f} : 1")
            if item in twins:
                found.same_image = source.key(twins[item])
                found.reasons.append("image there twice")
            if not caption:
                found.reasons.append("no caption")
                continue
            if len(caption.split()) > _LONGEST:
                found.reasons.append("long caption")
            first = seen.setdefault(caption.casefold(), key)
            if first != key:
                found.reasons.append("caption of another image too")
            elif captions.index(caption) < number:
                found.reasons.append("caption there twice")
    if fits:
        order = np.argsort([each.fit for each in fits], kind="stable")
        for place, index in enumerate(order):
            found = of_pair[fits[index].item, fits[index].caption]
            found.fit, found.rank = fits[index].fit, place / len(fits)
            if place < worst * len(fits):
                found.reasons.insert(0, "caption does not fit")
    findings.sort(key=lambda found: (found.fit is None, found.fit if found.fit is not None else 0.0, found.item))
    return findings


def near_duplicates(pixels: Sequence[UInt8[np.ndarray, "S S 3"] | None]) -> dict[int, int]:
    """For each image that is the same as an earlier one, or nearly so, the number of the earliest such image.

    Images that were compressed again, resized or mirrored count as the same. The comparison takes the signs of the
    brightness differences between neighbouring cells of an 8 x 8 average, and then the colours of the cells.
    """
    readable = np.array([image is not None for image in pixels], bool)
    cells = [np.zeros(_CELLS, np.float32) if image is None else _cells(image) for image in pixels]
    return _near(np.stack(cells), readable) if cells else {}


def _look(source: Source, items: np.ndarray) -> Rows:
    """What of each image is compared, and its sides in pixels; 0 where they are not known."""
    opened = list(open_images(source, items.tolist()))
    cells = [np.zeros(_CELLS, np.float32) if image.pixels is None else _cells(image.pixels) for image in opened]
    sizes = np.array([image.size or (0, 0) for image in opened], np.int32)
    readable = np.array([image.pixels is not None for image in opened], bool)
    return Rows(arrays={"cells": np.stack(cells), "sizes": sizes, "readable": readable})


def _near(cells: Float[np.ndarray, "N 8 8 3"], readable: Bool[np.ndarray, "N"]) -> dict[int, int]:
    held = np.flatnonzero(readable).tolist()
    if not held:
        return {}
    cells_N = cells[readable]
    prints_N = _prints(cells_N)
    others = [(prints_N, cells_N), (_prints(cells_N[:, :, ::-1]), cells_N[:, :, ::-1])]
    earliest = list(range(len(held)))
    for start in range(0, len(held), _ROWS):
        end = min(start + _ROWS, len(held))
        # Only with those before the end of the block: every pair is met once, the earlier image as the other one.
        near: list[tuple[int, int]] = []
        for other_prints, other_cells in others:
            different = sum(
                np.bitwise_count(prints_N[start:end, word, None] ^ other_prints[None, :end, word]) for word in (0, 1)
            )
            for row, other in zip(*np.nonzero(different <= _BITS), strict=True):
                number = start + int(row)
                if other < number and np.abs(cells_N[number] - other_cells[other]).mean() <= _COLOUR:
                    near.append((number, int(other)))
        for number, other in sorted(near):
            earliest[number] = min(earliest[number], earliest[other])
    return {held[number]: held[first] for number, first in enumerate(earliest) if first != number}


def _cells(image: UInt8[np.ndarray, "S S 3"]) -> np.ndarray:
    side = len(image) // _SMALL
    return image.reshape(_SMALL, side, _SMALL, side, 3).mean((1, 3), dtype=np.float32)


def _prints(cells_N883: np.ndarray) -> np.ndarray:
    """Two words of 64 bits for each image: the signs of horizontal and of vertical differences."""
    grey = cells_N883.mean(-1)
    across, down = np.diff(grey, axis=2) > 0, np.diff(grey, axis=1) > 0
    return np.stack([_packed(across), _packed(down)], axis=1)


def _packed(bits: Bool[np.ndarray, "N H W"]) -> np.ndarray:
    flat = bits.reshape(len(bits), -1)
    flat = np.pad(flat, ((0, 0), (0, 64 - flat.shape[1])))
    return np.packbits(flat, axis=1).view(np.uint64)[:, 0]


def write_audit(source: Source, findings: Sequence[Finding], out: Path, *, spec: str) -> list[str]:
    """Write ``audit.csv``, ``audit.parquet``, ``worst.png`` and ``keep.jsonl`` to ``out``, each whole or not at all.

    ``spec`` is what the source was opened by. Returns lines for the terminal.
    """
    import pyarrow
    import pyarrow.parquet

    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "key": found.key,
            "caption": found.caption,
            "fit": found.fit,
            "rank": found.rank,
            "same_image": found.same_image,
            "reasons": "; ".join(found.reasons),
        }
        for found in findings
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(out / "audit.csv", text.getvalue().encode())
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    write_bytes(out / "audit.parquet", buffer.getvalue())
    write_keep(findings, out / "keep.jsonl")
    if worst := [found for found in findings if found.fit is not None and found.reasons][:_ON_SHEET]:
        skipped = SkippedItems(max_skipped_share=1.0)
        images, captions = [], []
        for found in worst:
            if (image := read_image(source, found.item, size=160, skipped=skipped)) is not None:
                images.append(image)
                captions.append(found.caption)
        save_png(out / "worst.png", contact_sheet(images, captions=captions, title=f"{source.name}: what fits worst"))
    return _summary(findings, source, out, spec)


_NO_IMAGE = {"unreadable image", "image there twice"}
_GRAVE = {*_NO_IMAGE, "caption does not fit", "caption there twice"}
"""Reasons for which an image is not kept, and those for which a caption is not kept."""


def write_keep(findings: Sequence[Finding], file: Path) -> None:
    """Write what `?keep=` reads: a line {key, captions} for each image that is kept, with the captions that are kept.

    An image none of whose captions is kept stays without captions, unless the image itself is at fault.
    """
    captions: dict[str, list[str]] = defaultdict(list)
    dropped: set[str] = set()
    order = sorted(findings, key=lambda found: found.item)
    for found in order:
        if found.caption and found.kept:
            captions[found.key].append(found.caption)
        elif not _NO_IMAGE.isdisjoint(found.reasons) and not found.kept:
            dropped.add(found.key)
    keys = dict.fromkeys(found.key for found in order if found.key not in dropped or found.key in captions)
    lines = [json.dumps({"key": key, "captions": captions.get(key, [])}) + "\n" for key in keys]
    write_bytes(file, "".join(lines).encode())


def _summary(findings: Sequence[Finding], source: Source, out: Path, spec: str) -> list[str]:
    counts: Counter[str] = Counter()
    for found in findings:
        counts.update("odd sides" if reason.startswith("sides of") else reason for reason in found.reasons)
    pairs = sum(bool(found.caption) for found in findings)
    lines = [f"{spec}: {pairs:,} captions of {len(source):,} items looked at"]
    lines += [f"{count:>7,}  {reason}" for reason, count in counts.most_common()]
    worst = ", the worst pairs on worst.png" if (out / "worst.png").is_file() else ""
    joined = "&" if _HAS_OPTIONS.search(spec) else "?"
    return [
        *lines,
        f"written to {out}: audit.csv, audit.parquet{worst}",
        f"what is left, as a source: '{spec}{joined}keep={out}/keep.jsonl'",
    ]
