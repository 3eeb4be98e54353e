"""Optimizers, learning-rate schedules, and the clipping of gradients.

Both optimizers honour an attribute ``found_inf`` (a 0-d tensor): where it is 1, a step leaves weights and moments as
they were. So the loop can skip a bad update without waiting for the device to report it.

Shapes: R rows, C columns of a parameter seen as a matrix (its first dimension by all others).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diptych.errors import UserError
from diptych.train.config import OptimConfig
from diptych.train.objective import Objective


def learning_rate(step: int, config: OptimConfig, *, steps: int) -> float:
    """The learning rate of the update that ends step ``step`` (from 0) of ``steps``.

    It rises linearly over the warm-up, then follows ``config.schedule``: constant, or a cosine down to ``final_lr``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr + (1 - config.final_lr) * share)


def trained_groups(objective: Objective, *, weight_decay: float) -> list[dict[str, Any]]:
    """The objective's groups without frozen parameters, each with a ``weight_decay`` (its own or the run's) and a
    ``lr_scale``.

    Raises:
        UserError: all parameters are frozen.
    """
    groups = [
        {"weight_decay": weight_decay, "lr_scale": 1.0} | group | {"params": trained}
        for group in objective.parameter_groups()
        if (trained := [p for p in group["params"] if p.requires_grad])
    ]
    if not groups:
        raise UserError(f"{type(objective).__name__} has no parameter to train: all are frozen.")
    return groups


WHOLE_MOMENTS = frozenset({"step", "column_square"})
"""Moments that each process has whole, also where it has a part of the parameter."""


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """What a process has of a parameter of which each process has some rows."""

    shape: torch.Size
    """Shape of the whole parameter."""
    total: Callable[[Tensor], Tensor]
    """The sum of a tensor over the processes that share the parameter."""


def make_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, *, parts: Mapping[Tensor, ParameterShard] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters. Its learning rate is set anew by the loop at each step. ``parts`` says
    which of the parameters are the part that this process has of one that is spread over several."""
    if config.name == "adafactor":
        return Adafactor(groups, lr=config.lr, betas=config.betas, parts=parts)
    # Fused everywhere: on a CPU, for 150 small tensors, it took 4 ms where foreach took 15 and the plain loop 17.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def clip_gradient(
    parameters: list[nn.Parameter], limit: float | None, *, parts: Mapping[Tensor, ParameterShard] | None = None
) -> Tensor:
    """Scale all gradients so that their common norm is at most ``limit``; return the norm before (0-d, fp32).

    ``parts`` as in :func:`make_optimizer`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if parts:
        whole = [p.grad for p in parameters if p.grad is not None and p not in parts]
        split = [p.grad for p in parameters if p.grad is not None and p in parts]
        square = torch.nn.utils.get_total_norm(split).square() if split else gradients[0].new_zeros(())
        square = next(iter(parts.values())).total(square)
        norm = (square + torch.nn.utils.get_total_norm(whole).square()).sqrt() if whole else square.sqrt()
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
    if limit is not None:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm.float()


class Adafactor(torch.optim.Optimizer):
    r"""Adafactor as large vision models train with it: with momentum, an absolute learning rate, and a cap on the decay
    of the second moment, which is kept as one number per row and one per column.

    For a gradient :math:`G_t` of a matrix, with :math:`\beta_{2,t} = \min(1 - t^{-0.8}, \beta_2)`:

        r_t = b r_{t-1} + (1 - b) rowmean(G_t^2 + eps)      c_t likewise over columns      V_t = r_t c_t / mean(r_t)
        U_t = G_t / sqrt(V_t)             U_t <- U_t / max(1, rms(U_t) / clip_rms)
        m_t = beta_1 m_{t-1} + (1 - beta_1) U_t                     x_t = (1 - lr wd) x_{t-1} - lr m_t

    Vectors keep V_t in full. Source: Shazeer and Stern, 2018, algorithms 4 to 6, without the learning rate relative
    to the parameter's size, with the momentum and the cap of Zhai et al., 2022 ("Scaling Vision Transformers").
    `torch.optim.Adafactor` is the relative one without momentum: learning rates for it do not suit this one.

    The update is skipped when the attribute ``found_inf`` (a 0-d tensor) is set and not zero; unlike fused AdamW,
    Adafactor waits for the device to read it.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.96),
        weight_decay: float = 0.0,
        clip_rms: float = 1.0,
        eps: float = 1e-30,
        parts: Mapping[Tensor, ParameterShard] | None = None,
    ) -> None:
        self._parts = parts or {}
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "clip_rms": clip_rms, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is not None and self.found_inf.item():
            return loss
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_initial_state(parameter))
        state["step"] += 1
        beta1, cap = group["betas"]
        beta2 = min(1 - state["step"].item() ** -0.8, cap)

        gradient = parameter.grad.float()  # type: ignore[union-attr]
        part = self._parts.get(parameter)
        update = gradient * _inverse_root(state, gradient, beta2=beta2, eps=group["eps"], part=part)
        if part is None:
            rms = update.norm() / update.numel() ** 0.5
        else:
            rms = (part.total(update.square().sum()) / part.shape.numel()).sqrt()
        update /= (rms / group["clip_rms"]).clamp(min=1.0)
        momentum = state["momentum"].lerp_(update, 1 - beta1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(momentum, alpha=group["lr"])


def _initial_state(parameter: Tensor) -> dict[str, Tensor]:
    # The step counter stays on the CPU, as in torch's own optimizers: reading it costs no wait for the device.
    state = {"step": torch.zeros(()), "momentum": torch.zeros_like(parameter, dtype=torch.float32)}
    if parameter.ndim < 2:
        return state | {"square": torch.zeros_like(state["momentum"])}
    matrix_RC = state["momentum"].flatten(1)
    return state | {
        "row_square": matrix_RC.new_zeros(len(matrix_RC)),
        "column_square": matrix_RC.new_zeros(matrix_RC.shape[1]),
    }


def _inverse_root(
    state: dict[str, Tensor], gradient: Tensor, *, beta2: float, eps: float, part: ParameterShard | None
) -> Tensor:
    """Advance the second moment and return 1 / sqrt(V), of the gradient's shape."""

    def over_rows(x: Tensor) -> Tensor:
        """The mean over the rows of all processes."""
        return x.mean(0) if part is None else part.total(x.sum(0)) / part.shape[0]

    if gradient.ndim < 2:
        return state["square"].lerp_(gradient.square() + eps, 1 - beta2).rsqrt()
    square_RC = gradient.flatten(1).square() + eps
    row_R = state["row_square"].lerp_(square_RC.mean(1), 1 - beta2)
    column_C = state["column_square"].lerp_(over_rows(square_RC), 1 - beta2)
    inverse_RC = (row_R / over_rows(row_R)).rsqrt()[:, None] * column_C.rsqrt()
    return inverse_RC.view_as(gradient)
