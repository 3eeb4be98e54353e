"""Scores of a run that captions and draws, on captioned images it has not seen.

Shapes: B images, S pixels a side.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.data.encode import DataTokenizers
from diptych.data.pixels import channels_first, read_captioned
from diptych.data.scenes.source import ScenesSource
from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.eval.captions import score_captions
from diptych.eval.frechet import (
    FeatureExtractor,
    RandomFeatures,
    feature_statistics,
    frechet_distance,
    open_extractor,
)
from diptych.eval.scenes import caption_accuracy, image_accuracy
from diptych.io import write_bytes
from diptych.itit.masking import Masking
from diptych.itit.model import Encoded
from diptych.itit.objective import i2t_loss, t2i_loss, without_text
from diptych.itit.pipeline import Diptych, data_tokenizers
from diptych.nn.inference import Device, pick_device
from diptych.report import print_metrics
from diptych.report.sheet import Cell, comparison, save_png
from diptych.run_folder import read_config, write_json
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder


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
    items, pixels = read_captioned(source, limit=config.limit, size=diptych.tokenizer.image_size)
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
            length = diptych.model.config.max_text_len
            known = information_gain(diptych, tokens_BN, diptych.text_encoder.tokenize(first, length=length)[0])
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


def _frechet(real: np.ndarray, drawn: np.ndarray, extractor: Any) -> tuple[dict[str, float], str | None]:
    statistics = [feature_statistics(extractor, channels_first(pixels)) for pixels in (real, drawn)]
    if len(real) < 2:
        return {}, "The Frechet distance needs two images or more."
    found = frechet_distance(*statistics)
    return {f"frechet/{extractor.name}": found.value}, found.warning


def _flat(side: str, score: Any) -> dict[str, float]:
    attributes = {f"{side}_{name.replace(' ', '_')}": value for name, value in score.attributes.items()}
    return {f"{side}_accuracy": score.exact, f"{side}_readable": score.readable} | attributes


# JOINED eval.grounding
#| How much captions and pictures of a run hang together: before cycles can teach anything, this must be above zero.
#|
#| T2I2T learns from pictures drawn for loose texts. A network whose pictures do not depend on the text can then only learn
#| to write whatever the picture shows; the same holds the other way round.
#|
#| Shapes: B rows, N image tokens, L text tokens.


_ROWS = 64


@dataclass(frozen=True, slots=True)
class InformationGain:
    """Nats a token that the right partner saves against another row's: 0 where nothing was learned. As a wrong partner
    misleads a sure network, it may exceed the mutual information of the two."""

    caption: float
    """Of a caption's tokens, from seeing its picture (I2T)."""
    picture: float
    """Of a picture's tokens, from reading its caption with the whole picture hidden (T2I)."""


@torch.no_grad()
def information_gain(diptych: Diptych, tokens_BN: Tensor, ids_BL: Tensor) -> InformationGain:
    """Over pairs of image tokens and text ids, each against the next row's."""
    caption = picture = 0.0
    others_BL = ids_BL.roll(1, 0)
    for start in range(0, len(ids_BL), _ROWS):
        rows = slice(start, start + _ROWS)
        tokens, right, wrong = (part[rows].to(diptych.device) for part in (tokens_BN, ids_BL, others_BL))
        share = len(tokens) / len(ids_BL)
        read = _shown(diptych, tokens)
        caption += share * (_caption_loss(diptych, read, wrong) - _caption_loss(diptych, read, right)).item()
        picture += share * (_picture_loss(diptych, tokens, wrong) - _picture_loss(diptych, tokens, right)).item()
    return InformationGain(caption, picture)


def _shown(diptych: Diptych, tokens_BN: Tensor) -> Encoded:
    """The encoder's pass over whole pictures."""
    every_BN = torch.arange(tokens_BN.shape[1], device=tokens_BN.device).expand_as(tokens_BN)
    return without_text(diptych.model, tokens_BN, Masking(torch.zeros_like(tokens_BN, dtype=torch.bool), every_BN))


def _caption_loss(diptych: Diptych, read: Encoded, ids_BL: Tensor) -> Tensor:
    valid_BL = ids_BL != diptych.text_encoder.pad_id
    return i2t_loss(diptych.model, read, ids_BL, valid_BL, label_smoothing=0.0, encoder_grad_scale=1.0)


def _picture_loss(diptych: Diptych, tokens_BN: Tensor, ids_BL: Tensor) -> Tensor:
    """With every token hidden, and none of them in the encoder."""
    valid_BL = ids_BL != diptych.text_encoder.pad_id
    hidden = Masking(torch.ones_like(tokens_BN, dtype=torch.bool), tokens_BN[:, :0])
    features_BLF = diptych.text_encoder.features(ids_BL, valid_BL)
    return t2i_loss(diptych.model, tokens_BN, features_BLF, valid_BL, hidden, label_smoothing=0.0)


# JOINED recipes.runs
#| Commands on finished runs.


_SHOWN = 8


def run_coders(run: Path, *, features: bool) -> DataTokenizers:
    """The coders of a run, finished or not."""
    for part in ("tokenizer", "text_encoder"):
        if not (run / part).is_dir():
            raise UserError(f"{run}: has no {part}/: give a run of an itit recipe")
    device = pick_device("auto")
    tokenizer = ImageTokenizer.from_pretrained(run / "tokenizer").to(device)
    text_encoder = TextEncoder.from_pretrained(run / "text_encoder").to(device)
    length = read_config(run)["run"]["model"]["max_text_len"]
    return data_tokenizers(tokenizer, text_encoder, length=length, features=features)


def evaluate_run(
    run: Path, source: Source, config: EvaluateConfig, *, features: str | None, out: Path, device: Device
) -> None:
    """Score a run; print a table, write ``metrics.json``, ``captions.jsonl`` and ``sheet.png`` into ``out``."""
    diptych = Diptych.from_pretrained(run, device=device)
    found = evaluate(diptych, source, config, extractor=open_extractor(features))
    print_metrics(found.metrics, title=f"{run} on {source.name}", notes=found.notes)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", {**found.metrics, "source": source.name, "notes": found.notes})
    if found.captions:
        lines = (
            json.dumps({"key": key, "caption": text, "references": references}, ensure_ascii=False)
            for key, text, references in zip(found.keys, found.captions, found.references, strict=True)
        )
        write_bytes(out / "captions.jsonl", ("\n".join(lines) + "\n").encode())
    save_png(out / "sheet.png", sheet(found))
    print(f"written to {out}")


def sheet(found: Evaluation, *, shown: int = _SHOWN, title: str = ""):
    """Real images with a reference, what was written about them, and what was drawn for that reference."""
    rows = {
        "image": [Cell(image=p, caption=t[0]) for p, t in zip(found.real_BSS3, found.references, strict=True)][:shown]
    }
    if found.captions:
        rows["caption"] = [Cell(caption=text) for text in found.captions[:shown]]
    if found.drawn_BSS3 is not None:
        rows["drawn"] = [Cell(image=picture) for picture in found.drawn_BSS3[:shown]]
    return comparison(rows, title=title)
