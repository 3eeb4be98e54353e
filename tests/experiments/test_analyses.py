import math

import numpy as np
import pytest
import torch

from diptych.data.sources import Source, open_source
from diptych.data.splits import Labelled
from diptych.errors import UserError
from diptych.experiments import analyses
from diptych.experiments.analyses import (
    CORRUPTIONS,
    SEVERITIES,
    CorruptedSource,
    accuracies,
    class_margin,
    corrupt,
    corrupted,
    fieller,
    fit_exchange,
    margins,
    silhouette,
)

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
    monkeypatch.setattr(analyses, "_ROWS", rows)
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


class Flat:
    """Grey images whose brightness is their class: 0 is black, 1 grey, 2 white."""

    name, has_images, has_captions = "flat", True, False

    def __init__(self, classes: list[int]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return len(self.classes)

    def key(self, i: int) -> str:
        return str(i)

    def captions(self, i: int) -> list[str]:
        return []

    def image(self, i: int, size: int) -> np.ndarray:
        return np.full((size, size, 3), (0, 128, 255)[self.classes[i]], np.uint8)

    def label(self, i: int) -> str:
        return str(self.classes[i])


def by_brightness(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    return ((pixels_B3HW.float().mean((1, 2, 3)) + 64) / 128).floor().long()


@pytest.fixture
def test_set() -> Labelled:
    return Labelled.of(Flat([0, 1, 2, 0]), ("0", "1", "2"))


def test_accuracy_under_each_shift(test_set):
    tests = {"clean": test_set} | corrupted(test_set, corruptions=["brightness"], severities=[1, 3])
    found = accuracies(by_brightness, tests, size=8)
    # + 0.1 moves no class over a border; + 0.3 takes black for grey and grey for white.
    assert found == {"clean": 1.0, "brightness/1": 1.0, "brightness/3": 0.25}


def test_other_sources_and_some_items(test_set):
    other = Labelled.of(Flat([2, 2, 2]), ("0", "1", "2"))
    found = accuracies(lambda x: torch.zeros(len(x)).long(), {"a": test_set, "b": other}, size=4)
    assert found == {"a": 0.5, "b": 0.0}
    few = accuracies(lambda x: torch.zeros(len(x)).long(), {"a": test_set}, size=4, items=np.array([0, 1, 3]))
    assert few == {"a": pytest.approx(2 / 3)}


def test_several_classifiers_at_once(test_set):
    both = accuracies(lambda x: torch.stack([by_brightness(x), torch.zeros(len(x)).long()]), {"a": test_set}, size=4)
    assert both["a"].tolist() == [1.0, 0.5]


def test_all_corruptions_by_default(test_set):
    assert len(corrupted(test_set)) == 30


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Coarse and fine structure in every colour."""
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.uniform(40, 200, (8, 8, 3)), np.ones((8, 8, 1)))
    return np.clip(coarse + rng.uniform(-40, 40, (64, 64, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_get_worse_with_severity(image, name):
    errors = [np.abs(corrupt(image, name, severity, seed=0).astype(float) - image).mean() for severity in SEVERITIES]
    assert errors[0] > 0
    assert sum(errors[3:]) > sum(errors[:2])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_nothing_else_changes(image, name):
    before = image.copy()
    found = corrupt(image, name, 3, seed=0)
    assert (found.dtype, found.shape) == (np.uint8, image.shape)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(corrupt(image, name, 3, seed=0), found)
    assert (corrupt(image, name, 3, seed=1) != found).any() == (name == "gaussian_noise")


def test_by_hand():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 100
    assert np.unique(corrupt(image, "brightness", 1, seed=0)).tolist() == [26, 126]  # + 0.1 x 255
    assert np.unique(corrupt(image, "contrast", 2, seed=0)).tolist() == [35, 65]  # 50 -+ 0.3 x 50
    striped = np.tile(np.array([0, 100], np.uint8)[None, :, None], (8, 4, 3))
    assert np.unique(corrupt(striped, "pixelate", 2, seed=0)).tolist() == [50]  # 8 -> 4 pixels: pairs are averaged
    noise = corrupt(np.full((64, 64, 3), 128, np.uint8), "gaussian_noise", 1, seed=0) / 255
    assert noise.std() == pytest.approx(0.08, rel=0.05)


def test_a_source_is_corrupted_item_by_item(tmp_path):
    source = open_source("scenes:?count=4")
    noisy = CorruptedSource(source=source, corruption="gaussian_noise", severity=2)
    assert isinstance(noisy, Source)
    assert (len(noisy), noisy.captions(1), noisy.key(2)) == (4, source.captions(1), source.key(2))
    np.testing.assert_array_equal(noisy.image(1, 32), noisy.image(1, 32))
    noise = [noisy.image(i, 32).astype(int) - source.image(i, 32) for i in (0, 1)]
    assert (noise[0] != noise[1]).mean() > 0.2


def test_mistakes_are_told(image):
    with pytest.raises(UserError, match="no corruption 'fog': choose gaussian_noise"):
        corrupt(image, "fog", 1, seed=0)
    with pytest.raises(UserError, match="choose 1 to 5"):
        corrupt(image, "jpeg", 6, seed=0)
