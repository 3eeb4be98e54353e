"""Scores of a run that captions and draws, on captioned images it has not seen.

Shapes: B images, S pixels a side.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diptych.data.images import UnreadableImage
from diptych.data.pixels import channels_first
from diptych.data.scenes.source import ENDLESS, ScenesSource
from diptych.data.skips import Skips
from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.eval.captions import score_captions
from diptych.eval.features import FeatureExtractor, RandomFeatures, feature_statistics
from diptych.eval.frechet import frechet_distance
from diptych.eval.grounding import grounding
from diptych.eval.scenes import caption_accuracy, image_accuracy
from diptych.pipeline import Diptych


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    limit: int | None = None
    """Images to score, the first of the source; None: all (of `scenes:` without a count, 1000). Scores of different
    subsets are not comparable."""
    beams: int | None = None
    """Beams for the captions; None: the run's own."""
    seed: int = 0
    """Of the drawn pictures."""
    captions: bool = True
    """Score captions."""
    pictures: bool = True
    """Score pictures drawn for each image's first caption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores and what they were computed from, row by row."""

    metrics: dict[str, float]
    notes: list[str]
    """What to know when reading them."""
    keys: list[str]
    references: list[list[str]]
    real_BSS3: np.ndarray
    captions: list[str] = field(default_factory=list)
    drawn_BSS3: np.ndarray | None = None


def evaluate(
    diptych: Diptych, source: Source, config: EvaluateConfig, *, extractor: FeatureExtractor | None = None
) -> Evaluation:
    """CIDEr-D, BLEU, ROUGE-L and variety of captions; Frechet distance of drawn to real pictures; what captions and
    pictures tell of each other.

    On ``scenes:`` also the exact accuracies. Real pictures are cut to their centre square and resized to the
    tokenizer's size, without any compression. Raises UserError for a source without images or captions.
    """
    items, pixels = read_captioned(source, limit=config.limit, size=diptych.tokenizer.size)
    references = [source.captions(item) for item in items]
    first = [texts[0] for texts in references]
    metrics: dict[str, float] = {"images": len(items)}
    notes: list[str] = []
    written: list[str] = []
    drawn = None
    scenes = source.scenes(items) if isinstance(source, ScenesSource) else None
    if config.captions:
        tokens_BN = diptych.tokenize(pixels)
        written = [caption.text for caption in diptych.caption_tokens(tokens_BN, beams=config.beams)]
        scores = score_captions(written, references)
        metrics |= scores.table()
        notes += scores.warnings
        if scenes is not None:
            metrics |= _flat("caption", caption_accuracy(written, scenes))
        if config.pictures:
            length = diptych.model.config.text_tokens
            known = grounding(diptych, tokens_BN, diptych.text_encoder.tokenize(first, length=length)[0])
            metrics |= {"caption_grounding": known.caption, "image_grounding": known.picture}
    if config.pictures:
        drawn = diptych.imagine(first, seed=config.seed)
        measured, note = _frechet(pixels, drawn, extractor or RandomFeatures())
        metrics |= measured
        notes += [note] if note else []
        if scenes is not None:
            metrics |= _flat("image", image_accuracy(drawn, scenes))
    keys = [source.key(item) for item in items]
    return Evaluation(
        metrics=metrics, notes=notes, keys=keys, references=references, real_BSS3=pixels, captions=written,
        drawn_BSS3=drawn,
    )  # fmt: skip


def read_captioned(source: Source, *, limit: int | None, size: int) -> tuple[list[int], np.ndarray]:
    """The first ``limit`` readable items that have a caption, and their pixels [B S S 3].

    Raises UserError for a source without images or captions, and when too many images are unreadable.
    """
    if not (source.has_images and source.has_captions):
        raise UserError(f"{source.name}: scores need images and captions, and it does not have both")
    return read_images(source, limit=limit, size=size, wanted=lambda item: bool(source.captions(item)))


def read_images(
    source: Source, *, limit: int | None, size: int, wanted: Callable[[int], bool] = lambda item: True
) -> tuple[list[int], np.ndarray]:
    """The first ``limit`` readable items that are ``wanted``, and their pixels [B S S 3]. Raises as above."""
    if not source.has_images:
        raise UserError(f"{source.name}: has no images")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} images: at least one is needed")
    if isinstance(source, ScenesSource):
        items = list(range(min(len(source), limit or (1000 if len(source) == ENDLESS else len(source)))))
        return items, source.images(items, size)
    skips, items, pixels = Skips(), [], []
    for item in range(len(source)):
        if limit is not None and len(items) == limit:
            break
        if not wanted(item):
            continue
        try:
            pixels.append(source.image(item, size))
            items.append(item)
        except UnreadableImage as error:
            skips.record(source.key(item), error)
            skips.check(len(source))
    if not items:
        raise UserError(f"{source.name}: no image to score")
    return items, np.stack(pixels)


def _frechet(real: np.ndarray, drawn: np.ndarray, extractor: Any) -> tuple[dict[str, float], str | None]:
    statistics = [feature_statistics(extractor, channels_first(pixels)) for pixels in (real, drawn)]
    if len(real) < 2:
        return {}, "The Frechet distance needs two images or more."
    found = frechet_distance(*statistics)
    return {f"frechet/{extractor.name}": found.value}, found.warning


def _flat(side: str, score: Any) -> dict[str, float]:
    attributes = {f"{side}_{name.replace(' ', '_')}": value for name, value in score.attributes.items()}
    return {f"{side}_accuracy": score.exact, f"{side}_readable": score.readable} | attributes
