"""What supervised UML learns from: images of classes, as cached features or as pixels, and features of class texts.

Shapes: N images, T texts, D width of the features, B rows of a batch, C classes, H and W pixels,
S pixels of a side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.data.batch import LabelledImageExamples, LabelledVectorExamples
from diptych.data.class_texts import Shots, choose_texts
from diptych.data.pixels import CachedImages, ReadableImages, SkippedItems, channels_first
from diptych.data.splits import Labelled, Subset
from diptych.data.streams import Stream
from diptych.encoders import ImageEncoder, PooledTextEncoder
from diptych.eval.baselines import ClassBaselines, Comparison, image_histograms
from diptych.uml.features import image_features, text_features
from diptych.uml.objective import SharedHead

_ROWS = 128
"""Images encoded at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledFeatures:
    """Feature vectors of any modality, with the class of each."""

    vectors_ND: np.ndarray
    labels_N: np.ndarray

    def stream(self) -> Stream:
        """All rows. Only those of a batch are read from disk."""

        def take(index: np.ndarray, epoch: np.ndarray) -> LabelledVectorExamples:
            vectors_BD = np.asarray(self.vectors_ND[index], np.float32)
            return LabelledVectorExamples(
                vectors_BD=torch.from_numpy(vectors_BD), labels_B=torch.from_numpy(self.labels_N[index])
            )

        return Stream(size=len(self.labels_N), take=take)

    def tensors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """All vectors [N D], float32, and their labels [N]."""
        vectors_ND = torch.from_numpy(np.array(self.vectors_ND, np.float32))
        return vectors_ND.to(device), torch.from_numpy(self.labels_N).to(device)


class LabelledImages:
    """Images of classes as pixels, for an encoder that is trained. Images are resized to ``size`` pixels a side."""

    def __init__(
        self, labelled: Labelled, items: np.ndarray, *, size: int, skipped: SkippedItems, cache_mb: int
    ) -> None:
        self.labels_N = labelled.labels_N[items]
        self._images = CachedImages([Subset(labelled.source, items)], size=size, skipped=skipped, cache_mb=cache_mb)

    def stream(self) -> Stream:
        """All images."""
        return Stream(size=len(self.labels_N), take=self._take)

    def _take(self, index: np.ndarray, epoch: np.ndarray) -> LabelledImageExamples:
        pixels, index = self._images.take(index)  # an image that replaces an unreadable one brings its own class
        return LabelledImageExamples(
            pixels_B3HW=channels_first(pixels), labels_B=torch.from_numpy(self.labels_N[index])
        )


class ScoredImages:
    """The readable images of classes that a classifier is scored on, in training and afterwards alike."""

    def __init__(
        self, labelled: Labelled, items: np.ndarray, *, size: int, skipped: SkippedItems, workers: int, cache_mb: int
    ) -> None:
        self.labels_N = labelled.labels_N
        """Class of each item of the source."""
        self.images = ReadableImages(
            labelled.source, items, size=size, skipped=skipped, rows=_ROWS, workers=workers, cache_mb=cache_mb
        )

    @torch.no_grad()
    def features(self, encoder: ImageEncoder, device: str | torch.device) -> tuple[Tensor, Tensor]:
        """Features of all images [N D] by ``encoder``, and their labels [N]."""
        vectors, labels = [], []
        for pixels_B3SS, items in self.images:
            vectors.append(encoder(pixels_B3SS.to(device)).float())
            labels.append(torch.from_numpy(self.labels_N[items]))
        return torch.cat(vectors), torch.cat(labels).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierScore:
    """How a classifier does on images."""

    accuracy: float
    """Share of the images that get their class."""
    mean_class_accuracy: float
    """Mean over the classes that occur of the same share."""
    loss: float
    """Cross-entropy in nats."""
    per_class: dict[int, float]
    """Accuracy of each class that occurs."""

    def table(self) -> dict[str, float]:
        """The numbers under the names that go into `metrics.json`."""
        return {"accuracy": self.accuracy, "mean_class_accuracy": self.mean_class_accuracy, "loss": self.loss}


@torch.no_grad()
def score_classifier(
    head: SharedHead, vectors_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, "N"], *, modality: str
) -> ClassifierScore:
    """Classify features of the modality ``modality``, some at a time."""
    return score_logits(torch.cat([head(piece, modality) for piece in vectors_ND.split(_ROWS)]), labels_N)


def score_logits(logits_NC: Float[Tensor, "N C"], labels_N: Int[Tensor, "N"]) -> ClassifierScore:
    """The scores of a classifier that gives ``logits_NC``: of a run, and of its baselines."""
    right_N = logits_NC.argmax(1) == labels_N
    per_class = {int(c): float(right_N[labels_N == c].float().mean()) for c in labels_N.unique()}
    return ClassifierScore(
        accuracy=float(right_N.float().mean()),
        mean_class_accuracy=float(np.mean(list(per_class.values()))),
        loss=float(F.cross_entropy(logits_NC, labels_N)),
        per_class=per_class,
    )


SAME_FEATURES = "the same features"
_ADVICE = "another --objective.aux-weight (0 leaves the texts out), --optim.lr or --head.features"


def histograms_of(labelled: Labelled, items: np.ndarray) -> tuple[Tensor, Tensor]:
    """Colour and gradient histograms of the readable ones of ``items`` [N F], and their labels [N]."""
    found, vectors_NF = image_histograms(Subset(labelled.source, items))
    return torch.from_numpy(vectors_NF), torch.from_numpy(labelled.labels_N[found])


def compare_classifier(
    baselines: ClassBaselines, features: Mapping[str, tuple[Tensor, Tensor]], *, source: str, notes: list[str]
) -> Comparison:
    """The baselines on ``features`` of the images that a classifier is scored on, ahead of its own scores."""
    scored = baselines.scored(features, lambda logits_NC, labels_N: score_logits(logits_NC, labels_N).table())
    return Comparison(source=source, select="accuracy", baselines=scored, advice=_ADVICE, notes=notes)


def labelled_image_features(
    encoder: ImageEncoder, labelled: Labelled, items: np.ndarray, *, cache: Path, skipped: SkippedItems, workers: int
) -> LabelledFeatures:
    """Cached features of those of ``items`` that can be read. The others are recorded in ``skipped``."""
    store = image_features(encoder, labelled.source, items, cache=cache, skipped=skipped, workers=workers)
    found = store.array("items")
    assert found is not None
    return LabelledFeatures(vectors_ND=store.vectors, labels_N=labelled.labels_N[found])


def class_text_features(
    encoder: PooledTextEncoder, texts: Sequence[Sequence[str]], *, shots: Shots, cache: Path, seed: int
) -> LabelledFeatures:
    """Cached features of the texts of each class, of which :func:`choose_shots` takes ``shots``."""
    labels_T = np.repeat(np.arange(len(texts)), [len(of_class) for of_class in texts])
    vectors_TD = text_features(encoder, [text for of_class in texts for text in of_class], cache=cache).vectors
    return choose_shots(LabelledFeatures(vectors_ND=vectors_TD, labels_N=labels_T), shots=shots, seed=seed)


def choose_shots(features: LabelledFeatures, *, shots: Shots, seed: int) -> LabelledFeatures:
    """All features, or so many random ones of each class, or the mean of each class as its only one."""
    if shots == "all":
        return features
    if shots == "mean":
        classes = np.unique(features.labels_N)
        means = [features.vectors_ND[features.labels_N == label].mean(0) for label in classes]
        return LabelledFeatures(vectors_ND=np.stack(means), labels_N=classes)
    chosen = choose_texts(features.labels_N, shots, seed=seed)
    return LabelledFeatures(vectors_ND=features.vectors_ND[chosen], labels_N=features.labels_N[chosen])
