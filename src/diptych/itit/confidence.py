"""How good a caption is expected to be: the score of its beam search, calibrated on held-out captioned images.

A score orders the captions of a run by how certain the run is of them. It does not say how often such captions are
good. The confidence does: it is measured on images whose captions the run has not learned from, and is valid for images
like those.

The map from score to quality is fitted to half of the images by isotonic regression, the best fit that never falls,
over groups of neighbouring scores. Its calibration error is measured on the other half.

Shapes: N images, K groups of scores.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from diptych.data.pixels import SkippedItems, captioned_items, image_batches
from diptych.data.scenes import ScenesSource
from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.eval.captions import score_captions
from diptych.eval.scenes import caption_accuracy
from diptych.io import weights_digest, write_bytes
from diptych.itit.pipeline import Diptych
from diptych.report.figures import reliability_figure
from diptych.run_folder import write_json

Measure = Literal["exact", "as good", "overlap"]
MEANINGS: dict[Measure, str] = {
    "exact": "the probability that the caption is right in every attribute",
    "as good": "the probability that the caption's CIDEr-D, against what other people wrote of the image, is at least "
    "that of a caption by one more person",
    "overlap": "the expected ROUGE-L of the caption with what a person wrote",
}
FEWEST = 100
"""Number of captioned images below which nothing is calibrated."""
_MOST = 2000
"""Largest number of images that are captioned for the fit; of more, a random part."""
_GROUP = 15
"""Number of neighbouring scores whose mean quality is one point of the map."""
_BINS = 10
_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Confidence:
    """A map from the score of a caption to its expected quality, from 0 to 1, that never falls."""

    measure: Measure
    source: str
    """The captioned images that it was fitted to."""
    made_by: dict[str, Any]
    """Weights and settings of the captions, as :func:`made_by` gives them. It is valid for no others."""
    scores: Sequence[float]
    """Points of the map, ascending."""
    values: Sequence[float]
    """The quality at each point; between two points the map is linear, outside them it is level."""

    def __call__(self, score: float) -> float:
        return float(np.interp(score, self.scores, self.values))

    @property
    def meaning(self) -> str:
        """The meaning of a confidence, for a line that shows it."""
        return MEANINGS[self.measure]

    @classmethod
    def of(cls, run: Path, made_by: dict[str, Any]) -> "Confidence | None":
        """The confidence in a run folder, if it was fitted to captions of these weights and settings.

        Raises UserError for a damaged file.
        """
        file = run / "confidence" / "confidence.json"
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text())["map"]
            confidence = cls(**found)
            whole = found["measure"] in get_args(Measure) and len(confidence.scores) == len(confidence.values) > 0
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not what --calibrate wrote ({error}); remove it, or calibrate again") from None
        if not whole:
            raise UserError(f"{file}: not what --calibrate wrote; remove it, or calibrate again")
        return confidence if confidence.made_by == made_by else None


def made_by(diptych: Diptych, *, beams: int | None, candidates: int = 1, best_of: int | None = None) -> dict[str, Any]:
    """What decides the scores of captions: the weights, and how the search was done."""
    beams = beams or diptych.text_generation.beams
    if candidates > 1 or best_of:
        beams = max(2, beams, candidates, best_of or 0)
    return {"weights": weights_digest(diptych.model), "beams": beams, "best_of": best_of} | diptych.reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Captions of similar confidence."""

    predicted: float
    """Their mean confidence."""
    found: float
    """Their mean quality."""
    error: float
    """Standard error of ``found``."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A confidence, and how well it is calibrated on the half of the images that it was not fitted to."""

    confidence: Confidence
    bins: list[Bin]
    """By ascending confidence, with equal numbers of captions."""
    error: float
    """Expected calibration error: the mean over captions of the difference of prediction and truth in their bin."""
    raw_error: float
    """That of the score itself, read as the probability of a token (its exponential)."""
    chance: float
    """The calibration error that a perfect map is expected to show on so few captions, by chance alone."""
    fitted: int
    """Number of captions that the map was fitted to."""
    skipped: SkippedItems

    @property
    def captions(self) -> int:
        """Number of captions that it was measured on."""
        return sum(each.count for each in self.bins)

    @property
    def halves(self) -> tuple[float, float]:
        """Mean quality of the half of the captions with the higher confidence, and of the other half."""
        sure, unsure = self.bins[len(self.bins) // 2 :], self.bins[: len(self.bins) // 2]
        first, second = (
            np.average([b.found for b in some], weights=[b.count for b in some]) for some in (sure, unsure)
        )
        return float(first), float(second)

    def summary(self) -> str:
        """The result in a line."""
        sure, unsure = self.halves
        return (
            f"confidence: {self.confidence.meaning}; on {self.captions:,} other captions of {self.confidence.source} "
            f"its calibration error is {self.error:.3f} (by chance alone {self.chance:.3f}, of the score itself "
            f"{self.raw_error:.3f}); the surer half of them is worth {sure:.3f}, the other {unsure:.3f}"
        )

    def save(self, run: Path) -> Path:
        """Write ``confidence/confidence.json`` and the figure ``reliability.svg`` into a run folder."""
        folder = run / "confidence"
        folder.mkdir(exist_ok=True)
        sure, unsure = self.halves
        figure = reliability_figure(
            [(each.predicted, each.found, each.error, each.count) for each in self.bins],
            title=f"{self.captions:,} captions, calibration error {self.error:.3f}",
            label={"exact": "share that is right", "as good": "share as good as a person's", "overlap": "ROUGE-L"}[
                self.confidence.measure
            ],
        )
        write_bytes(folder / "reliability.svg", figure)
        record = {
            "meaning": self.confidence.meaning,
            "captions": self.captions,
            "fitted": self.fitted,
            "expected_calibration_error": self.error,
            "expected_calibration_error_by_chance": self.chance,
            "expected_calibration_error_of_the_score": self.raw_error,
            "quality_of_surer_half": sure,
            "quality_of_other_half": unsure,
            "bins": [asdict(each) for each in self.bins],
            "map": asdict(self.confidence),
        }
        write_json(folder / "confidence.json", record)
        return folder


def calibrate(
    diptych: Diptych,
    source: Source,
    *,
    beams: int | None = None,
    candidates: int = 1,
    best_of: int | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Fit the confidence to captioned images that ``diptych`` has not learned from.

    It is valid for captions that are made with the same settings. Raises UserError for a source with fewer than
    ``FEWEST`` readable images with captions, and for one beam.
    """
    settings = made_by(diptych, beams=beams, candidates=candidates, best_of=best_of)
    if settings["beams"] < 2:
        raise UserError("one beam gives no score, and no confidence: calibrate with --beams 2 or more")
    wanted = np.random.default_rng(0).permutation(captioned_items(source))[:_MOST]
    skipped = SkippedItems(max_skipped_share=1.0)
    items: list[int] = []
    captions: list[str] = []
    scores: list[float] = []
    for pixels_B3SS, some in image_batches(source, wanted, size=diptych.image_size, skipped=skipped, rows=_ROWS):
        encoded = diptych.encode(pixels_B3SS.permute(0, 2, 3, 1).numpy())
        if best_of:
            several = diptych.candidates_encoded(encoded, count=1, best_of=best_of, beams=settings["beams"])
            made = [each[0] for each in several]
        else:
            made = diptych.caption_encoded(encoded, beams=settings["beams"])
        items += some.tolist()
        captions += [each.text for each in made]
        scores += [each.score for each in made if each.score is not None]
        advance(len(items), len(wanted))
    if len(items) < FEWEST:
        raise UserError(f"{source.name}: {len(items)} readable images with captions; a confidence needs {FEWEST}")
    measure, quality_N = qualities(source, items, captions)
    scored_N = ~np.isnan(quality_N)
    score_N, quality_N = np.array(scores)[scored_N], quality_N[scored_N]
    half = len(score_N) // 2  # the items were shuffled
    knots_K, values_K = isotonic(score_N[:half], quality_N[:half])
    confidence = Confidence(
        measure=measure,
        source=source.name,
        made_by=settings,
        scores=knots_K.tolist(),
        values=values_K.tolist(),
    )
    predicted_N = np.array([confidence(score) for score in score_N[half:]])
    bins = reliability(predicted_N, quality_N[half:], order_N=score_N[half:])
    raw = reliability(np.exp(score_N[half:]), quality_N[half:], order_N=score_N[half:])
    return Calibration(
        confidence=confidence,
        bins=bins,
        error=calibration_error(bins),
        raw_error=calibration_error(raw),
        chance=float(np.average([math.sqrt(2 / math.pi) * b.error for b in bins], weights=[b.count for b in bins])),
        fitted=half,
        skipped=skipped,
    )


def qualities(source: Source, items: Sequence[int], captions: Sequence[str]) -> tuple[Measure, Float[np.ndarray, "N"]]:
    """The quality of captions, from 0 to 1, by the strictest measure that the source allows; NaN where there is none.

    Scenes are known: a caption is right or wrong. Where most images have several captions, a caption is compared with
    each of them by CIDEr-D against the others. Else it is compared with the one by ROUGE-L.
    """
    if isinstance(source, ScenesSource):
        right = [
            caption_accuracy([one], [scene]).exact for one, scene in zip(captions, source.scenes(items), strict=True)
        ]
        return "exact", np.array(right)
    references = [source.captions(item) for item in items]
    if 2 * sum(len(texts) > 1 for texts in references) > len(references):
        return "as good", _as_good(captions, references)
    return "overlap", np.array(score_captions(captions, references).rouge_l_per_image)


def _as_good(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "N"]:
    """The share of an image's captions that its new caption is at least as good as; judged by the others."""
    texts: dict[tuple[int, int, str], str] = {}
    others: dict[tuple[int, int, str], list[str]] = {}
    for n, (caption, people) in enumerate(zip(captions, references, strict=True)):
        for k, person in enumerate(people if len(people) > 1 else ()):
            left = [*people[:k], *people[k + 1 :]]
            texts |= {(n, k, "run"): caption, (n, k, "person"): person}
            others |= {(n, k, "run"): left, (n, k, "person"): left}
    found = score_captions(texts, others)
    score = dict(zip(found.keys, found.cider_per_image, strict=True))
    return np.array(
        [
            np.mean([score[n, k, "run"] >= score[n, k, "person"] for k in range(len(people))])
            if len(people) > 1
            else np.nan
            for n, people in enumerate(references)
        ]
    )


def isotonic(
    score_N: Float[np.ndarray, "N"], quality_N: Float[np.ndarray, "N"], *, group: int = _GROUP
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """Scores and qualities of the least-squares fit that never falls, over groups of at least ``group`` neighbours.

    Pool adjacent violators (Ayer et al. 1955): neighbours in the wrong order take their common mean.
    """
    order = np.argsort(score_N, kind="stable")
    groups = np.array_split(order, max(1, len(order) // group))
    blocks: list[tuple[float, list[np.ndarray]]] = []  # mean quality, groups
    for some in groups:
        blocks.append((float(quality_N[some].mean()), [some]))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            pooled = blocks[-2][1] + blocks[-1][1]
            blocks[-2:] = [(float(quality_N[np.concatenate(pooled)].mean()), pooled)]
    knots = [float(score_N[some].mean()) for _, pooled in blocks for some in pooled]
    return np.array(knots), np.array([mean for mean, pooled in blocks for _ in pooled])


def reliability(
    predicted_N: Float[np.ndarray, "N"], quality_N: Float[np.ndarray, "N"], *, order_N: Float[np.ndarray, "N"]
) -> list[Bin]:
    """Mean prediction and mean quality in ten bins of equal counts; captions are ordered by ``order_N``."""
    bins = np.array_split(np.argsort(order_N, kind="stable"), min(_BINS, len(order_N)))
    return [
        Bin(
            predicted=float(predicted_N[some].mean()),
            found=float(quality_N[some].mean()),
            error=float(quality_N[some].std() / math.sqrt(len(some))),
            count=len(some),
        )
        for some in bins
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error, the mean of |predicted - found| over all captions."""
    return float(np.average([abs(each.predicted - each.found) for each in bins], weights=[b.count for b in bins]))
