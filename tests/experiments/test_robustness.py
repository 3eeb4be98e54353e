import numpy as np
import pytest
import torch

from diptych.data.splits import Labelled
from diptych.experiments.robustness import accuracies, corrupted


class Flat:
    """Grey pictures whose brightness is their class: 0 is black, 1 grey, 2 white."""

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
