"""Processes, devices and precision: the only file that knows accelerate."""

import atexit
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from diptych.nn.inference import Device, Precision, autocast, pick_device


class Devices:
    """This process among those that train, and the device it trains on."""

    def __init__(self, *, device: Device, precision: Precision) -> None:
        kind = join_processes(device).device.type
        # Terms may be switched on late or off for a step, so a step may leave parameters without a gradient.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        # Mixed precision is ours (below): accelerate fixes its own for the life of the process.
        self._accelerator = Accelerator(cpu=kind == "cpu", mixed_precision="no", kwargs_handlers=handlers)
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.first: bool = self._accelerator.is_main_process
        self.precision: Precision = precision
        self.waits = self.device.type != "cpu"
        """Whether reading a number from the device stops the queue of kernels."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` on the device and, among several processes, with averaged gradients."""
        return self._accelerator.prepare_model(module)

    def autocast(self) -> AbstractContextManager[object]:
        """Of a step; see :func:`diptych.nn.inference.autocast`."""
        return autocast(self.device, self.precision)

    def keep_local(self, module: nn.Module) -> AbstractContextManager[object]:
        """Gradients of a micro-batch before the last are not exchanged."""
        return self._accelerator.no_sync(module) if self.world > 1 else nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        return self._accelerator.reduce(values, "mean") if self.world > 1 else values

    def agree(self, code: int) -> int:
        """The largest code of all processes: what one has noticed, all act on."""
        if self.world == 1:
            return code
        codes = self._accelerator.gather(torch.tensor([code], device=self.device))
        return int(codes.max())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            self._accelerator.wait_for_everyone()

    def seed(self, number: int) -> None:
        """Seed the global generators, which dropout draws from.

        `torch.manual_seed` would record a stack trace for every back end that is not in use, 0.3 ms at each step.
        """
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        elif self.device.type == "mps":
            torch.mps.manual_seed(number)


def join_processes(device: Device) -> PartialState:
    """This process among those that torchrun started, or alone. To be called before anything asks for its rank: a
    ``PartialState`` made without the device takes each process on a CPU for the only one."""
    kind = pick_device(device)
    if PartialState._shared_state and PartialState().device.type != kind:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run here was on another device
    if not PartialState._shared_state:
        # The others wait while the first process evaluates, which may take long.
        PartialState(cpu=kind == "cpu", timeout=timedelta(hours=4))
        atexit.register(_leave)
    return PartialState()


def _leave() -> None:
    """An exit with the group's threads still running aborts now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
