"""What the training loop knows of an objective."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from diptych.data.batch import Batch


@dataclass(frozen=True, slots=True)
class Losses:
    """``total`` is differentiated; ``terms`` (its unweighted parts and whatever else is worth a curve) is logged."""

    total: Tensor
    terms: dict[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """An ``nn.Module`` whose ``forward(batch, step)`` returns :class:`Losses`.

    ``streams`` says how many rows of each stream it wants for every row of the configured batch size,
    e.g. ``{"pairs": 2, "texts": 1}``. Every loss is a mean over rows, so that it is the same for any split of the
    rows over processes or micro-batches. An objective that compares rows with one another says so by an attribute
    ``couples_rows = True``: it gathers them over processes itself, and is never given micro-batches.
    """

    streams: dict[str, int]

    def __call__(self, batch: Batch, step: int) -> Losses: ...
