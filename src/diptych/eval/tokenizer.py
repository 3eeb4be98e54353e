"""How much of a picture survives its tokens, and how much of the vocabulary is in use.

Shapes: B pictures, H and W pixels, N tokens of a picture, K codes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from diptych.errors import UserError
from diptych.eval.features import FeatureExtractor, feature_statistics
from diptych.eval.frechet import FeatureStatistics, frechet_distance
from diptych.models.image_tokenizer import ImageTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerScore:
    images: int
    """How many pictures were measured."""
    psnr: float
    """Peak signal-to-noise ratio in decibels, the mean over pictures; a perfect picture counts as 99."""
    perplexity: float
    """exp of the entropy of all tokens: how many codes are in effective use, at most K."""
    used: float
    """Share of the K codes that occur at all. Small sets cannot use many."""
    rfd: float | None
    """Frechet distance between pictures and reconstructions in ``rfd_features``; None when not asked for."""
    rfd_features: str | None
    """Which features: only FID's own network makes this the rFID of papers."""

    def __str__(self) -> str:
        line = f"PSNR {self.psnr:.1f} dB, {self.used:.0%} of the codes in use, {self.perplexity:.0f} in effective use"
        return line if self.rfd is None else f"{line}, rFD {self.rfd:.2f} ({self.rfd_features})"


def evaluate_tokenizer(
    tokenizer: ImageTokenizer,
    batches: Iterable[UInt8[Tensor, "B 3 H W"]],
    *,
    extractor: FeatureExtractor | None = None,
) -> TokenizerScore:
    """Encodes and decodes every picture once. Raises UserError when there is none (two for the Frechet distance)."""
    psnr_sum, images, count_K = 0.0, 0, torch.zeros(tokenizer.codes, dtype=torch.int64)
    sides: tuple[FeatureStatistics, FeatureStatistics] | None = None
    for pixels_B3HW in batches:
        tokens_BN = tokenizer.encode(pixels_B3HW)
        output_B3HW = tokenizer.decode(tokens_BN).cpu()
        psnr_sum += psnr_of_each(output_B3HW, pixels_B3HW.cpu()).sum().item()
        images += len(pixels_B3HW)
        count_K += torch.bincount(tokens_BN.flatten().cpu(), minlength=tokenizer.codes)
        if extractor is not None:
            seen = [feature_statistics(extractor, side) for side in (pixels_B3HW, output_B3HW)]
            sides = (sides[0].merge(seen[0]), sides[1].merge(seen[1])) if sides else (seen[0], seen[1])
    if not images:
        raise UserError("no pictures to measure the image tokenizer on; give at least one")
    return TokenizerScore(
        images=images,
        psnr=psnr_sum / images,
        perplexity=torch.special.entr(count_K / count_K.sum()).sum().exp().item(),
        used=(count_K > 0).float().mean().item(),
        rfd=frechet_distance(*sides).value if sides else None,
        rfd_features=extractor.name if extractor is not None else None,
    )


def psnr_of_each(output_B3HW: UInt8[Tensor, "B 3 H W"], target_B3HW: UInt8[Tensor, "B 3 H W"]) -> Tensor:
    """Decibels of every picture, [B]; at most 99."""
    error_B = (output_B3HW.double() - target_B3HW.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(255**2 / error_B)).clamp(max=99)
