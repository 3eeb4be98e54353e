"""An image of the Draw tab: how it is shown while it appears, and which part of it is marked to be drawn anew.

Shapes: R rows of the grid of an image's tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from diptych.itit.pipeline import Diptych, ImagineStep
from diptych.report.sheet import scale

SIDE = 512
"""Side in pixels at which images are shown."""
_HIDDEN, _MARKED = (226, 230, 236), (59, 130, 246)
"""Colours that lie over what is hidden, and over what is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """An image with its tokens, and the cells of their grid at the corners of the marked part."""

    step: ImagineStep
    corners: tuple[tuple[int, int], ...] = ()
    """None, one or two (row, column)."""

    @classmethod
    def of(cls, diptych: Diptych, image: np.ndarray) -> "Drawing":
        """The drawing of an image of the tokenizer's size: what its tokens say of it."""
        tokens_BN = diptych.tokenize(image[None])
        seen = diptych.tokenizer.decode(tokens_BN)[0].permute(1, 2, 0).cpu().numpy()
        tokens = tokens_BN[0].view(diptych.token_side, -1).cpu()
        return cls(step=ImagineStep(image=seen, tokens=tokens, hidden=torch.zeros_like(tokens, dtype=torch.bool)))

    def touched(self, x: int, y: int) -> "Drawing":
        """After a click on the shown image: a first corner, the second one, or a new first one."""
        side, shown = len(self.step.tokens), len(self.shown())
        cell = (min(y * side // shown, side - 1), min(x * side // shown, side - 1))
        return replace(self, corners=(*self.corners, cell) if len(self.corners) == 1 else (cell,))

    @property
    def marked(self) -> Bool[Tensor, "R R"]:
        """The cells between the corners, those of the corners among them."""
        cells = torch.zeros_like(self.step.tokens, dtype=torch.bool)
        if self.corners:
            rows, columns = zip(*self.corners, strict=True)
            cells[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
        return cells

    def shown(self) -> UInt8[np.ndarray, "H W 3"]:
        """The image about ``SIDE`` pixels wide: what is hidden is pale, and what is marked is tinted."""
        image = np.asarray(scale(self.step.image, side=SIDE)).astype(np.float32)
        for cells, colour, weight in ((self.step.hidden, _HIDDEN, 0.8), (self.marked, _MARKED, 0.45)):
            over = Image.fromarray(cells.numpy()).resize(image.shape[1::-1], Image.Resampling.NEAREST)
            image = np.where(np.asarray(over)[..., None], (1 - weight) * image + weight * np.array(colour), image)
        return image.round().astype(np.uint8)
