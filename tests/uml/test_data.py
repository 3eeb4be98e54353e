import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diptych.data.pixels import SkippedItems
from diptych.data.sources import open_source
from diptych.data.splits import Labelled
from diptych.encoders import ImageEncoder
from diptych.uml.data import LabelledFeatures, LabelledImages, ScoredImages, choose_shots


@pytest.fixture
def features() -> LabelledFeatures:
    labels = np.array([0, 0, 0, 1, 1, 1])
    return LabelledFeatures(vectors_ND=np.arange(12, dtype=np.float64).reshape(6, 2), labels_N=labels)


def test_a_stream_gives_the_vectors_and_labels_of_the_rows_asked_for(features):
    stream = features.stream()
    examples = stream.take(np.array([4, 1]), np.zeros(2, int))
    assert stream.size == 6
    assert examples.vectors_BD.tolist() == [[8, 9], [2, 3]]
    assert examples.vectors_BD.dtype == torch.float32
    assert examples.labels_B.tolist() == [1, 0]


def test_shots_are_all_features_or_random_ones_or_the_mean_of_each_class(features):
    assert choose_shots(features, shots="all", seed=0) is features
    mean = choose_shots(features, shots="mean", seed=0)
    assert (mean.vectors_ND.tolist(), mean.labels_N.tolist()) == ([[2, 3], [8, 9]], [0, 1])
    two = choose_shots(features, shots=2, seed=0)
    assert two.labels_N.tolist() == [0, 0, 1, 1]
    assert len(np.unique(two.vectors_ND, axis=0)) == 4
    assert np.isin(two.vectors_ND, features.vectors_ND).all()


class MeanColour(ImageEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels_B3HW):
        return self.scale * pixels_B3HW.float().mean((2, 3))


@pytest.fixture
def images(tmp_path) -> Labelled:
    """Two black images and two white ones, one of which cannot be read."""
    for name, grey in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4), (grey,) * 3).save(tmp_path / name / f"{number}.png")
    (tmp_path / "white" / "1.png").write_bytes(b"nothing")
    return Labelled.of(open_source(str(tmp_path)))


def test_an_image_that_replaces_an_unreadable_one_brings_its_own_class(images):
    skipped = SkippedItems(max_skipped_share=0.5)
    examples = LabelledImages(images, np.arange(4), size=4, skipped=skipped, cache_mb=0)
    batch = examples.stream().take(np.arange(4), np.zeros(4, int))
    assert batch.labels_B.tolist() == [0, 0, 1, 0]  # the last is the first image again
    assert batch.pixels_B3HW.float().mean((1, 2, 3)).tolist() == [0, 0, 255, 0]
    assert len(skipped) == 1


def test_features_of_all_images_come_with_their_labels_and_without_gradients(images, monkeypatch):
    monkeypatch.setattr("diptych.uml.data._ROWS", 2)  # in two pieces
    for cache_mb in (0, 1):
        skipped = SkippedItems(max_skipped_share=0.5)
        scored = ScoredImages(images, np.array([2, 3, 0, 1]), size=4, skipped=skipped, workers=1, cache_mb=cache_mb)
        for _ in range(2):  # the last image cannot be read, and no other is counted in its place
            vectors, labels = scored.features(MeanColour(), "cpu")
            assert vectors.tolist() == [[255] * 3, [0] * 3, [0] * 3]
            assert labels.tolist() == [1, 0, 0]
            assert not vectors.requires_grad
        assert len(skipped) == 1
