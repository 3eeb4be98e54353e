"""Frechet distance between two sets of images: FID with Inception features, "rFD" for a tokenizer's reconstructions.

    d^2 = |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)

where mu and C are mean and covariance of the features of either set (Dowson and Landau 1982; Heusel et al. 2017).
Numbers are comparable only for the same extractor, the same number of images and the same treatment of the images: JPEG
against PNG alone moved a published FID from 11.18 to 13.74. The extractors are in `diptych.eval.features`.

Shape suffixes: B batch, D width of the features.
"""

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from diptych.errors import UserError


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches; two of them can be merged. 64-bit throughout.

    Chan, Golub and LeVeque's update: it keeps the mean and the sum of squared deviations, so nothing is cancelled away
    as in E[x^2] - E[x]^2. Memory: one D x D matrix of doubles, whatever the number of images.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean_D = torch.zeros(width, dtype=torch.float64)
        self.scatter_DD = torch.zeros(width, width, dtype=torch.float64)

    @property
    def width(self) -> int:
        return self.mean_D.shape[0]

    def add(self, features_BD: Float[Tensor, "B D"]) -> Self:
        """Adds a batch of features from any device. Raises `UserError` when they are not finite or of another width."""
        features_BD = features_BD.detach().to("cpu", torch.float64)
        if not features_BD.isfinite().all():
            raise UserError("The features contain NaN or infinity: check the images and the feature extractor.")
        batch = FeatureStatistics(features_BD.shape[1])
        if batch.width != self.width:
            raise UserError(f"Features of width {batch.width} added to width {self.width}: use one extractor.")
        if len(features_BD):
            batch.count = len(features_BD)
            batch.mean_D = features_BD.mean(0)
            centred_BD = features_BD - batch.mean_D
            batch.scatter_DD = centred_BD.T @ centred_BD
        return self.merge(batch)

    def merge(self, other: "FeatureStatistics") -> Self:
        """Adds what `other` has seen, e.g. on another device or rank."""
        if other.width != self.width:
            raise UserError(f"Statistics of width {other.width} merged into width {self.width}: use one extractor.")
        if other.count:
            total = self.count + other.count
            shift_D = other.mean_D - self.mean_D
            self.mean_D = self.mean_D + shift_D * (other.count / total)
            self.scatter_DD = (
                self.scatter_DD + other.scatter_DD + torch.outer(shift_D, shift_D) * (self.count * other.count / total)
            )
            self.count = total
        return self

    @property
    def covariance_DD(self) -> Float[Tensor, "D D"]:
        """The unbiased covariance (divided by count - 1). Raises `UserError` below two samples."""
        if self.count < 2:
            raise UserError(f"A covariance needs at least 2 images, got {self.count}: give more images.")
        return self.scatter_DD / (self.count - 1)


@dataclass(kw_only=True, slots=True)
class FrechetDistance:
    """The distance and what to know about it. `float()` gives the value."""

    value: float
    """Squared Frechet distance, in the squared unit of the features (as FID is printed)."""
    mean_term: float
    """The part from the means: how far the typical image is off."""
    covariance_term: float
    """The part from the covariances: wrong or missing variety."""
    counts: tuple[int, int]
    """Images in either set."""
    warning: str | None
    """Set when a set has no more images than features: the estimate is then far too high and only rough."""

    def __float__(self) -> float:
        return self.value


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> FrechetDistance:
    """Squared Frechet distance of two Gaussians with the given statistics.

    The trace of the root is the sum of the singular values of C_a^1/2 C_b^1/2. Unlike the root of the product C_a C_b,
    it needs symmetric roots only, is real for singular covariances too, and loses no digits to squaring.

    Raises `UserError` for different widths or fewer than two images in a set.
    """
    if a.width != b.width:
        raise UserError(f"Statistics of widths {a.width} and {b.width} cannot be compared: use one extractor for both.")
    covariance_a, covariance_b = a.covariance_DD, b.covariance_DD
    cross = torch.linalg.svdvals(_root(covariance_a) @ _root(covariance_b)).sum()
    mean_term = (a.mean_D - b.mean_D).square().sum().item()
    covariance_term = (covariance_a.trace() + covariance_b.trace() - 2 * cross).clamp(min=0).item()
    fewest = min(a.count, b.count)
    few = f"only {fewest} images for {a.width} features: the distance is biased upwards"
    return FrechetDistance(
        value=mean_term + covariance_term,
        mean_term=mean_term,
        covariance_term=covariance_term,
        counts=(a.count, b.count),
        warning=few if fewest <= a.width else None,
    )


def _root(matrix_DD: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Root of a symmetric positive semi-definite matrix; eigenvalues below zero are rounding errors."""
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
