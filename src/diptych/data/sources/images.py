"""Images as a command names them: files one by one, and sources with all their images.

Shapes: S pixels of a side.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import SUFFIXES, decode
from diptych.data.sources.open import Source, Spec, find_files, open_finite
from diptych.errors import UserError


@dataclass(frozen=True, slots=True)
class NamedImage:
    """An image that has been found and not been read."""

    name: str
    """Its path where it is a file, else its key in the source."""
    read: Callable[[int], UInt8[np.ndarray, "S S 3"]]
    """The centre square, resized to so many pixels. Raises UnreadableImage."""
    has_caption: Callable[[], bool] = lambda: False
    """Whether its source has a caption of it already."""


@dataclass(frozen=True, slots=True)
class FoundImages:
    """The images of several places, and what is wrong with the places that have none."""

    images: list[NamedImage]
    mistakes: list[str]


def find_images(places: Sequence[str]) -> FoundImages:
    """All images of ``places``, in order: image files, globs of them, and sources of any kind.

    A place that does not exist or has no images is a line among the mistakes, so that it costs no other place.
    """
    images: list[NamedImage] = []
    mistakes: list[str] = []
    for place in places:
        try:
            images += _images_of(place)
        except UserError as error:
            mistakes.append(str(error))
    return FoundImages(images, mistakes)


def check_is_text(text: str, *, instead: str) -> None:
    """Raise UserError for a text that is the path of a file, or looks like that of an image: a network would answer it.

    ``instead`` says how an image is given.
    """
    if os.path.isfile(text):
        raise UserError(f"{text}: a file, where words are wanted: {instead}")
    if len(text.split()) == 1 and Path(text).suffix.lower() in SUFFIXES:
        raise UserError(f"{text}: no such file, and no words either: {instead}, or say what to look for")


def _images_of(place: str) -> list[NamedImage]:
    if not place.startswith(("scenes:", "hub:")) and (files := _image_files(place)):
        return [NamedImage(str(file), partial(decode, file)) for file in files]
    source = open_finite(place, Columns())
    if not source.has_images:
        raise UserError(f"{place}: has no images")
    return [
        NamedImage(name_in(source, place, item), partial(source.image, item), partial(_has_caption, source, item))
        for item in range(len(source))
    ]


def _has_caption(source: Source, item: int) -> bool:
    return bool(source.captions(item))


def _image_files(place: str) -> list[Path]:
    """The files of a path or a glob, if all of them are images by their names, or one is a file of an unknown kind."""
    if os.path.isfile(place):
        known = place.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".parquet", ".tar", ".txt", ".gz", ".tgz"))
        return [] if known else [Path(place)]
    files = find_files(Spec.parse(place).place)
    return files if all(file.suffix.lower() in SUFFIXES and file.is_file() for file in files) else []


def name_in(source: Source, place: str, item: int) -> str:
    """The path of an item's image where it is a file, else its key. ``place`` is what the source was opened by."""
    key = source.key(item)
    file = os.path.join(place, key)
    return file if os.path.isfile(file) else key
