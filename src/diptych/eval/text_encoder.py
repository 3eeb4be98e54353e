"""Whether a text encoder tells texts apart.

Shapes: X tokens of all texts together, F width of the features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.models.text_encoder import TextEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderScore:
    texts: int
    """How many were measured."""
    effective_rank: float
    """In how many directions the features of tokens vary."""
    width: int
    """In how many they could (F)."""

    def __str__(self) -> str:
        line = f"features vary in {self.effective_rank:.1f} of {self.width} directions"
        # The encoder of `itit-tiny` reaches a third; one whose decoder had not learned to read it, a hundredth.
        return (
            f"{line}: too few to tell texts apart, train it longer" if self.effective_rank < self.width / 32 else line
        )


def evaluate_text_encoder(encoder: TextEncoder, texts: Sequence[str], *, length: int) -> TextEncoderScore:
    """Encodes every text once."""
    ids_BL, valid_BL = (side.to(encoder.embedding.weight.device) for side in encoder.tokenize(texts, length=length))
    features_XF = encoder.features(ids_BL, valid_BL)[valid_BL]
    return TextEncoderScore(texts=len(texts), effective_rank=effective_rank(features_XF), width=features_XF.shape[1])


def effective_rank(features_XF: Float[Tensor, "X F"]) -> float:
    """exp of the entropy of the shares that the principal directions have of the variance (after Roy and Vetterli,
    2007, who take the singular values themselves)."""
    variance_F = torch.linalg.svdvals((features_XF - features_XF.mean(0)).double()).square()
    share_F = variance_F / variance_F.sum().clamp_min(torch.finfo(variance_F.dtype).tiny)
    return torch.exp(torch.special.entr(share_F).sum()).item()
