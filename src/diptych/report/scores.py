"""What the numbers of an evaluation mean: which way is better, and how they are written."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Meaning:
    """How a score is read."""

    better: Literal["higher", "lower", ""] = ""
    """Which values are better; empty where neither is."""
    unit: Literal["%", "dB", "nats", ""] = ""
    """Unit; a share from 0 to 1 is written in %."""
    scale: str = ""
    """What else a reader needs, such as the value of chance."""

    def written(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        number = f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"
        return f"{number} {self.unit}".rstrip()


_MEANINGS: tuple[tuple[str, Meaning], ...] = (
    (r"cider", Meaning("higher", scale="CIDEr-D x 100")),
    (r"rouge_l|bleu_\d", Meaning("higher", "%")),
    (r"(i2t2i/)?distinct_captions", Meaning("higher", "%", "different ones among all")),
    (r"distinct_\d", Meaning("higher", "%", "different n-grams among all")),
    (r"most_common_share", Meaning("lower", "%", "100 %: one caption for all")),
    (r"vocabulary", Meaning(scale="different words")),
    (r"mean_length", Meaning(scale="words")),
    (r"\w+_information_gain", Meaning("higher", "nats", "0: nothing learned")),
    (r"(text|image)_drift.*", Meaning(scale="above 0: mistakes that agree")),
    (r"frechet/.*", Meaning("lower", scale="0: the same distribution")),
    (r"(retrieval/)?(\w+/r\d+|mean_r1)", Meaning("higher", "%")),
    (r"(retrieval/)?\w+/median_rank", Meaning("lower", scale="1: the right one is first")),
    (r"modality/distance", Meaning("lower", scale="0: one cloud, 2: opposite")),
    (r"modality/accuracy", Meaning("lower", "%", "50 %: images and texts mixed")),
    (r"linear_probe/l2", Meaning()),
    (r"psnr", Meaning("higher", "dB")),
    (r"used", Meaning("higher", "%", "codes that occur")),
    (r"perplexity", Meaning("higher", scale="codes in effective use")),
    (r"rfd", Meaning("lower", scale="0: the same distribution")),
    (r".*(accuracy|_readable|top\d+)", Meaning("higher", "%")),
    (r"loss", Meaning("lower", "nats")),
    (r"(caption|image)_[a-z]+(_\d+)?", Meaning("higher", "%")),
)


HEADLINES = (
    "cider",
    "distinct_captions",
    "caption_accuracy",
    "image_accuracy",
    "mean_r1",
    "image_to_text/r10",
    "text_to_image/r10",
    "retrieval/mean_r1",
    "retrieval/image_to_text/r10",
    "retrieval/text_to_image/r10",
    "accuracy",
    "loss",
)
"""Scores that are printed in the terminal, where a run has them."""


def meaning_of(name: str) -> Meaning:
    """The meaning of a score by its name in ``metrics.json`` or, after ``valid/`` or ``measure/``, in
    ``metrics.jsonl``."""
    name = name.removeprefix("valid/").removeprefix("measure/")
    return next((meaning for pattern, meaning in _MEANINGS if re.fullmatch(pattern, name)), Meaning())


def better(name: str, value: float, other: float) -> bool:
    """Whether ``value`` is better than ``other`` as the score ``name``; never, where neither direction is better."""
    direction = meaning_of(name).better
    return value > other if direction == "higher" else direction == "lower" and value < other
