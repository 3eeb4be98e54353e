"""What supervised UML learns from: images as cached features or as pixels, and texts about the classes.

Shapes: N images, T texts, D width of the features, B rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.data.batch import LabelledImageExamples, LabelledVectorExamples
from diptych.data.class_texts import Shots, choose_texts
from diptych.data.pixels import CachedImages, SkippedItems, channels_first
from diptych.data.splits import Labelled, Subset
from diptych.data.streams import Stream
from diptych.encoders import ImageEncoder, PooledTextEncoder
from diptych.uml.features import image_features, text_features

_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFeatures:
    """Feature vectors with classes, of any modality."""

    vectors_ND: np.ndarray
    labels_N: np.ndarray

    def stream(self) -> Stream:
        """Only the rows of a batch are read from disk."""

        def take(index: np.ndarray, epoch: np.ndarray) -> LabelledVectorExamples:
            vectors_BD = np.asarray(self.vectors_ND[index], np.float32)
            return LabelledVectorExamples(
                vectors_BD=torch.from_numpy(vectors_BD), labels_B=torch.from_numpy(self.labels_N[index])
            )

        return Stream(size=len(self.labels_N), take=take)

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """All vectors, and their labels."""
        vectors_ND = torch.from_numpy(np.array(self.vectors_ND, np.float32))
        return vectors_ND.to(device), torch.from_numpy(self.labels_N).to(device)


def text_side(
    encoder: PooledTextEncoder, texts: Sequence[Sequence[str]], *, shots: Shots, cache: Path, seed: int
) -> LabelledFeatures:
    """LabelledFeatures of the texts of each class: all of them, so many random ones, or their mean."""
    labels_T = np.repeat(np.arange(len(texts)), [len(of_class) for of_class in texts])
    vectors_TD = text_features(encoder, [text for of_class in texts for text in of_class], cache=cache).vectors
    return choose_side(LabelledFeatures(vectors_ND=vectors_TD, labels_N=labels_T), shots=shots, seed=seed)


def choose_side(every: LabelledFeatures, *, shots: Shots, seed: int) -> LabelledFeatures:
    """All, so many random ones of each class, or the mean of each."""
    if shots == "all":
        return every
    if shots == "mean":
        classes = np.unique(every.labels_N)
        means = [every.vectors_ND[every.labels_N == label].mean(0) for label in classes]
        return LabelledFeatures(vectors_ND=np.stack(means), labels_N=classes)
    chosen = choose_texts(every.labels_N, shots, seed=seed)
    return LabelledFeatures(vectors_ND=every.vectors_ND[chosen], labels_N=every.labels_N[chosen])


def frozen_side(
    encoder: ImageEncoder, labelled: Labelled, items: np.ndarray, *, cache: Path, skipped: SkippedItems, workers: int
) -> LabelledFeatures:
    """Cached features of the readable ones of ``items``."""
    store = image_features(encoder, labelled.source, items, cache=cache, skipped=skipped, workers=workers)
    found = store.array("items")
    assert found is not None
    return LabelledFeatures(vectors_ND=store.vectors, labels_N=labelled.labels_N[found])


class PixelSide:
    """Pictures with classes, for an encoder that learns."""

    def __init__(
        self, labelled: Labelled, items: np.ndarray, *, size: int, skipped: SkippedItems, cache_mb: int
    ) -> None:
        self.labels_N = labelled.labels_N[items]
        self.images = CachedImages([Subset(labelled.source, items)], size=size, skipped=skipped, cache_mb=cache_mb)

    def take(self, index: np.ndarray, epoch: np.ndarray) -> LabelledImageExamples:
        pixels, index = self.images.take(index)  # an image that stands in brings its own class
        return LabelledImageExamples(
            pixels_B3HW=channels_first(pixels), labels_B=torch.from_numpy(self.labels_N[index])
        )

    def stream(self) -> Stream:
        return Stream(size=len(self.labels_N), take=self.take)

    @torch.no_grad()
    def features(self, encoder: Any, device: str | torch.device) -> tuple[Tensor, Tensor]:
        """What ``encoder`` makes of all of them, and their labels."""
        vectors, labels = [], []
        for rows in np.array_split(np.arange(len(self.labels_N)), -(-len(self.labels_N) // _ROWS)):
            items = self.take(rows, np.zeros_like(rows)).to(device)
            vectors.append(encoder(items.pixels_B3HW))
            labels.append(items.labels_B)
        return torch.cat(vectors), torch.cat(labels)
