"""The two cross-entropies that every loss of ITIT is made of: of image tokens and of text tokens.

Both are means over rows of a row's mean, so that they are the same for any split of the rows over micro-batches or
processes. (The equations of the paper are sums over tokens in expectation over rows; it does not say how it
normalizes.)

Shapes: B rows, N image tokens, C codebook entries, L text tokens, V vocabulary.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def image_loss(
    logits_BNC: Float[Tensor, "B N C"],
    tokens_BN: Int[Tensor, "B N"],
    hidden_BN: Bool[Tensor, "B N"],
    *,
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """- sum over hidden k of log p(i_k | ...), equations (2) and (4), as a mean."""
    return _row_mean(logits_BNC, tokens_BN, hidden_BN, label_smoothing)


def text_loss(
    logits_BLV: Float[Tensor, "B L V"],
    ids_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    *,
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """- sum over l of log p(t_l | ..., t_0 .. t_{l-1}), equations (1) and (3), as a mean. Padding does not count."""
    return _row_mean(logits_BLV, ids_BL, valid_BL, label_smoothing)


def _row_mean(logits: Tensor, target: Tensor, counts: Tensor, label_smoothing: float) -> Tensor:
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), target.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(target)
    weight = counts.to(loss.dtype)
    return ((loss * weight).sum(1) / weight.sum(1).clamp_min(1)).mean()
