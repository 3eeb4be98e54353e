import math

import numpy as np
import pytest
import torch

from diptych.errors import UserError
from diptych.experiments import representation
from diptych.experiments.representation import class_margin, fieller, fit_exchange, margins, silhouette

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


@pytest.fixture
def cloud() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.tensor([0, 0, 0, 2, 2, 3, 0, 2, 3, 3, 3, 4])  # no item of class 1, one of class 4
    centres_CD = torch.randn(5, 4, generator=generator)
    return centres_CD[labels_N] + 0.7 * torch.randn(12, 4, generator=generator), labels_N


def naive_silhouette(features, labels) -> float:
    values = []
    for i, (x, own) in enumerate(zip(features, labels, strict=True)):
        distances = {}
        for j, (y, other) in enumerate(zip(features, labels, strict=True)):
            if i != j:
                distances.setdefault(int(other), []).append(float((x - y).norm()))
        means = {c: sum(d) / len(d) for c, d in distances.items()}
        if int(own) not in means:
            values.append(0.0)
            continue
        a, b = means[int(own)], min(mean for c, mean in means.items() if c != int(own))
        values.append((b - a) / max(a, b))
    return sum(values) / len(values)


def naive_margin(features, labels) -> float:
    def cosine(x, rows) -> float:
        mean = torch.stack([row / row.norm() for row in rows]).mean(0)
        return float(x @ mean / x.norm() / mean.norm())

    values = []
    for i, own in enumerate(labels.tolist()):
        mates = [features[j] for j in range(len(labels)) if j != i and labels[j] == own]
        if mates:
            others = [cosine(features[i], features[labels == c]) for c in set(labels.tolist()) - {own}]
            values.append(cosine(features[i], mates) - max(others))
    return sum(values) / len(values)


@pytest.mark.parametrize("rows", [1024, 5])
def test_silhouette_equals_a_naive_loop(cloud, rows, monkeypatch):
    monkeypatch.setattr(representation, "_ROWS", rows)
    assert silhouette(*cloud) == pytest.approx(naive_silhouette(*cloud), abs=1e-6)


def test_silhouette_by_hand():
    """On a line: 0 and 1 against 4. For 0: a = 1, b = 4; for 1: a = 1, b = 3; 4 is alone."""
    found = silhouette(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1]))
    assert found == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)


def test_the_class_margin_equals_a_naive_loop(cloud):
    assert class_margin(*cloud) == pytest.approx(naive_margin(*cloud), abs=1e-6)


def test_margins_by_hand():
    scores_NC = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 7.0]])
    assert margins(scores_NC, torch.tensor([0, 1])).tolist() == [1.0, -2.0]


def test_both_grow_as_classes_move_apart(cloud):
    features_ND, labels_N = cloud
    apart_ND = features_ND + 5 * torch.nn.functional.one_hot(labels_N)[:, :4]
    assert silhouette(apart_ND, labels_N) > silhouette(features_ND, labels_N) + 0.1
    assert class_margin(apart_ND, labels_N) > class_margin(features_ND, labels_N) + 0.1
