"""What all objectives on pairs do before their loss: views, captions, both towers, in chunks if memory is short.

Towers are given one view at a time, so that blocks of memory stay as small as CLIP's.

Shapes: B rows, b rows of a chunk, V image views or captions of a row, L text tokens, S side of a view, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diptych.data.augment import ViewConfig, draw_view, make_view, weak_view
from diptych.data.batch import Batch, CaptionedImageExamples
from diptych.dual.model import DualEncoder
from diptych.errors import UserError
from diptych.train.objective import Objective


@dataclass(kw_only=True, slots=True)
class PairsConfig:
    views: int = 1
    """Views of each image in a step."""
    captions: int = 1
    """Captions of each image in a step."""
    augment: ViewConfig = field(default_factory=weak_view)
    """How a view differs from its image."""
    chunk: int | None = None
    """Rows that a process encodes at a time. Each chunk is encoded once more on the way back: the gradient of the whole
    batch in the memory of a chunk, for a third more time (GradCache)."""

    def check(self) -> None:
        """Raise UserError for a value that cannot be meant."""
        for name in ("views", "captions", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"objective.{name} is {value}; it must be at least 1")


Config = TypeVar("Config", bound=PairsConfig)


class PairsObjective(Objective, Generic[Config]):
    """What they have in common: a dual encoder, a stream of pairs, and losses that compare all rows of a batch."""

    couples_rows = True

    def __init__(self, model: DualEncoder, config: Config) -> None:
        super().__init__()
        config.check()
        self.streams = {"pairs": 1}
        self.model, self.config = model, config


class Views:
    """The views of a step's images. Their random numbers are drawn at once for all rows, and made into pixels for
    some."""

    def __init__(self, batch: Batch, config: ViewConfig, *, views: int, size: int, name: str) -> None:
        pairs: CaptionedImageExamples = batch["pairs"]
        self._pixels_B3HW, self._config, self._size = pairs.pixels_B3HW, config, size
        self._drawn = [draw_view(batch.rng, f"{name}{view}", len(pairs)) for view in range(views)]

    def __call__(self, rows: slice) -> list[Tensor]:
        """[b 3 S S] for each view."""
        pixels = self._pixels_B3HW[rows]
        return [make_view(pixels, drawn[rows], self._config, size=self._size) for drawn in self._drawn]


def captions_of(items: CaptionedImageExamples, rows: slice, *, captions: int) -> list[tuple[Tensor, Tensor]]:
    """Ids and validity [b L] of the first captions, of the second ones, and so on."""
    ids, valid = (side[rows].unflatten(1, (captions, -1)).unbind(1) for side in (items.ids_BL, items.valid_BL))
    return list(zip(ids, valid, strict=True))


def unit(views: list[Tensor]) -> Tensor:
    """TowerOutput [b D] of each view, L2-normalised in fp32: [V b D]."""
    features_VbD = torch.stack(views)
    with torch.autocast(features_VbD.device.type, enabled=False):
        return F.normalize(features_VbD.float(), dim=-1)


def in_chunks(encode: Callable[[slice], tuple[Tensor, ...]], *, rows: int, chunk: int | None) -> tuple[Tensor, ...]:
    """``encode`` of all rows, results [... B D]. With ``chunk``, only the results of a chunk stay in memory, and on the
    way back it is encoded again, now with its activations (Gao et al., 2021, GradCache)."""
    if chunk is None or chunk >= rows:
        return encode(slice(0, rows))
    parts = [
        checkpoint(encode, slice(start, start + chunk), use_reentrant=False, preserve_rng_state=False)
        for start in range(0, rows, chunk)
    ]
    return tuple(torch.cat(part, dim=-2) for part in zip(*parts, strict=True))
