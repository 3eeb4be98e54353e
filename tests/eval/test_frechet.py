"""Frechet distance: against scipy and closed forms, streaming, and what the user is told."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diptych.errors import UserError
from diptych.eval.frechet import FeatureStatistics, frechet_distance


def draw(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + seed


def of(features: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(features.shape[1]).add(features)


def test_statistics_equal_numpy():
    features = draw(50, 7, 1)
    statistics = of(features)
    np.testing.assert_allclose(statistics.mean_D, features.numpy().mean(0), atol=1e-12)
    np.testing.assert_allclose(statistics.covariance_DD, np.cov(features.numpy().T), atol=1e-12)


def test_streaming_and_merging_change_nothing():
    features = draw(101, 5, 2)
    whole = of(features)
    batched = FeatureStatistics(5)
    for batch in features.split(13):
        batched.add(batch)
    merged = of(features[:3]).merge(FeatureStatistics(5)).merge(of(features[3:]))
    for other in (batched, merged):
        assert other.count == whole.count == 101
        torch.testing.assert_close(other.mean_D, whole.mean_D)
        torch.testing.assert_close(other.covariance_DD, whole.covariance_DD)


def test_a_far_away_mean_costs_no_digits():
    """E[x^2] - E[x]^2 would lose everything here."""
    features = draw(60, 3, 3)
    near, far = of(features), of(features + 1e7)
    torch.testing.assert_close(far.covariance_DD, near.covariance_DD, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [1, 4, 40])
def test_equals_scipy(width):
    a, b = draw(300, width, 4), draw(200, width, 5)
    covariance_a, covariance_b = (np.cov(x.numpy().T).reshape(width, width) for x in (a, b))
    root = sqrtm(covariance_a @ covariance_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(covariance_a + covariance_b - 2 * root)
    distance = frechet_distance(of(a), of(b))
    assert float(distance) == pytest.approx(expected, rel=1e-9)
    assert distance.mean_term + distance.covariance_term == distance.value
    assert float(frechet_distance(of(b), of(a))) == pytest.approx(expected, rel=1e-9)


def test_closed_form_of_diagonal_gaussians():
    """Covariances that commute: sum of squared differences of the deviations."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    a, b = corners * torch.tensor([1.0, 2.0]), corners * torch.tensor([4.0, 3.0]) + torch.tensor([0.0, 5.0])
    unit = math.sqrt(4 / 3)  # the unbiased deviation of (1, 1, -1, -1)
    distance = frechet_distance(of(a), of(b))
    assert distance.mean_term == pytest.approx(25)
    assert distance.covariance_term == pytest.approx((3 * unit) ** 2 + (1 * unit) ** 2)


def test_identical_sets_with_singular_covariance_are_at_zero():
    """Fewer images than features. The usual route through sqrtm of the product is off by 1e-6 or complex here."""
    features = draw(10, 50, 6)
    distance = frechet_distance(of(features), of(features.flip(0)))
    assert float(distance) == pytest.approx(0, abs=1e-9)
    assert "only 10 images for 50 features" in distance.warning


def test_enough_images_need_no_warning():
    assert frechet_distance(of(draw(9, 8, 7)), of(draw(9, 8, 8))).warning is None


def test_misuse_is_explained():
    good, one = of(draw(9, 3, 9)), of(draw(1, 3, 9))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        frechet_distance(good, one)
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        frechet_distance(good, FeatureStatistics(3))
    with pytest.raises(UserError, match="widths 3 and 4"):
        frechet_distance(good, of(draw(9, 4, 9)))
    with pytest.raises(UserError, match="width 4"):
        good.merge(FeatureStatistics(4))
    with pytest.raises(UserError, match="width 4"):
        good.add(torch.zeros(2, 4))
    with pytest.raises(UserError, match="NaN"):
        good.add(torch.full((2, 3), torch.nan))
