"""Contact sheets: images with words under them, as one PNG.

Shapes: H and W pixels.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from diptych.io import write_bytes

ImageLike = UInt8[np.ndarray, "H W 3"]
Weight = Literal["regular", "bold"]

PAPER, CARD, EDGE, INK, FAINT = "#ffffff", "#eef1f5", "#dfe3e8", "#1d2129", "#98a1b0"
MARGIN, GAP, ARROW, LABEL_WIDTH = 20, 14, 30, 110
CAPTION, TITLE = 13, 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """An image with a caption under it; without an image, the caption on a card of an image's size."""

    image: UInt8[np.ndarray, "H W 3"] | None = None
    caption: str = ""


def contact_sheet(
    images: Sequence[ImageLike], *, captions: Sequence[str] = (), title: str = "", columns: int = 0, side: int = 160
) -> Image.Image:
    """Images in reading order, each ``side`` pixels wide; with ``columns`` = 0 there are twice as many columns as rows.

    Raises ValueError for another number of captions than images.
    """
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images: give one each, or none")
    texts = captions or [""] * len(images)
    cells = [Cell(image=image, caption=text) for image, text in zip(images, texts, strict=True)]
    return _Sheet(rows=_chunks(cells, columns or ceil((2 * len(cells)) ** 0.5)), title=title, side=side).draw()


def comparison(
    rows: Mapping[str, Sequence[Cell]], *, headings: Sequence[str] = (), title: str = "", side: int = 160
) -> Image.Image:
    """A labelled row for each model ("truth", "paired only", "ITIT") and a column under a heading for each example."""
    cells, labels = list(rows.values()), list(rows)
    return _Sheet(rows=cells, labels=labels, headings=headings, title=title, side=side).draw()


def cycle_strip(steps: Sequence[str | ImageLike], *, title: str = "", columns: int = 6, side: int = 160) -> Image.Image:
    """text -> image -> text -> ... in reading order with arrows; a long cycle continues on the next line."""
    cells = [Cell(caption=step) if isinstance(step, str) else Cell(image=step) for step in steps]
    return _Sheet(rows=_chunks(cells, columns), between="arrow", title=title, side=side).draw()


def scale(pixels: ImageLike, *, side: int) -> Image.Image:
    """Fits an image into a square of ``side`` pixels. Small ones grow by whole factors, so their pixels stay sharp."""
    image = Image.fromarray(pixels)
    longest = max(image.size)
    if longest <= side:
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def png(image: Image.Image | ImageLike) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(path: str | os.PathLike[str], image: Image.Image | ImageLike) -> Path:
    """Writes an image or a sheet. The file appears whole or not at all."""
    return write_bytes(path, png(image))


def _chunks(cells: Sequence[Cell], columns: int) -> list[Sequence[Cell]]:
    columns = max(columns, 1)
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


@dataclass(kw_only=True, slots=True)
class _Sheet:
    """Rows of cells, and how to lay them out. All positions follow from the sizes of the wrapped texts."""

    rows: Sequence[Sequence[Cell]]
    labels: Sequence[str] = ()
    headings: Sequence[str] = ()
    title: str = ""
    side: int = 160
    between: Literal["gap", "arrow"] = "gap"

    def draw(self) -> Image.Image:
        columns = max([len(row) for row in self.rows] + [len(self.headings), 1])
        left = MARGIN + (LABEL_WIDTH + GAP) * any(self.labels)
        left += ARROW * (self.between == "arrow" and len(self.rows) > 1)  # the later rows begin with an arrow
        lefts = [left + column * (self.side + self._gap) for column in range(columns)]
        width = lefts[-1] + self.side + MARGIN
        title = wrap(self.title, width=width - 2 * MARGIN, size=TITLE, weight="bold", lines=3)
        headings = [wrap(text, width=self.side, size=CAPTION, weight="bold") for text in self.headings]
        captions = [[self._caption(cell) for cell in row] for row in self.rows]

        top = MARGIN + _height([title], TITLE) + GAP * bool(title)
        first = top + _height(headings, CAPTION) + GAP // 2 * any(headings)
        heights = [self.side + _height(row, CAPTION) + GAP // 2 * any(row) for row in captions]
        tops = [first + sum(heights[:row]) + row * GAP for row in range(len(heights) + 1)]

        image = Image.new("RGB", (width, tops[-1] - GAP + MARGIN if heights else first + MARGIN), PAPER)
        _write(image, title, x=MARGIN, y=MARGIN, size=TITLE, weight="bold")
        for x, lines in zip(lefts, headings, strict=False):
            _write(image, lines, x=x, y=top, size=CAPTION, weight="bold")
        for row, (cells, y) in enumerate(zip(self.rows, tops, strict=False)):
            if self.labels:
                self._label(image, self.labels[row], y=y)
            for column, cell in enumerate(cells):
                self._cell(image, cell, x=lefts[column], y=y)
                _write(image, captions[row][column], x=lefts[column], y=y + self.side + GAP // 2, size=CAPTION)
                if self.between == "arrow" and (row, column) != (0, 0):
                    _arrow(image, x=lefts[column] - ARROW, y=y + self.side // 2)
        return image

    @property
    def _gap(self) -> int:
        return GAP if self.between == "gap" else ARROW + GAP // 2

    def _caption(self, cell: Cell) -> list[str]:
        return [] if cell.image is None else wrap(cell.caption, width=self.side, size=CAPTION)

    def _cell(self, image: Image.Image, cell: Cell, *, x: int, y: int) -> None:
        if cell.image is not None:
            scaled = scale(cell.image, side=self.side)
            x, y = x + (self.side - scaled.width) // 2, y + (self.side - scaled.height) // 2
            image.paste(scaled, (x, y))
            edge = (x - 1, y - 1, x + scaled.width, y + scaled.height)
            ImageDraw.Draw(image).rectangle(edge, outline=EDGE)  # or a white image would have no visible end
            return
        ImageDraw.Draw(image).rounded_rectangle((x, y, x + self.side - 1, y + self.side - 1), radius=6, fill=CARD)
        room = (self.side - GAP) // line_height(CAPTION)
        lines = wrap(cell.caption, width=self.side - 2 * GAP, size=CAPTION, lines=max(room, 1))
        _write(image, lines, x=x + GAP, y=y + (self.side - _height([lines], CAPTION)) // 2, size=CAPTION)

    def _label(self, image: Image.Image, label: str, *, y: int) -> None:
        lines = wrap(label, width=LABEL_WIDTH, size=CAPTION, weight="bold")
        _write(image, lines, x=MARGIN, y=y + (self.side - _height([lines], CAPTION)) // 2, size=CAPTION, weight="bold")


def _height(texts: Sequence[Sequence[str]], size: int) -> int:
    """Height in pixels of the tallest of some wrapped texts."""
    return max((len(lines) for lines in texts), default=0) * line_height(size)


def _write(image: Image.Image, lines: Sequence[str], *, x: int, y: int, size: int, weight: Weight = "regular") -> None:
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((x, y + number * line_height(size)), line, fill=INK, font=font(size, weight))


def _arrow(image: Image.Image, *, x: int, y: int) -> None:
    draw = ImageDraw.Draw(image)
    draw.line((x, y, x + ARROW - GAP, y), fill=FAINT, width=2)
    draw.polygon([(x + ARROW - GAP + 6, y), (x + ARROW - GAP - 2, y - 5), (x + ARROW - GAP - 2, y + 5)], fill=FAINT)


# Lettering


@cache
def font(size: int, weight: Weight = "regular") -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: Pillow's own font has no letters beyond English."""
    import matplotlib

    name = {"regular": "DejaVuSans.ttf", "bold": "DejaVuSans-Bold.ttf"}[weight]
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    return ceil(1.35 * size)


def wrap(text: str, *, width: float, size: int, weight: Weight = "regular", lines: int = 6) -> list[str]:
    """Breaks ``text`` into at most ``lines`` lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    face = font(size, weight)
    broken: list[str] = []
    for word in _words(text, width=width, face=face):
        if broken and face.getlength(f"{broken[-1]} {word}") <= width:
            broken[-1] += f" {word}"
        else:
            broken.append(word)
    if len(broken) > lines:
        last = broken[lines - 1]
        while last and face.getlength(f"{last}…") > width:
            last = last[:-1]
        broken = [*broken[: lines - 1], f"{last.rstrip()}…"]
    return broken


def _words(text: str, *, width: float, face: ImageFont.FreeTypeFont) -> list[str]:
    """The words of ``text``; one that is wider than a line is cut into pieces that are not."""
    words = []
    for word in text.split():
        while len(word) > 1 and face.getlength(word) > width:
            fits = next((cut for cut in range(len(word) - 1, 1, -1) if face.getlength(word[:cut]) <= width), 1)
            words.append(word[:fits])
            word = word[fits:]
        words.append(word)
    return words
