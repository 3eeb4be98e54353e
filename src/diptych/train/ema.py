"""An exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Shadow weights s <- s + (1 - d) (w - s), where d = min(decay, (1 + t) / (10 + t)) after update t.

    The rising start keeps the random initial weights out of the average of short runs.
    """

    def __init__(self, objective: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self._live = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}
        self.weights = {name: weight.clone() for name, weight in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(self._live.values()), 1 - decay)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, shadow in self.weights.items():
            shadow.copy_(weights[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The objective computes with the averaged weights inside, with its own again afterwards."""
        live, shadow = list(self._live.values()), list(self.weights.values())
        own = [weight.clone() for weight in live]
        with torch.no_grad():
            torch._foreach_copy_(live, shadow)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, own)
