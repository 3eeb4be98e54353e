"""What a classifier is scored on."""

import numpy as np
import torch
from torch import nn

from diptych.data.pixels import SkippedItems
from diptych.encoders import ImageEncoder
from diptych.uml.classifier import ScoredLabelledImages


class MeanColour(ImageEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels_B3HW):
        return self.scale * pixels_B3HW.float().mean((2, 3))


def test_features_come_with_their_labels_and_without_gradients(labelled_images, monkeypatch):
    monkeypatch.setattr("diptych.uml.classifier._ROWS", 2)  # in two pieces
    for cache_mb in (0, 1):
        skipped = SkippedItems(max_skipped_share=0.5)
        scored = ScoredLabelledImages(
            labelled_images, np.array([2, 3, 0, 1]), size=4, skipped=skipped, workers=1, cache_mb=cache_mb
        )
        for _ in range(2):  # the last image cannot be read, and no other is counted in its place
            vectors, labels = scored.features(MeanColour(), "cpu")
            assert vectors.tolist() == [[255] * 3, [0] * 3, [0] * 3]
            assert labels.tolist() == [1, 0, 0]
            assert not vectors.requires_grad
        assert len(skipped) == 1
