"""Which image tokens a training pass hides (to be predicted) and which it drops (out of the encoder).

Shapes: B rows, N image tokens, K tokens kept for the encoder.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diptych.errors import UserError
from diptych.rng import StepRNG


@dataclass(kw_only=True, slots=True)
class MaskingConfig:
    """A normal distribution of the hidden share, cut at both ends (Table 3)."""

    low: float = 0.5
    """Least share of tokens hidden. Just this share is dropped: it is hidden in every row."""
    high: float = 1.0
    """Largest share of tokens hidden."""
    mode: float = 0.75
    """Mode of the normal distribution."""
    std: float = 0.25
    """Its standard deviation before the cut."""


@dataclass(frozen=True, slots=True)
class Masking:
    hidden_BN: Bool[Tensor, "B N"]
    keep_BK: Int[Tensor, "B K"]
    """Positions that enter the encoder: all visible ones, filled up with hidden ones to K = N - floor(low N)."""


def sample_masking(
    config: MaskingConfig, rows: int, positions: int, *, rng: StepRNG, name: str, device: torch.device
) -> Masking:
    """Draw a share for every row and hide that many of its tokens at random.

    One random order a row decides all: its first tokens are visible, its last are dropped, so that what is dropped
    is always hidden and batches stay rectangular whatever the shares.
    """
    if not 0 <= config.low <= config.high <= 1:
        raise UserError(f"hidden share from {config.low} to {config.high}: give 0 <= low <= high <= 1")
    order_BN = rng.uniform(f"{name}/order", rows, positions, device=device).argsort(1)
    chance_B = rng.uniform(f"{name}/share", rows, device=device)
    share_B = _truncated_normal(chance_B, config)
    hidden_count_B = (share_B * positions).round().clamp(1, positions)
    dropped = math.floor(config.low * positions)
    hidden_count_B = hidden_count_B.clamp_min(dropped)
    place_BN = torch.arange(positions, device=device).expand(rows, -1)
    hidden_BN = torch.zeros(rows, positions, dtype=torch.bool, device=device)
    hidden_BN.scatter_(1, order_BN, place_BN >= (positions - hidden_count_B)[:, None])
    return Masking(hidden_BN, order_BN[:, : positions - dropped])


def _truncated_normal(chance_B: Tensor, config: MaskingConfig) -> Tensor:
    """Inverse of the cut normal's cumulative distribution."""

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - config.mode) / (config.std * math.sqrt(2))))

    at_low, at_high = below(config.low), below(config.high)
    cumulative_B = at_low + chance_B * (at_high - at_low)
    share_B = config.mode + config.std * math.sqrt(2) * torch.erfinv(2 * cumulative_B - 1)
    return share_B.clamp(config.low, config.high)
