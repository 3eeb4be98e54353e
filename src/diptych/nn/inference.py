"""Devices, the dtype policy of training and inference, evaluation mode, weights that are spread over processes, packed
weights and weights of 8 bits, the most probable classes.

Shapes: B images, C classes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import UserError

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
InferencePrecision = Literal["auto", "fp32", "bf16", "int8"]
_FEW_ROWS, _MANY_USES = range(2, 33), 8
"""Numbers of rows at which packed weights are faster, and uses from which on packing pays."""


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
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX2":  # as ATEN_CPU_CAPABILITY may ask for
        return False
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def computes_bf16(device: torch.device, precision: InferencePrecision) -> bool:
    """Whether networks compute in bf16; ``auto`` does so where the device multiplies it."""
    return precision == "bf16" or (precision == "auto" and multiplies_bf16(device))


def autocast(device: torch.device, precision: InferencePrecision) -> AbstractContextManager[object]:
    """The dtype policy of all networks: weights are fp32; under bf16, operations that torch lists as safe use bf16.

    The frozen text encoder of a training in bf16 is the exception: its weights are in bf16.
    """
    return torch.autocast(device.type, torch.bfloat16) if computes_bf16(device, precision) else nullcontext()


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


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A context in which this process has all weights of ``module``, also where FSDP2 spreads them over processes.

    For code that does not call the parts of ``module`` as modules, or not equally often on each process: a call gathers
    the weights of a part, and all processes have to take part in that.
    """
    parts: list[Any] = [part for part in module.modules() if hasattr(part, "unshard")]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def local_part(tensor: Any) -> Tensor:
    """What this process has of ``tensor``: all of it, but of a tensor of torch.distributed its rows."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Derived(Generic[T]):
    """What is computed from weights, kept until one of them changes. It is no module, so it is never saved."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], T] | None = None  # one tuple, as threads share a network

    def __deepcopy__(self, memo: dict[int, Any]) -> "Derived[T]":
        return Derived()

    def of(self, weights: Iterable[Tensor], make: Callable[[], T], *, key: Any = None) -> T:
        """What ``make`` returned for these weights and this ``key`` if it was called last for them, else its result."""
        made_of = (key, *(_version(each) for each in weights))
        kept = self._kept
        if kept is None or kept[0] != made_of:
            kept = self._kept = (made_of, make())
        return kept[1]


def _version(value: Tensor) -> tuple[int, int]:
    """Differs after every change of ``value`` in place, and after its replacement."""
    value = local_part(value)
    return value.data_ptr(), -1 if value.is_inference() else value._version


class PackedLinear(nn.Module):
    """A linear layer for many inputs of the same few rows, without gradients: its weights are laid out for them once.

    On a CPU a product with few rows takes as long as it takes to read the weights, and the libraries rearrange them
    anew in every product of 2 to 64 rows; docs/performance.md has the gain. Where packing gains nothing (many rows, few
    uses, other devices), the weights are used as they are. Under autocast they are rounded once, not at each use.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, rows: int, uses: int) -> None:
        super().__init__()
        self.weight_OI, self.bias_O, self.rows = weight_OI.detach(), None if bias_O is None else bias_O.detach(), rows
        kind = weight_OI.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_OI.dtype
        few = kind == "cpu" and rows in _FEW_ROWS and uses >= _MANY_USES
        self.packed: Tensor | None = None
        if self.dtype != weight_OI.dtype:
            self.weight_OI = self.weight_OI.to(self.dtype)
            self.bias_O = None if self.bias_O is None else self.bias_O.to(self.dtype)
        elif few and self.dtype == torch.float32 and torch.backends.mkl.is_available():
            self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight_OI, rows)

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        if self.packed is not None and x.numel() == self.rows * x.shape[-1]:
            return torch.ops.mkl._mkl_linear(x, self.packed, self.weight_OI, self.bias_O, self.rows)
        return F.linear(x.to(self.dtype), self.weight_OI, self.bias_O)

    def part(self, x: Float[Tensor, "*rows I"], outputs: slice) -> Float[Tensor, "*rows P"]:
        """Some of the outputs; all are computed where the weights are packed."""
        if self.packed is not None or self.bias_O is None:
            return self(x)[..., outputs]
        return F.linear(x.to(self.dtype), self.weight_OI[outputs], self.bias_O[outputs])


def pack_linears(module: nn.Module, *, rows: int, uses: int) -> Any:
    """A copy of ``module`` on the same weights, whose linear layers are packed (see :class:`PackedLinear`)."""
    copied = copy.deepcopy(module, {id(value): value for value in (*module.parameters(), *module.buffers())})
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child.weight, child.bias, rows=rows, uses=uses))
    return copied


class Int8Linear(nn.Module):
    """A linear layer for inference on a CPU whose weights have 8 bits and a scale for each output; it cannot be saved.

    Each row of the input is rounded to 7 bits with a scale of its own: with 8, sums overflow on processors without
    instructions for products of 8 bits (VNNI). docs/performance.md has the gain and the loss.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        weight_OI = weight_OI.detach().float()
        self.scale_O = _scale(weight_OI, 127)[:, 0]
        whole_OI = (weight_OI / self.scale_O[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(whole_OI, None)
        self.zeros_O = torch.zeros(len(weight_OI), dtype=torch.long)
        self.bias_O = torch.zeros(len(weight_OI)) if bias_O is None else bias_O.detach().float()

    def forward(self, x: Float[Tensor, "*rows I"]) -> Float[Tensor, "*rows O"]:
        x = x.float()
        scale = _scale(x, _HALF - 1)
        whole = (x / scale + (_HALF + 0.5)).to(torch.uint8)  # what is cut off rounds to the nearest
        product = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, _HALF, self.packed, self.scale_O, self.zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return torch.addcmul(self.bias_O, product, scale)

    def part(self, x: Float[Tensor, "*rows I"], outputs: slice) -> Float[Tensor, "*rows P"]:
        """Some of the outputs; all are computed, as packed weights have no parts."""
        return self(x)[..., outputs]


_HALF = 64
"""What stands for zero among the 7 bits of an input."""


def _scale(rows: Tensor, largest: int) -> Tensor:
    """What each row is divided by, so that its largest number becomes ``largest``."""
    return (rows.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)


def replace_linears_by_int8(module: nn.Module) -> None:
    """Replace the linear layers of ``module`` by :class:`Int8Linear`.

    Raises UserError where the module is not on a CPU, or this build of torch has no oneDNN.
    """
    if any(value.device.type != "cpu" for value in module.parameters()):
        raise UserError("precision int8 is for a CPU: choose bf16 or auto on other devices")
    if not torch.backends.mkldnn.is_available():
        raise UserError("precision int8: this build of torch has no oneDNN, which it needs; choose fp32")
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight, child.bias))


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
