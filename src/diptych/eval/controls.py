"""Supervised UML beside its controls, and whether a gain is more than noise.

The published tables compare with a baseline of fewer parameters, and an independent reproduction found no gain over
lambda = 0. So no result of ours stands without all of these, which have the same parameters. Where lambda is chosen,
more settings are tried; unrelated texts get as many tries as related ones.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diptych.objectives.uml import Init


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    texts: Literal["none", "own", "permuted"]
    """none is lambda = 0; permuted takes texts about one class for texts about another."""
    init: Init


CONTROLS: dict[str, Control] = {
    "image only": Control(texts="none", init="random"),
    "init only": Control(texts="none", init="anchor"),
    "unrelated text": Control(texts="permuted", init="random"),
    "unrelated init": Control(texts="permuted", init="anchor"),
    "UML": Control(texts="own", init="random"),
    "UML init": Control(texts="own", init="anchor"),
}
COMPARISONS = (
    ("UML", "image only"),
    ("UML init", "image only"),
    ("UML", "unrelated text"),
    ("UML init", "unrelated init"),
    ("UML init", "init only"),
    ("unrelated text", "image only"),
    ("unrelated init", "image only"),
)
"""The gain of the first over the second is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The classifier that validation chose for one control, number of shots and seed."""

    control: str
    shots: int
    seed: int
    accuracy: float
    """On the test images."""
    valid_accuracy: float
    chosen: dict[str, Any]
    """Hyper-parameters and step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """A mean difference of accuracies, paired over seeds and shots, and the standard error of that mean."""

    better: str
    worse: str
    mean: float
    error: float
    pairs: int

    @property
    def is_real(self) -> bool:
        """Beyond two standard errors, to either side."""
        return abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        points, error = f"{100 * self.mean:+.2f}", f"{100 * self.error:.2f}"
        direction = "a gain" if self.mean > 0 else "a loss"
        verdict = f"{direction} beyond the noise" if self.is_real else "within the noise"
        return f"{self.better} against {self.worse}: {points} ± {error} points over {self.pairs} pairs, {verdict}"


def gain(outcomes: Sequence[Outcome], better: str, worse: str, *, shots: int | None = None) -> Gain:
    """Of one control over another, for one number of shots or over all."""
    chosen = [each for each in outcomes if shots is None or each.shots == shots]
    ours = {(each.shots, each.seed): each.accuracy for each in chosen if each.control == better}
    theirs = {(each.shots, each.seed): each.accuracy for each in chosen if each.control == worse}
    differences = [ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys())]
    assert len(differences) > 1, "one pair has no standard error"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Gain(better=better, worse=worse, mean=statistics.mean(differences), error=error, pairs=len(differences))


def spread(outcomes: Sequence[Outcome], control: str, shots: int) -> tuple[float, float]:
    """Mean and standard deviation of the accuracy over the seeds."""
    found = [each.accuracy for each in outcomes if (each.control, each.shots) == (control, shots)]
    return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else math.nan


def table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """A row for each control: mean and standard deviation in per cent for each number of shots, then the mean."""
    every = sorted({each.shots for each in outcomes})
    rows = [["", *(f"{shots} shot{'s' * (shots > 1)}" for shots in every), "mean"]]
    for control in CONTROLS:
        cells = [spread(outcomes, control, shots) for shots in every]
        mean = statistics.mean(mean for mean, _ in cells)
        rows.append([control, *(f"{100 * m:.2f} ± {100 * sd:.2f}" for m, sd in cells), f"{100 * mean:.2f}"])
    return rows
