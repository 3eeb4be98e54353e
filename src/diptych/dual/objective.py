"""What all objectives on pairs share: their configuration, views, captions, and encoding in chunks.

A tower is given one view at a time, so that blocks of memory stay as small as CLIP's.

Shapes: B rows, b rows of a chunk, V image views of a row, M captions of a row, L text tokens, H and W pixels, S side of
a view, D width.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diptych.data.augment import ViewConfig, draw_view, make_view, weak_view
from diptych.data.batch import Batch, CaptionedImageExamples, CaptionedStateExamples
from diptych.dual.model import DualEncoder
from diptych.dual.towers import Heads
from diptych.errors import UserError
from diptych.train.objective import Objective

Trained = DualEncoder | Heads
"""What learns: a dual encoder, or the heads alone of one whose towers are frozen."""


@dataclass(kw_only=True, slots=True)
class PairsConfig:
    """An objective's settings. Each objective has a subclass, which builds it."""

    MEMORY_ONLY: ClassVar[tuple[str, ...]] = ("chunk",)
    """Fields that change no loss and no gradient: a run may be resumed with other values."""

    views: int = 1
    """Number of views of each image in a step."""
    captions: int = 1
    """Number of captions of each image in a step."""
    augment: ViewConfig = field(default_factory=weak_view)
    """The random changes that make a view of an image."""
    chunk: int | None = None
    """Number of rows that a process encodes at a time. Not given: all rows. Each chunk is encoded once more in the
    backward pass, which gives the gradient of the whole batch in the memory of a chunk, for a third more time
    (GradCache)."""

    def build(self, model: Trained) -> "PairsObjective[Any]":
        """The objective with these settings, on ``model``. New weights come from torch's global generator.

        Raises UserError for a value that cannot be meant.
        """
        raise NotImplementedError

    @property
    def keeps_tokens(self) -> bool:
        """Whether a loss reads all tokens of the towers."""
        return False

    def view_configs(self) -> list[ViewConfig]:
        """How each view of an image in a step is made."""
        return [self.augment] * self.views

    def identity(self) -> dict[str, Any]:
        """The fields that decide the losses, to be compared when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in self.MEMORY_ONLY}

    def check(self) -> None:
        """Raise UserError for a value that cannot be meant."""
        for name, value in (("views", self.views), ("captions", self.captions), ("chunk", self.chunk)):
            if value is not None and value < 1:
                raise UserError(f"objective.{name} is {value}; it must be at least 1")


Config = TypeVar("Config", bound=PairsConfig)


class PairsObjective(Objective, Generic[Config]):
    """A dual encoder that learns from a stream of pairs, by losses that compare all rows of a batch."""

    couples_rows = True

    def __init__(self, model: Trained, config: Config) -> None:
        super().__init__()
        config.check()
        self.streams = {"pairs": 1}
        self.model, self.config = model, config


class Views:
    """The views of a step's images.

    The random numbers are drawn at once for all rows; pixels are made for the rows that are asked for. Where the batch
    holds states of frozen towers, the views are those that were drawn when the states were computed.
    """

    def __init__(self, batch: Batch, config: ViewConfig, *, views: int, size: int, name: str, first: int = 0) -> None:
        """``size`` is the side of a view in pixels; ``name`` tells these random numbers from others of the step;
        ``first`` is the place of the first of these views among :meth:`PairsConfig.view_configs`."""
        pairs: CaptionedImageExamples | CaptionedStateExamples = batch["pairs"]
        self._states = None
        if isinstance(pairs, CaptionedStateExamples):
            self._states = pairs.images_BVSF[:, first : first + views]
            return
        self._pixels_B3HW, self._config, self._size = pairs.pixels_B3HW, config, size
        self._drawn = [draw_view(batch.rng, f"{name}{view}", len(pairs)) for view in range(views)]

    def __call__(self, rows: slice) -> list[Tensor]:
        """Pixels [b 3 S S] of each view, or its states [b S F]."""
        if self._states is not None:
            return list(self._states[rows].unbind(1))
        pixels = self._pixels_B3HW[rows]
        return [make_view(pixels, drawn[rows], self._config, size=self._size) for drawn in self._drawn]


def unbind_captions(
    pairs: CaptionedImageExamples | CaptionedStateExamples, rows: slice, *, captions: int
) -> list[tuple[Tensor, Tensor]]:
    """Ids, or states, and validity [b L] of the first caption of each row, then of the second one, and so on."""
    if isinstance(pairs, CaptionedStateExamples):
        return list(zip(pairs.texts_BMLF[rows].unbind(1), pairs.valid_BML[rows].unbind(1), strict=True))
    ids, valid = (side[rows].unflatten(1, (captions, -1)).unbind(1) for side in (pairs.ids_BL, pairs.valid_BL))
    return list(zip(ids, valid, strict=True))


def unit(vectors: list[Tensor]) -> Tensor:
    """The vectors [b D] of each view (or caption), L2-normalized in fp32 also under autocast: [V b D]."""
    stacked_VbD = torch.stack(vectors)
    with torch.autocast(stacked_VbD.device.type, enabled=False):
        return F.normalize(stacked_VbD.float(), dim=-1)


def in_chunks(encode: Callable[[slice], tuple[Tensor, ...]], *, rows: int, chunk: int | None) -> tuple[Tensor, ...]:
    """The results [... B D] of ``encode`` for all rows, computed ``chunk`` rows at a time.

    Only the results of a chunk stay in memory. The backward pass encodes each chunk again, now with its activations
    (Gao et al., 2021, GradCache). ``chunk`` None encodes all rows at once.
    """
    if chunk is None or chunk >= rows:
        return encode(slice(0, rows))
    parts = [checkpoint(encode, slice(start, start + chunk), use_reentrant=False) for start in range(0, rows, chunk)]
    return tuple(torch.cat(part, dim=-2) for part in zip(*parts, strict=True))
