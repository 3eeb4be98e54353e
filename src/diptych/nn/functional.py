"""Functions that the objectives of all learners use: cross-entropy over tokens, functions whose gradient is not that of
their value, and the rows of all processes as one tensor, for losses that compare rows.

Shapes: ... any leading axes, T positions of image or text tokens, V entries of a table (codes or words), D width,
B rows of this process, W processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_loss(
    logits_BTV: Float[Tensor, "B T V"],
    target_BT: Int[Tensor, "B T"],
    counts_BT: Bool[Tensor, "B T"],
    *,
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """- sum over t of log p(target_t | ...), the common part of equations (1) to (4), as a mean.

    The mean is over rows, of a row's mean over the positions that count. So it is the same for any split of the rows
    over micro-batches or processes. (The equations of the paper are sums over tokens in expectation over rows; it does
    not say how it normalizes.) A row in which nothing counts adds 0.

    Args:
        logits_BTV: Scores of every token at each position.
        target_BT: The true tokens.
        counts_BT: True where the loss is taken: hidden image tokens, or valid text tokens.
        label_smoothing: Share of the target's probability that is spread over all tokens.
    """
    loss_BT = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(target_BT)
    weight_BT = counts_BT.to(loss_BT.dtype)
    return ((loss_BT * weight_BT).sum(1) / weight_BT.sum(1).clamp_min(1)).mean()


def scale_gradient(z: Tensor, factor: float) -> Tensor:
    """z <- factor z + sg((1 - factor) z): the value of z, ``factor`` of its gradient (ITIT, implementation details)."""
    return factor * z + ((1 - factor) * z).detach()


def straight_through_embedding(logits: Float[Tensor, "... V"], table: Float[Tensor, "V D"]) -> Float[Tensor, "... D"]:
    """Embed the likeliest entry of each position; the gradient is that of the embedded softmax.

    Equals ``(hard + (soft - soft.detach())) @ table`` with ``soft = softmax(logits)`` and ``hard`` its one-hot argmax,
    but gathers rows instead of multiplying by a dense one-hot ([64, 256, 8192] in fp32 would take half a gigabyte).
    Add Gumbel noise to ``logits`` for a straight-through Gumbel-softmax.
    """
    return _StraightThroughEmbedding.apply(logits.float(), table)


class _StraightThroughEmbedding(torch.autograd.Function):
    """Forward: rows of the table. Backward: as if they were weighted by the softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, table: Tensor) -> Tensor:
        best = logits.argmax(-1)
        ctx.save_for_backward(logits, table, best)
        return table[best]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = outputs
        logits, table, best = ctx.saved_tensors
        grad_logits = grad_table = None
        if ctx.needs_input_grad[0]:
            soft = logits.softmax(-1)
            grad_soft = (grad.to(table.dtype) @ table.T).to(soft.dtype)
            grad_logits = soft * (grad_soft - (soft * grad_soft).sum(-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            flat = grad.reshape(-1, grad.shape[-1]).to(table.dtype)
            grad_table = torch.zeros_like(table).index_add_(0, best.reshape(-1), flat)
        return grad_logits, grad_table


def gather_rows(local: Float[Tensor, "... B D"]) -> Float[Tensor, "... WB D"]:
    """Concatenate the rows of all processes, in the order of their ranks, on each of them.

    The gradient is exact if every process computes the same loss from the result and the gradients of the weights are
    averaged over processes, as DistributedDataParallel does. Every process then holds dL/d(all rows) and sends on the
    part of its own rows, times W, which the average takes away again; nothing has to be exchanged. Parameters of the
    loss itself, such as a temperature, are counted once.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world)]
    dist.all_gather(parts, local.detach().contiguous())
    parts[dist.get_rank()] = scale_gradient(local, float(world))
    return torch.cat(parts, dim=-2)


def local_part(tensor: Any) -> Tensor:
    """What this process has of ``tensor``: all of it, but of a tensor of torch.distributed its rows."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
