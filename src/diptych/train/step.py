"""One training step: the gradient of a batch over micro-batches and processes, and the update of the weights."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.data.batch import Batch, split
from diptych.rng import derive_seed
from diptych.train.checkpoint import Ema
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import Devices, checkpoint_activations
from diptych.train.objective import Objective
from diptych.train.optim import clip_gradient, learning_rate, make_optimizer, trained_groups


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of a step, still on the device."""

    names: list[str]
    """Names in metrics.jsonl of the terms and measures."""
    values: Tensor
    """[2 + names]: the loss, its terms and measures, the norm of the gradient before it was clipped."""
    lr: float
    """Learning rate of the update."""


class TrainStep:
    """Prepares an objective for training, and makes one update of its weights per call."""

    def __init__(self, objective: Objective, *, train: TrainConfig, optim: OptimConfig, devices: Devices) -> None:
        self.train, self.optim, self.devices = train, optim, devices
        objective.train()
        if train.checkpoint_activations:
            checkpoint_activations(objective)
        self.placed = devices.place(objective, parallel=train.parallel, shard_group=train.shard_group)
        self.objective = self.placed.objective
        if train.compile:
            self.objective.compile_regions()
        self.model = self.placed.wrap(_UnderPolicy(self.objective, devices))
        groups = self.placed.groups(trained_groups(self.objective, weight_decay=optim.weight_decay))
        self.optimizer = make_optimizer(groups, optim, parts=self.placed.parts)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.ema = Ema(self.placed.parameters, decay=train.ema) if train.ema is not None else None

    def __call__(self, step: int, batch: Batch) -> StepResult:
        """Train on ``batch``, the rows of this process. A loss or gradient that is not finite changes nothing."""
        self.objective.start_step(step)
        names, losses = self._differentiate(step, batch)
        self.placed.take_gradients()
        norm = clip_gradient(self.parameters, self.optim.max_grad_norm, parts=self.placed.parts)
        lr = learning_rate(step, self.optim, steps=self.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # The optimizer skips the update where this is 1. Asking here would make the CPU wait for the GPU at each step.
        self.optimizer.found_inf = (~torch.isfinite(losses[0] + norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(step)
        return StepResult(names, torch.cat([losses, norm[None]]), lr)

    def _differentiate(self, step: int, batch: Batch) -> tuple[list[str], Tensor]:
        """Leave the gradient of the whole batch in the parameters; return what is logged: names, and the loss first."""
        names: list[str] = []
        parts: list[Tensor] = []
        for micro in split(batch, self.train.grad_accum_steps):
            self.devices.seed(derive_seed(self.train.seed, "step", step, micro.rng.rank))
            last = len(parts) + 1 == self.train.grad_accum_steps
            with nullcontext() if last else self.placed.keep_local(self.model):
                total, logged = self.model(micro, step)
                (total / self.train.grad_accum_steps).backward()
            names = list(logged)
            parts.append(torch.stack([value.float() for value in (total.detach(), *logged.values())]))
        return names, self.devices.mean(torch.stack(parts).mean(0) if len(parts) > 1 else parts[0])


class _UnderPolicy(nn.Module):
    """The module that is wrapped for several processes: the objective under the dtype policy, its losses as tensors.

    Only the total keeps its graph, because DistributedDataParallel waits for the gradient of every parameter that any
    output depends on.
    """

    def __init__(self, objective: Objective, devices: Devices) -> None:
        super().__init__()
        self.objective, self._devices = objective, devices

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with self._devices.autocast():
            losses = self.objective(batch, step)
        return losses.total, losses.logged()
