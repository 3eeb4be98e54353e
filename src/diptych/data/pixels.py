"""Pictures decoded while training: what the image tokenizer learns from.

Shapes: B rows, H and W pixels.
"""

import numpy as np
import torch

from diptych.data.batch import Items
from diptych.data.images import UnreadableImage
from diptych.data.skips import Skips
from diptych.data.sources import Source
from diptych.data.streams import Stream, choose
from diptych.errors import UserError

Chosen = list[tuple[Source, np.ndarray]]
"""Sources and which of their items to use."""


def pixel_stream(chosen: Chosen, *, size: int, skips: Skips, flip: bool, seed: int) -> Stream:
    """All chosen pictures as one stream, resized to ``size``; every other one mirrored if ``flip``.

    A picture that cannot be read is recorded in ``skips`` and the next one stands in, so that the batch stays a pure
    function of its step.
    """
    lengths = np.array([len(items) for _, items in chosen])
    ends = np.cumsum(lengths)
    total = int(ends[-1])

    def read(index: int) -> np.ndarray:
        for attempt in range(total):
            place = (index + attempt) % total
            part = int(np.searchsorted(ends, place, side="right"))
            source, items = chosen[part]
            item = int(items[place - (ends[part] - lengths[part])])
            try:
                return source.image(item, size)
            except UnreadableImage as error:
                skips.record(source.key(item), error)
                skips.check(total)
        raise UserError(f"{chosen[0][0].name}: no picture can be read")

    def take(index: np.ndarray, epoch: np.ndarray) -> Items:
        together = getattr(chosen[0][0], "images", None) if len(chosen) == 1 else None
        pixels = together(chosen[0][1][index], size) if together else np.stack([read(int(i)) for i in index])
        # NumPy throughout: torch would start a team of OpenMP threads in each preparing thread, which then spin.
        if flip:
            mirrored = choose(np.full(len(index), 2), index, epoch, seed) == 1
            pixels[mirrored] = pixels[mirrored, :, ::-1]
        return Items(pixels_B3HW=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))

    return Stream(size=total, take=take)
