"""Where a network computes, and how it computes when it does not learn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from diptych.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps"]


def pick_device(name: Device) -> str:
    """``auto`` takes CUDA, then MPS, then the CPU. Raises UserError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, available in there.items() if available) if name == "auto" else name
    if not there.get(kind, False):
        raise UserError(f"device {name!r}: torch finds no such device here; choose auto or cpu")
    return kind


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every submodule has the mode it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
