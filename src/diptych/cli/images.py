"""The images that a command is given. What cannot be read is told on stderr, and the others go on."""

import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from diptych.data.sources.decode import UnreadableImage
from diptych.data.sources.images import find_images
from diptych.errors import UserError

_ROWS = 16
"""Images read at once: few, so that the first results come soon."""


class ImageArguments:
    """Files and sources of a command line."""

    def __init__(self, places: Sequence[str]) -> None:
        """Finds all images; reads none. Raises UserError where no place has any."""
        found = find_images(places)
        self.images, self.left_out, self.used = found.images, len(found.mistakes), 0
        if not self.images:
            raise UserError("; ".join(found.mistakes))
        for line in found.mistakes:
            _tell(line)

    def batches(
        self, size: int, *, advance: Callable[[int, int], None] = lambda done, total: None
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """Names and pixels [B size size 3] of those that can be read, a few at a time.

        ``advance`` is called with the number of images that are done and that of all.
        """
        for start in range(0, len(self.images), _ROWS):
            names, pixels = [], []
            for image in self.images[start : start + _ROWS]:
                try:
                    pixels.append(image.read(size))
                    names.append(image.name)
                except UnreadableImage as error:
                    self.left_out += 1
                    _tell(str(error))
            self.used += len(names)
            if names:
                yield names, np.stack(pixels)
            advance(min(start + _ROWS, len(self.images)), len(self.images))

    def exit_if_any_was_left_out(self) -> None:
        """Status 1 where some could not be read, and 2 where none could, so that a script notices."""
        if self.left_out:
            sys.exit(1 if self.used else 2)


def _tell(line: str) -> None:
    print(f"diptych: {line}", file=sys.stderr, flush=True)
