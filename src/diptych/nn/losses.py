"""The cross-entropy that every loss of ITIT is made of.

Shapes: B rows, T positions of image or text tokens, V codebook entries or words of the vocabulary.
"""

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
