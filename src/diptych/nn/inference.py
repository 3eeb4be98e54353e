"""Where a network computes, how it computes when it does not learn, and the classes it finds most probable.

Shapes: B images, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]


def pick_device(name: Device) -> str:
    """``auto`` takes CUDA, then MPS, then the CPU. Raises UserError for a device that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, available in there.items() if available) if name == "auto" else name
    if not there.get(kind, False):
        raise UserError(f"device {name!r}: torch finds no such device here; choose auto or cpu")
    return kind


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products; elsewhere they are emulated, and slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The dtype policy of all networks: weights are fp32; under bf16, operations that torch lists as safe use bf16."""
    bf16 = precision == "bf16" or (precision == "auto" and multiplies_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; afterwards every submodule has the mode it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A class and its probability."""

    name: str
    probability: float


def top_predictions(
    probabilities_BC: Float[Tensor, "B C"], names: Sequence[str], *, top: int
) -> list[list[Prediction]]:
    """The ``top`` classes of each image, all if there are fewer, best first."""
    best = probabilities_BC.topk(min(top, len(names)))
    return [
        [Prediction(name=names[c], probability=p) for c, p in zip(classes, probabilities, strict=True)]
        for classes, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
