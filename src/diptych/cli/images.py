"""The images that a command is given: files one by one, and sources with all their images.

An image that cannot be read is reported on stderr, and the others are used.

Shapes: B images, S pixels of a side.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import SUFFIXES, UnreadableImage, decode
from diptych.data.sources.open import HasFiles, Source, Spec, find_files, open_finite
from diptych.data.sources.remote import is_remote
from diptych.data.sources.rows import TABLE_SUFFIXES
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
    file: Callable[[], Path | bytes] | None = None
    """Its file, or the bytes of it where it lies inside another file; None for an image that is computed."""


@dataclass(frozen=True, slots=True)
class FoundImages:
    """The images of several places, and what is wrong with the places that have none."""

    images: list[NamedImage]
    mistakes: list[str]


def find_images(places: Sequence[str]) -> FoundImages:
    """All images of ``places``, in order: image files, globs of them, and sources of any kind.

    A place that does not exist or has no images becomes a line among the mistakes, and the other places are searched.
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
    if not place.startswith(("scenes:", "hub:")) and not is_remote(place) and (files := _image_files(place)):
        return [NamedImage(str(file), partial(decode, file), file=partial(Path, file)) for file in files]
    source = open_finite(place, Columns())
    if not source.has_images:
        raise UserError(f"{place}: has no images")
    return [
        NamedImage(
            _name(source, place, item),
            partial(source.image, item),
            partial(_has_caption, source, item),
            partial(source.file, item) if isinstance(source, HasFiles) else None,
        )
        for item in range(len(source))
    ]


def _has_caption(source: Source, item: int) -> bool:
    return bool(source.captions(item))


def _image_files(place: str) -> list[Path]:
    """The files of a path or a glob, if all of them are images by their names, or one is a file of an unknown kind."""
    if os.path.isfile(place):
        known = place.lower().endswith((*TABLE_SUFFIXES, ".tar", ".txt", ".gz", ".tgz"))
        return [] if known else [Path(place)]
    files = find_files(Spec.parse(place).place)
    return files if all(file.suffix.lower() in SUFFIXES and file.is_file() for file in files) else []


def _name(source: Source, place: str, item: int) -> str:
    key = source.key(item)
    file = os.path.join(place, key)
    return file if os.path.isfile(file) else key


ROWS = 16
"""Images read at once: few, so that the first results come soon."""


@dataclass(frozen=True, slots=True)
class ReadImages:
    """The images of a block that can be read, and what is wrong with the others."""

    names: list[str]
    pixels: list[UInt8[np.ndarray, "S S 3"]]
    mistakes: list[str]


def read_named(images: Sequence[NamedImage], size: int) -> ReadImages:
    """The pixels of images, each resized to ``size``."""
    read = ReadImages([], [], [])
    for image in images:
        try:
            read.pixels.append(image.read(size))
            read.names.append(image.name)
        except UnreadableImage as error:
            read.mistakes.append(str(error))
    return read


class ImageArguments:
    """Files and sources of a command line."""

    def __init__(self, places: Sequence[str]) -> None:
        """Finds all images; reads none. Raises UserError where no place has any."""
        found = find_images(places)
        self.images, self.left_out, self.used = found.images, len(found.mistakes), 0
        if not self.images:
            raise UserError("; ".join(found.mistakes))
        for line in found.mistakes:
            _warn(line)

    def batches(self, size: int) -> Iterator[tuple[list[str], np.ndarray]]:
        """Names and pixels [B size size 3] of those that can be read, a few at a time."""
        for start in range(0, len(self.images), ROWS):
            read = read_named(self.images[start : start + ROWS], size)
            self.count(used=len(read.names), mistakes=read.mistakes)
            if read.names:
                yield read.names, np.stack(read.pixels)

    def count(self, *, used: int, mistakes: Sequence[str]) -> None:
        """Note what became of some images, and tell what is wrong with those that cannot be read."""
        self.used += used
        self.left_out += len(mistakes)
        for line in mistakes:
            _warn(line)

    def exit_if_any_was_left_out(self) -> None:
        """Status 1 where some could not be read, and 2 where none could, so that a script notices."""
        if self.left_out:
            sys.exit(1 if self.used else 2)


def _warn(line: str) -> None:
    print(f"diptych: {line}", file=sys.stderr, flush=True)
