"""The rows of all processes as one tensor, for losses that compare rows.

Shapes: ... any leading axes, B rows of this process, W processes, D width.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from diptych.nn.gradients import scale_gradient


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
