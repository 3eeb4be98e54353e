"""Processes, devices and precision. No other file uses accelerate.

A training run is one process, or several that torchrun started; the one of rank 0 is the main process. The functions
at the end serve code around the training loop; the loop itself uses :class:`Devices`, and :class:`Replica` or
:class:`Shards`, which say where the weights are.
"""

import atexit
import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych.errors import UserError
from diptych.nn.inference import Device, Precision, autocast, local_part, pick_device
from diptych.train.objective import Objective
from diptych.train.optim import WHOLE_MOMENTS, ParameterShard

_PATIENCE = timedelta(hours=4)
"""How long processes wait for one another: the main one evaluates while the others wait, which may take long."""


class Devices:
    """This process among those that train, and the device it trains on."""

    def __init__(self, *, device: Device, precision: Precision) -> None:
        join_processes(device)
        # Autocast is applied by `autocast` below, because accelerate fixes its own for the life of the process.
        self._accelerator = Accelerator(cpu=pick_device(device) == "cpu", mixed_precision="no")
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.is_main: bool = self._accelerator.is_main_process
        self.precision: Precision = precision
        self.waits = self.device.type != "cpu"
        """Whether reading a number from the device waits until its queue of kernels is empty."""

    def place(
        self, objective: Objective, *, parallel: Literal["ddp", "fsdp"] = "ddp", shard_group: int | None = None
    ) -> "Replica":
        """``objective`` on the device, whole on each process or, under fsdp, a part of it on each.

        Raises:
            UserError: fsdp on a device that it does not know, or groups that do not divide the processes.
        """
        objective.to(self.device)
        if parallel == "ddp" or self.world == 1:
            return Replica(objective, self._accelerator)
        group = shard_group or self.world
        if self.world % group:
            raise UserError(
                f"train.shard_group is {group}; it must divide the number of processes, which is {self.world}."
            )
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"train.parallel is fsdp, which needs CUDA or the CPU, not {self.device.type}: set ddp.")
        return Shards(objective, self._accelerator, group=group)

    def autocast(self) -> AbstractContextManager[object]:
        """The dtype policy of a training step; see :func:`diptych.nn.inference.autocast`."""
        return autocast(self.device, self.precision)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over processes."""
        return self._accelerator.reduce(values, "mean") if self.world > 1 else values

    def agree(self, code: int) -> int:
        """The largest code of all processes, on each of them: what one has noticed, all act on."""
        if self.world == 1:
            return code
        codes = self._accelerator.gather(torch.tensor([code], device=self.device))
        return int(codes.max())

    def lost_another(self, error: RuntimeError) -> bool:
        """Whether ``error`` says that another process has left: its connections closed during an exchange."""
        return self.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def wait(self) -> None:
        """Block until all processes have called this."""
        if self.world > 1:
            self._accelerator.wait_for_everyone()

    def connect_anew(self) -> "dist.ProcessGroup":
        """Connections between the CPUs of all processes that only the caller uses. All processes have to call this."""
        return dist.new_group(backend="gloo", timeout=_PATIENCE)

    def seed(self, number: int) -> None:
        """Seed the global generators, which dropout draws from.

        `torch.manual_seed` would record a stack trace for every back end that is not in use, 0.3 ms at each step.
        """
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        elif self.device.type == "mps":
            torch.mps.manual_seed(number)


class Replica:
    """An objective whose weights each process has whole, and its gradient averaged over processes."""

    parts: Mapping[Tensor, ParameterShard] = {}
    """Of which parameters this process has a part only: none."""

    def __init__(self, objective: Objective, accelerator: Accelerator) -> None:
        self.objective = objective
        """What is trained."""
        self._accelerator = accelerator
        self.parameters: dict[str, nn.Parameter] = dict(objective.named_parameters())
        """What this process has of each parameter, by its name in the objective."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module``, which contains the objective, with averaged gradients among several processes.

        If a step may leave parameters without a gradient, the processes look for such parameters at each step, which
        walks the whole graph; without it such a step is an error.
        """
        skips = self.objective.may_skip_parameters
        self._accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=skips)
        return self._accelerator.prepare_model(module)

    def keep_local(self, module: nn.Module) -> AbstractContextManager[object]:
        """Inside, gradients are summed on each process and not exchanged: for all micro-batches but the last."""
        return self._accelerator.no_sync(module) if self._accelerator.num_processes > 1 else nullcontext()

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The objective's groups of parameters, as what this process has of them."""
        return groups

    def take_gradients(self) -> None:
        """Called after the backward pass: what this process has of a parameter gets its gradient."""

    def layout(self, name: str, moment: str = "") -> "Layout | None":
        """How the parameter ``name``, or a moment of it, lies on the processes; None: whole on each."""
        return None

    def fill(self, weights: Mapping[str, Tensor], *, keep: bool) -> Objective:
        """Give the caller's objective the weights, which it has all the time; return it."""
        return self.objective

    def empty(self) -> None:
        """Free what :meth:`fill` has filled."""


class Shards(Replica):
    """A copy of an objective whose weights, gradients and moments are spread over processes (FSDP2 of torch).

    Each process has some rows of each parameter. The rows of a block are gathered before it is used and dropped
    afterwards; those of all that is in no block stay from the beginning of a step to its end. Scalars and what the
    forward pass writes to are kept whole. The caller's objective is empty, but for the time of an evaluation and after
    the training, when :meth:`fill` gives it whole weights. So no other code meets a part of a weight.

    With ``group`` smaller than the number of processes, each ``group`` of them has a whole copy (hybrid sharding).
    """

    def __init__(self, objective: Objective, accelerator: Accelerator, *, group: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh  # a second of imports, for several processes alone

        device, world = accelerator.device, accelerator.num_processes
        shape = (world,) if group == world else (world // group, group)
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "rows")[-len(shape) :])
        self.whole = objective
        """The caller's objective."""
        # FSDP2 takes contiguous weights alone; the weights of convolutions may lie by channels.
        shared: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().contiguous(), p.requires_grad) for p in objective.parameters()
        }
        trained = copy.deepcopy(objective, shared | {id(buffer): buffer for buffer in objective.buffers()})
        super().__init__(trained, accelerator)
        written = {id(parameter) for parameter in trained.written_in_forward()}
        self._whole_names = {n for n, p in self.parameters.items() if p.ndim == 0 or id(p) in written}

    def wrap(self, module: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        # No block of ours or of transformers changes the output of another in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        ignored = {self.parameters[name] for name in self._whole_names}
        for part in (*blocks(self.objective), module):
            fully_shard(part, mesh=self.mesh, ignored_params=ignored)
        self._wrapped = dict(self.objective.named_parameters())
        self.parts = {}
        for name, parameter in self._wrapped.items():
            if name not in self._whole_names:
                local = nn.Parameter(local_part(parameter.detach()), parameter.requires_grad)
                self.parameters[name] = local
                self.parts[local] = ParameterShard(parameter.shape, self._total)
        self.empty()
        return module

    def keep_local(self, module: nn.Module) -> AbstractContextManager[object]:
        return nullcontext()  # each micro-batch is summed into the parts: to keep its gradient would take all of it

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        local = {self._wrapped[name]: parameter for name, parameter in self.parameters.items()}
        return [group | {"params": [local[p] for p in group["params"]]} for group in groups]

    def take_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            wrapped = self._wrapped[name]
            if wrapped is not parameter:
                parameter.grad = None if wrapped.grad is None else local_part(wrapped.grad)
                wrapped.grad = None
            elif parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self._accelerator.num_processes

    def layout(self, name: str, moment: str = "") -> "Layout | None":
        if name not in self.parameters or name in self._whole_names or moment in WHOLE_MOMENTS:
            return None
        return Layout(self._wrapped[name])

    @torch.no_grad()
    def fill(self, weights: Mapping[str, Tensor], *, keep: bool) -> Objective:
        """Give the caller's objective whole weights on processes that ``keep`` them. All processes have to call this.

        ``weights`` are parts, as in ``parameters``, which take the place of those in training.
        """
        targets = dict(self.whole.named_parameters())
        for name, parameter in self.parameters.items():
            local = weights.get(name, parameter.detach())
            layout = self.layout(name)
            gathered = local if layout is None else layout.spread(local).full_tensor()
            if keep:
                if layout is not None:
                    targets[name].data = torch.empty_like(gathered)
                targets[name].copy_(gathered)  # which also tells what was computed from other weights that they changed
        return self.whole

    def empty(self) -> None:
        for name, parameter in self.whole.named_parameters():
            if name not in self._whole_names:
                parameter.data = parameter.data.new_empty(0)

    def _total(self, values: Tensor) -> Tensor:
        """The sum over the processes that share a copy of the weights."""
        values = values.clone()
        dist.all_reduce(values, group=self.mesh.get_group("rows"))
        return values


class Layout:
    """How a parameter, and the moments that have as many rows, lie on the processes."""

    def __init__(self, wrapped: Any) -> None:
        """``wrapped`` is the parameter, a tensor of torch.distributed."""
        self._mesh, self._placements = wrapped.device_mesh, wrapped.placements
        self._rows = wrapped.shape[0]

    def spread(self, local: Tensor) -> Any:
        """The tensor of torch.distributed of which this process has ``local``."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size([self._rows, *local.shape[1:]])
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local.contiguous(), self._mesh, self._placements, run_check=False, shape=shape, stride=strides
        )

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Any:
        """A tensor of torch.distributed to be filled."""
        return self.spread(self.rows(torch.empty(shape, dtype=dtype, device=self._mesh.device_type)))

    def rows(self, whole: Tensor) -> Tensor:
        """What this process has of ``whole``."""
        parts = whole.chunk(self._mesh.size(-1))
        place = self._mesh.get_local_rank(self._mesh.ndim - 1)
        return parts[place] if place < len(parts) else whole[:0]


def blocks(module: nn.Module) -> list[nn.Module]:
    """The parts that ``module`` repeats, such as transformer blocks: what lies in its outermost lists of modules."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [part for part in child if next(part.parameters(), None) is not None]
        else:
            found += blocks(child)
    return found


def checkpoint_activations(module: nn.Module) -> None:
    """From now on the backward pass computes the activations of each block once more instead of keeping them."""
    for block in blocks(module):
        if "forward" not in vars(block):
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def join_processes(device: Device) -> None:
    """Make this process one of those that torchrun started, or the only one. To be called before anything below, and
    again before a run on another device.

    accelerate has to be told the device: on a machine without a GPU it would otherwise ignore torchrun.
    """
    kind = pick_device(device)
    if PartialState._shared_state and PartialState().device.type != kind:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run here was on another device
    if not PartialState._shared_state:
        PartialState(cpu=kind == "cpu", timeout=_PATIENCE)
        atexit.register(_leave)


def process_count() -> int:
    """Number of processes that train together."""
    return PartialState().num_processes


def is_main_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return PartialState().is_main_process


def main_process_first() -> AbstractContextManager[None]:
    """The main process runs the block alone; the others run it afterwards and find the files that it made."""
    return PartialState().main_process_first()


def wait_for_everyone() -> None:
    """Block until all processes have called this."""
    PartialState().wait_for_everyone()


def _leave() -> None:
    """Close the process group: an exit with its threads still running aborts now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
