"""Random choice of the image tokens that are hidden, to be predicted, and of those that do not enter the encoder.

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
    """Normal distribution of the share of hidden tokens in a row, cut at both ends (Table 3)."""

    low: float = 0.5
    """Smallest share of hidden tokens, between 0 and 1. The same share of tokens does not enter the encoder."""
    high: float = 1.0
    """Largest share of hidden tokens, between 0 and 1."""
    mode: float = 0.75
    """Mode of the normal distribution, as a share."""
    std: float = 0.25
    """Standard deviation of the normal distribution before the cut, as a share."""


@dataclass(frozen=True, slots=True)
class Masking:
    """The hidden tokens of each row, and those that enter the encoder."""

    hidden_BN: Bool[Tensor, "B N"]
    """True where a token is to be predicted."""
    keep_BK: Int[Tensor, "B K"]
    """Positions that enter the encoder: all visible ones, and hidden ones up to K = N - floor(low N)."""


def sample_masking(
    config: MaskingConfig, rows: int, positions: int, *, rng: StepRNG, name: str, device: torch.device
) -> Masking:
    """Sample a share for every row, and hide that share of its tokens at random.

    Each row has one random order of its tokens: the first ones are visible, and the last ones do not enter the encoder.
    So dropped tokens are always hidden, and batches stay rectangular whatever the shares. Raises UserError for shares
    that are no range within 0 and 1.
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
    """Shares at the quantiles ``chance_B`` of the cut normal distribution."""

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - config.mode) / (config.std * math.sqrt(2))))

    at_low, at_high = below(config.low), below(config.high)
    cumulative_B = at_low + chance_B * (at_high - at_low)
    share_B = config.mode + config.std * math.sqrt(2) * torch.erfinv(2 * cumulative_B - 1)
    return share_B.clamp(config.low, config.high)
