import math

import numpy as np
import pytest

from diptych.errors import UserError
from diptych.experiments.representation import fieller, fit_exchange

SHOTS = np.array([1.0, 2, 4, 8, 16])
IMAGES, TEXTS = (grid.ravel() for grid in np.meshgrid(SHOTS, SHOTS, indexing="ij"))


def test_a_plane_is_found_exactly():
    found = fit_exchange(IMAGES, TEXTS, 0.2 + 0.03 * IMAGES + 0.0005 * TEXTS)
    assert (found.intercept, found.image_slope, found.text_slope) == pytest.approx((0.2, 0.03, 0.0005))
    assert (found.ratio, found.low, found.high) == pytest.approx((60, 60, 60))
    assert found.explained == pytest.approx(1)
    assert "60 texts per image" in str(found)


def test_on_a_logarithmic_scale():
    found = fit_exchange(IMAGES, TEXTS, 0.2 + 0.08 * np.log2(IMAGES) + 0.02 * np.log2(TEXTS), scale="log2")
    assert found.ratio == pytest.approx(4)
    assert "4 doublings" in str(found)
    with pytest.raises(UserError, match="no logarithm"):
        fit_exchange(IMAGES, TEXTS - 1, IMAGES, scale="log2")


def test_errors_are_those_of_least_squares():
    """Against the spread over many noisy grids."""
    rng = np.random.default_rng(0)
    truth = 0.2 + 0.03 * IMAGES + 0.01 * TEXTS
    found = [fit_exchange(IMAGES, TEXTS, truth + 0.02 * rng.standard_normal(25)) for _ in range(400)]
    assert np.std([f.image_slope for f in found]) == pytest.approx(np.mean([f.image_error for f in found]), rel=0.1)
    assert np.std([f.text_slope for f in found]) == pytest.approx(np.mean([f.text_error for f in found]), rel=0.1)
    # The interval holds the true ratio 95 times in 100, a little less as the noise is estimated from 22 numbers.
    assert 0.90 < np.mean([f.low <= 3 <= f.high for f in found]) < 0.98


def test_texts_that_do_not_help_give_no_price():
    rng = np.random.default_rng(0)
    found = fit_exchange(IMAGES, TEXTS, 0.2 + 0.03 * IMAGES + 0.02 * rng.standard_normal(25))
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert "no price" in str(found)


def test_fieller_by_hand():
    """Independent, unit variances, z = 1: (6 - 2 r)^2 <= 1 + r^2."""
    low, high = fieller(6.0, 2.0, np.eye(2), z=1.0)
    for end in (low, high):
        assert (6 - 2 * end) ** 2 == pytest.approx(1 + end**2)
    assert low < 3 < high
    assert fieller(6.0, 0.5, np.eye(2), z=1.0) == (-math.inf, math.inf)


def test_grids_that_fix_no_plane_are_told():
    for images, texts in ((IMAGES, IMAGES), (IMAGES, np.ones(25)), (IMAGES[:3], TEXTS[:3])):
        with pytest.raises(UserError, match="fix no plane"):
            fit_exchange(images, texts, images)
