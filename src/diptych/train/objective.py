"""What the training loop knows of an objective."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diptych.data.batch import Batch


@dataclass(frozen=True, slots=True)
class Losses:
    """``total`` is differentiated; ``terms`` (its unweighted parts and whatever else is worth a curve) is logged."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """The network together with its loss.

    Every loss is a mean over rows, so that it is the same for any split of the rows over processes or micro-batches.
    """

    streams: dict[str, int]
    """Rows of each stream for every row of the configured batch size, e.g. ``{"pairs": 2, "texts": 1}``."""
    couples_rows: bool = False
    """Whether the loss compares rows with one another. Such an objective gathers the rows of all processes itself, and
    is never given micro-batches."""

    def forward(self, batch: Batch, step: int) -> Losses:
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer: dicts with ``params`` and, where they differ from the run's,
        ``weight_decay`` and ``lr_scale`` (a factor on the learning rate). Frozen parameters are left out by the loop.

        By default vectors and scalars (norms, biases, scales) do not decay.
        """
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]

    def compile_regions(self) -> None:
        """Compile what pays, for ``--train.compile``; by default everything. An objective whose blocks are alike
        compiles those, which takes a fraction of the time."""
        self.compile()
