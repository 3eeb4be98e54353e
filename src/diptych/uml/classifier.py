"""Using a finished classifier run: classifying images, and its accuracy on labelled images. It needs no texts.

Shapes: B images, C classes, S side of an image in pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from diptych.data.pixels import ImageLike, SkippedItems, channels_first, one_or_more, to_pixels
from diptych.data.sources import Source
from diptych.data.splits import Labelled
from diptych.encoders import ImageEncoder, open_image_encoder
from diptych.errors import UserError
from diptych.eval.baselines import HISTOGRAMS, ClassBaselines, Comparison
from diptych.hub import OnHub, local_folder
from diptych.io import load_network
from diptych.nn.inference import Device, Prediction, eval_mode, pick_device, top_predictions
from diptych.report.terminal import print_comparison, print_metrics
from diptych.run_folder import CLASS_BASELINES, check_finished, write_json
from diptych.uml.data import SAME_FEATURES, ScoredImages, compare_classifier, histograms_of, score_classifier
from diptych.uml.objective import SharedHead
from diptych.uml.training import IMAGE

_ROWS = 128
"""Images classified at once."""


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

        Raises as :func:`to_pixels`.
        """
        if isinstance(images, Tensor):
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
    images = ScoredImages(labelled, every, size=size, skipped=skipped, workers=workers, cache_mb=0)
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
    """The baselines that the run was trained beside, on all images of ``labelled`` and their ``features``."""
    if not (run / CLASS_BASELINES).is_file():
        why = "No baselines: the run was trained by an older Diptych, which fitted none."
        return Comparison(source=labelled.source.name, select="accuracy", baselines=[], advice="", notes=[why])
    baselines = ClassBaselines.load(run / CLASS_BASELINES, device=device)
    known = {HISTOGRAMS: histograms_of(labelled, np.arange(len(labelled.labels_N)))}
    if SAME_FEATURES in baselines.linear:
        known = {SAME_FEATURES: features} | known
    known = {name: (x_NF.to(device), labels_N.to(device)) for name, (x_NF, labels_N) in known.items()}
    return compare_classifier(baselines, known, source=labelled.source.name, notes=[])
