"""Optimisers and learning-rate schedules.

Both optimisers honour an attribute ``found_inf`` (a 0-d tensor): where it is 1, a step leaves weights and moments as
they were. The loop can so skip a bad update without waiting for the device to say that it was bad.
"""

import math
from typing import Any

import torch
from torch import nn

from diptych.errors import UserError
from diptych.train.adafactor import Adafactor
from diptych.train.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, *, steps: int) -> float:
    """The learning rate of the update that ends step ``step`` (from 0) of ``steps``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * share)


def parameter_groups(objective: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups: vectors and scalars (norms, biases, scales) do not decay.

    An objective that knows better offers ``parameter_groups()``: a list of dicts with ``params`` and, where they
    differ from the run's, ``weight_decay`` and ``lr_scale`` (a factor on the learning rate).
    """
    if offered := getattr(objective, "parameter_groups", None):
        groups = [dict(group, params=[p for p in group["params"] if p.requires_grad]) for group in offered()]
    else:
        trained = [p for p in objective.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    groups = [{"weight_decay": weight_decay, "lr_scale": 1.0} | group for group in groups if group["params"]]
    if not groups:
        raise UserError(f"{type(objective).__name__} has no parameter to train: all are frozen.")
    return groups


def make_optimizer(objective: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser over what ``objective`` trains. Its learning rate is set anew by the loop at each step."""
    groups = parameter_groups(objective, weight_decay=config.weight_decay)
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr, betas=config.betas)
    # Fused everywhere: on a CPU, for 150 small tensors, it took 4 ms where foreach took 15 and the plain loop 17.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def clip_gradient(parameters: list[nn.Parameter], limit: float | None) -> torch.Tensor:
    """Scale all gradients so that their common norm is at most ``limit``; return the norm before (0-d, fp32)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm.float()
