import numpy as np
import pytest
import torch

from diptych.data.sources import Source, open_source
from diptych.data.splits import Labelled
from diptych.errors import UserError
from diptych.experiments.robustness import CORRUPTIONS, SEVERITIES, CorruptedSource, accuracies, corrupt, corrupted


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
