"""The contract between an objective and the training loop: the loop knows nothing else of what it trains."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diptych.data.batch import Batch


@dataclass(frozen=True, slots=True)
class Losses:
    """What an objective returns: ``total`` is differentiated, the rest is logged."""

    total: Tensor
    """A 0-d tensor."""
    terms: dict[str, Tensor]
    """The unweighted parts of the total by name, 0-d tensors; logged as ``loss/NAME``."""
    measures: dict[str, Tensor] = field(default_factory=dict)
    """What else deserves a curve and is no loss, such as an accuracy, 0-d tensors; logged as ``measure/NAME``."""

    def logged(self) -> dict[str, Tensor]:
        """Terms and measures by their names in metrics.jsonl, without gradient."""
        kinds = {"loss": self.terms, "measure": self.measures}
        return {f"{kind}/{name}": value.detach() for kind, values in kinds.items() for name, value in values.items()}


class Objective(nn.Module):
    """The network together with its loss.

    Every loss is a mean over rows, so that it is the same for any split of the rows over processes or micro-batches.
    """

    streams: dict[str, int]
    """Rows of each stream per row of ``train.batch_size``, e.g. ``{"pairs": 2, "texts": 1}``."""
    couples_rows: bool = False
    """Whether the loss compares rows with one another. Such an objective gathers the rows of all processes itself, and
    is never given micro-batches."""
    may_skip_parameters: bool = False
    """Whether a step may leave trained parameters without a gradient, e.g. because a term of the loss starts later.
    Several processes then look for such parameters at each step; without it, they stop at such a step with an error of
    torch. False is faster."""

    def forward(self, batch: Batch, step: int) -> Losses:
        """The losses of one batch. ``step`` counts from 0."""
        raise NotImplementedError

    def start_step(self, step: int) -> None:
        """Called before each step. Whatever else than the optimizer changes weights does so here, because under fsdp
        ``forward`` sees copies of the weights; see :meth:`written_in_forward`."""

    def written_in_forward(self) -> list[nn.Parameter]:
        """Parameters that ``forward`` writes to, alike on all processes. Each process keeps them whole."""
        return []

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
        """Called for ``--train.compile``; compiles the whole objective unless overridden.

        An objective of many equal blocks should compile the block: that takes a fraction of the time.
        """
        self.compile()
