"""A finished classifier: the classes it gives images, and its scores on labelled images. It needs no texts.

Training computes its scores by the same functions.

Shapes: B images of a batch, N images of a source, C classes, D and F width of features, S side of an image in pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diptych.data.check import note_on_learned, open_data_of
from diptych.data.pixels import (
    ImageLike,
    ReadableImages,
    SkippedItems,
    channels_first,
    check_batch,
    one_or_more,
    to_pixels,
)
from diptych.data.sources import Source
from diptych.data.splits import Labelled, Subset
from diptych.encoders import ImageEncoder, open_image_encoder
from diptych.errors import UserError
from diptych.eval.baselines import HISTOGRAMS, ClassBaselines, Comparison, image_histograms
from diptych.hub import OnHub, local_folder
from diptych.io import load_network
from diptych.nn.inference import Device, Prediction, eval_mode, pick_device, top_predictions
from diptych.report.terminal import print_comparison, print_metrics
from diptych.run_folder import CLASS_BASELINES, check_finished, write_json
from diptych.uml.data import IMAGE
from diptych.uml.objective import SharedHead

_ROWS = 128
"""Number of images that are classified at once."""
SAME_FEATURES = "the same features"
_ADVICE = "another --objective.aux-weight (0 leaves the texts out), --optim.lr or --head.features"


class ScoredLabelledImages:
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
    """Scores of a classifier on labelled images."""

    accuracy: float
    """Share of the images that get their class."""
    mean_class_accuracy: float
    """The same share in each class, as a mean over the classes that occur."""
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
    """Scores of ``head`` on features of the modality ``modality``, which are classified some at a time."""
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


def histograms_of(labelled: Labelled, items: np.ndarray) -> tuple[Tensor, Tensor]:
    """Colour and gradient histograms of the readable ones of ``items`` [N F], and their labels [N]."""
    found, vectors_NF = image_histograms(Subset(labelled.source, items))
    return torch.from_numpy(vectors_NF), torch.from_numpy(labelled.labels_N[found])


def compare_classifier(
    baselines: ClassBaselines, features: Mapping[str, tuple[Tensor, Tensor]], *, source: str, notes: list[str]
) -> Comparison:
    """The baselines of a classifier, scored on ``features`` of the images that it will be scored on."""
    scored = baselines.scored(features, lambda logits_NC, labels_N: score_logits(logits_NC, labels_N).table())
    return Comparison(source=source, select="accuracy", baselines=scored, advice=_ADVICE, notes=notes)


class Classifier(OnHub):
    """The image encoder and the head of a run, on one device and in evaluation mode."""

    def __init__(self, encoder: ImageEncoder, head: SharedHead, classes: Sequence[str], *, device: str) -> None:
        self.encoder, self.head, self.classes = encoder.to(device).eval(), head.to(device).eval(), tuple(classes)
        self.image_size, self.device = encoder.image_size, device

    @classmethod
    def from_pretrained(cls, run: str | Path, *, device: Device = "auto") -> "Classifier":
        """The classifier of a run folder, or of a repository of the hub such as ``user/name``.

        Raises UserError for a run of another kind or one that is not finished, and if a file is missing.
        """
        run = local_folder(run)
        check_finished(run, "classifier")
        try:
            classes = json.loads((run / "classes.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{run}: no finished classifier ({error}): train it to its end") from error
        head = load_network(SharedHead, run / "head")
        loaded = cls(open_image_encoder(run / "encoder"), head, classes, device=pick_device(device))
        loaded.run_folder = run
        return loaded

    def probabilities(self, pixels_B3SS: Tensor) -> Tensor:
        """Probability of each class [B C] for pixels from 0 to 255."""
        with eval_mode(self.encoder), eval_mode(self.head):
            return self.head(self.encoder(pixels_B3SS.to(self.device)), IMAGE).softmax(1)

    def predictions(
        self, images: UInt8[Tensor, "B 3 S S"] | ImageLike | Sequence[ImageLike], *, top: int = 1
    ) -> list[list[Prediction]]:
        """The ``top`` most probable classes of each image, best first; a list of one for a single image.

        Raises as :func:`check_batch` and :func:`to_pixels`.
        """
        if isinstance(images, Tensor):
            check_batch(images, self.image_size)
            return top_predictions(self.probabilities(images), self.classes, top=top)
        every, found = one_or_more(images), []
        for start in range(0, len(every), _ROWS):
            pixels = np.stack([to_pixels(image, self.image_size) for image in every[start : start + _ROWS]])
            found += self.predictions(channels_first(pixels), top=top)
        return found


def evaluate_classifier_run(
    run: Path, source: Source, *, out: Path, device: Device = "auto", workers: int = 2, max_skipped_share: float = 0.01
) -> dict[str, Any]:
    """Accuracy of a run on labelled images, as a whole and of each class. Printed, and written to ``out/metrics.json``.

    Raises UserError for a run that is not finished, for labels that it does not know, and if more than
    ``max_skipped_share`` of the images cannot be read.
    """
    classifier = Classifier.from_pretrained(run, device=device)
    labelled = Labelled.of(source, classifier.classes)
    skipped = SkippedItems(max_skipped_share=max_skipped_share)
    every, size = np.arange(len(source)), classifier.encoder.image_size
    images = ScoredLabelledImages(labelled, every, size=size, skipped=skipped, workers=workers, cache_mb=0)
    with eval_mode(classifier.encoder), eval_mode(classifier.head):
        vectors_ND, labels_N = images.features(classifier.encoder, classifier.device)
        found = score_classifier(classifier.head, vectors_ND, labels_N, modality=IMAGE)
    comparison = replace(
        _compare(run, labelled, (vectors_ND, labels_N), device=classifier.device), scores=found.table()
    )
    per_class = {classifier.classes[number]: share for number, share in found.per_class.items()}
    metrics = {
        **found.table(),
        "images": len(labels_N),
        "skipped": len(skipped),
        "source": source.name,
        "notes": comparison.notes,
        **comparison.record(),
        "per_class": per_class,
    }
    write_json(out / "metrics.json", metrics)
    shown = {"images": len(labels_N)} | found.table()
    print_metrics(shown, title=f"{run} on {source.name}", notes=skipped.report(out / "skipped.jsonl"))
    beside = [*comparison.notes, comparison.verdict()]
    print_comparison(*comparison.table(), title="beside its baselines", notes=beside)
    print(f"written to {out}")
    return metrics


def _compare(run: Path, labelled: Labelled, features: tuple[Tensor, Tensor], *, device: str) -> Comparison:
    """The baselines that were fitted with the run, scored on all images of ``labelled`` and their ``features``."""
    notes: list[str] = []
    try:
        learned = open_data_of(run, "images")
        notes = note_on_learned(learned, range(len(learned)), labelled.source)
    except UserError:  # the data is gone, or the run is older
        pass
    if not (run / CLASS_BASELINES).is_file():
        why = "No baselines: the run was trained by an older Diptych, which fitted none."
        return Comparison(source=labelled.source.name, select="accuracy", baselines=[], advice="", notes=[*notes, why])
    baselines = ClassBaselines.load(run / CLASS_BASELINES, device=device)
    known = {HISTOGRAMS: histograms_of(labelled, np.arange(len(labelled.labels_N)))}
    if SAME_FEATURES in baselines.linear:
        known = {SAME_FEATURES: features} | known
    known = {name: (x_NF.to(device), labels_N.to(device)) for name, (x_NF, labels_N) in known.items()}
    return compare_classifier(baselines, known, source=labelled.source.name, notes=notes)
