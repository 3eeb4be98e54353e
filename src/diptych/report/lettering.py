"""Fonts and line breaking for words drawn into pictures."""

from functools import cache
from math import ceil
from pathlib import Path
from typing import Literal

from PIL import ImageFont

Weight = Literal["regular", "bold"]


@cache
def font(size: int, weight: Weight = "regular") -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: Pillow's own font has no letters beyond English."""
    import matplotlib

    name = {"regular": "DejaVuSans.ttf", "bold": "DejaVuSans-Bold.ttf"}[weight]
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def line_height(size: int) -> int:
    return ceil(1.35 * size)


def wrap(text: str, *, width: float, size: int, weight: Weight = "regular", lines: int = 6) -> list[str]:
    """Break ``text`` into at most ``lines`` lines of ``width`` pixels; what does not fit ends in an ellipsis."""
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
