"""Processes, devices and precision. No other file uses accelerate.

A training run is one process, or several that torchrun started; the one of rank 0 is the main process. The functions
at the end serve code around the training loop; the loop itself uses :class:`Devices`.
"""

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

    def wrap(self, module: nn.Module, *, may_skip_parameters: bool) -> nn.Module:
        """``module`` on the device and, among several processes, with averaged gradients.

        ``may_skip_parameters`` says that a step may leave parameters without a gradient. The processes then look for
        such parameters at each step, which walks the whole graph; without it such a step is an error.
        """
        self._accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=may_skip_parameters)
        return self._accelerator.prepare_model(module)

    def autocast(self) -> AbstractContextManager[object]:
        """The dtype policy of a training step; see :func:`diptych.nn.inference.autocast`."""
        return autocast(self.device, self.precision)

    def keep_local(self, module: nn.Module) -> AbstractContextManager[object]:
        """Inside, gradients are summed on each process and not exchanged: for all micro-batches but the last."""
        return self._accelerator.no_sync(module) if self.world > 1 else nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over processes."""
        return self._accelerator.reduce(values, "mean") if self.world > 1 else values

    def agree(self, code: int) -> int:
        """The largest code of all processes, on each of them: what one has noticed, all act on."""
        if self.world == 1:
            return code
        codes = self._accelerator.gather(torch.tensor([code], device=self.device))
        return int(codes.max())

    def wait(self) -> None:
        """Block until all processes have called this."""
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


def join_processes(device: Device) -> None:
    """Make this process one of those that torchrun started, or the only one. To be called before anything below, and
    again before a run on another device.

    accelerate has to be told the device: on a machine without a GPU it would otherwise ignore torchrun.
    """
    kind = pick_device(device)
    if PartialState._shared_state and PartialState().device.type != kind:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run here was on another device
    if not PartialState._shared_state:
        # The others wait while the main process evaluates, which may take long.
        PartialState(cpu=kind == "cpu", timeout=timedelta(hours=4))
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
