"""Parallel decoding of image tokens (MaskGIT), as ITIT draws with it, and guidance.

Shapes: B rows, N image tokens, C codebook entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.data.batch import Draws
from diptych.errors import UserError


@dataclass(frozen=True, slots=True)
class Canvas:
    """A picture on its way: known tokens, and which positions are still hidden."""

    tokens_BN: Int[Tensor, "B N"]
    hidden_BN: Bool[Tensor, "B N"]
    progress: float
    """s / S: 0 at the first step, below 1 at the last."""
    most_known: int
    """No row has more known tokens than this (known without asking the device)."""


Logits = Callable[[Canvas], Tensor]
"""Logits [B N C] of every position of a canvas."""


def guided(conditional: Logits, unconditional: Logits, *, guidance: float, ramp: bool = False) -> Logits:
    """Classifier-free guidance: l_g = (1 + lambda) l_c - lambda l_u.

    ``guidance`` is the paper's lambda (scale 1 + lambda in the convention of `diffusers`). With ``ramp`` it rises
    linearly from 0 over the steps, as in Muse; the paper does not say, and the default does not.
    """
    if guidance == 0:
        return conditional

    def logits(canvas: Canvas) -> Tensor:
        weight = guidance * canvas.progress if ramp else guidance
        return (1 + weight) * conditional(canvas) - weight * unconditional(canvas)

    return logits


def parallel_decode(
    logits: Logits,
    tokens_BN: Int[Tensor, "B N"],
    hidden_BN: Bool[Tensor, "B N"],
    *,
    steps: int,
    temperature: float,
    token_temperature: float = 1.0,
    draws: Draws,
) -> Int[Tensor, "B N"]:
    """Fill the hidden positions in ``steps`` rounds, the surest first. Known tokens never change.

    At step s each hidden token is sampled; its confidence is log p(sampled) + t (1 - s/S) Gumbel, and
    floor(n cos(pi/2 (s+1)/S)) of a row's n hidden tokens stay hidden: those of least confidence.

    Departure: at least one token of a row is revealed in each round, so short grids finish early instead of idling.

    Args:
        temperature: t, of the confidence. It is not multiplied into itself from step to step.
        token_temperature: divides the logits that tokens are sampled from; 0 takes the likeliest.
    """
    if steps < 1:
        raise UserError(f"{steps} drawing steps: at least one is needed")
    rows, positions = tokens_BN.shape
    device = tokens_BN.device
    first_B = hidden_BN.sum(1)
    least, most = (int(count) for count in torch.stack([first_B.min(), first_B.max()]).tolist())
    for step in range(min(steps, most)):
        known = positions - int(_still_hidden(torch.tensor(least), step, steps))
        logits_BNC = logits(Canvas(tokens_BN, hidden_BN, step / steps, known)).float()
        chance_BN = draws.uniform(f"token/{step}", rows, positions, device=device)
        sampled_BN, log_p_BN = sample_tokens(logits_BNC, chance_BN, temperature=token_temperature)
        tokens_BN = torch.where(hidden_BN, sampled_BN, tokens_BN)
        noise_BN = draws.gumbel(f"confidence/{step}", rows, positions, device=device)
        confidence_BN = log_p_BN + temperature * (1 - step / steps) * noise_BN
        rank_BN = confidence_BN.masked_fill(~hidden_BN, math.inf).argsort(1).argsort(1)
        # Infinite confidence may tie with nothing that is hidden, so no known token can be among the lowest ranks.
        hidden_BN = rank_BN < _still_hidden(first_B, step + 1, steps)[:, None]
    return tokens_BN


def _still_hidden(first: Tensor, rounds: int, steps: int) -> Tensor:
    """How many of ``first`` hidden tokens are left after so many rounds."""
    cosine = 0.0 if rounds >= steps else math.cos(math.pi / 2 * rounds / steps)
    return torch.minimum((first * cosine).floor().long(), first - rounds).clamp_min(0)


def sample_tokens(
    logits_BNC: Float[Tensor, "B N C"], chance_BN: Float[Tensor, "B N"], *, temperature: float = 1.0
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Sample each position's token by inverting its cumulative distribution at ``chance_BN`` in [0, 1).

    One random number a position, where the Gumbel trick would take one a code. Returns the tokens and the logarithm
    of their probability under ``logits_BNC`` (at temperature 1).
    """
    log_p_BNC = logits_BNC.log_softmax(-1)
    if temperature == 0:
        log_p_BN, sampled_BN = log_p_BNC.max(-1)
        return sampled_BN, log_p_BN
    cumulative_BNC = (log_p_BNC if temperature == 1 else logits_BNC / temperature).softmax(-1).cumsum(-1)
    target_BN1 = chance_BN[..., None] * cumulative_BNC[..., -1:]
    sampled_BN = torch.searchsorted(cumulative_BNC, target_BN1, right=True).squeeze(-1)
    sampled_BN = sampled_BN.clamp_max(logits_BNC.shape[-1] - 1)
    return sampled_BN, log_p_BNC.gather(-1, sampled_BN[..., None]).squeeze(-1)
