"""Scores of an ITIT run on captioned images that it has not seen: captions, generated images, and both together.

Shapes: B images, S pixels a side, N image tokens, L text tokens.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from diptych.data.audit import Fit, fits_of
from diptych.data.batch import ImageTokenExamples
from diptych.data.check import note_on_learned
from diptych.data.engine import LOCAL, Engine, Rows
from diptych.data.pixels import (
    SkippedItems,
    channels_first,
    image_batches,
    paired_items,
    read_block,
    read_captioned,
)
from diptych.data.scenes import Scene, ScenesSource
from diptych.data.sources import Source
from diptych.data.sources.columns import Columns
from diptych.data.splits import Subset
from diptych.data.store import Store
from diptych.data.suggest import AssessedImages
from diptych.encoders import open_image_encoder
from diptych.encoders.image import resize_pixels
from diptych.errors import UserError, first_line
from diptych.eval.baselines import Baseline, Comparison, caption_baselines
from diptych.eval.captions import score_captions
from diptych.eval.frechet import (
    FeatureExtractor,
    RandomFeatures,
    feature_statistics,
    frechet_distance,
    metric_name,
    open_extractor,
)
from diptych.eval.scenes import SceneScore, caption_accuracy, image_accuracy
from diptych.io import write_bytes
from diptych.itit.data import DataConfig, open_data
from diptych.itit.generation import ImageGenerationConfig
from diptych.itit.model import shift_right
from diptych.itit.objective import token_loss
from diptych.itit.pipeline import Diptych
from diptych.nn.inference import Device, InferencePrecision, pick_device
from diptych.report.sheet import Cell, comparison, save_png
from diptych.report.terminal import ProgressLine, print_comparison, print_metrics
from diptych.run_folder import read_config, write_json
from diptych.tokenizers.text_tokenizer import PAD

_ROWS = 64
"""Number of rows whose information gain is computed at once."""
_SHOWN = 8
"""Number of images on the sheet."""
_GAIN_NOTE = (
    "caption_information_gain and image_information_gain are in nats per token: what a caption's tokens gain in "
    "log-probability from their own image rather than another one, and an image's tokens from their own caption."
)
_DRIFT_NOTE = (
    "text_drift and image_drift: share of round trips that end where they began, less the share whose first half is "
    "right. Above 0 the network reads its own mistakes as if they were right, which a cycle's loss cannot tell apart."
)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Which scores are computed, and on how many images."""

    limit: int | None = None
    """Number of images to score, the first of the source. None takes all (of `scenes:` without a count, 1000). Scores
    of different subsets are not comparable."""
    beams: int | None = None
    """Number of beams for the captions. None takes the run's own."""
    seed: int = 0
    """Seed of the generated images."""
    image_generation: ImageGenerationConfig | None = None
    """Settings of the generated images. None takes the run's own."""
    captions: bool = True
    """Score generated captions."""
    images: bool = True
    """Score images generated from each image's first caption."""
    max_skipped_share: float = 0.01
    """Largest share of unreadable images that is left out, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Scores, and row by row what they were computed from."""

    metrics: dict[str, float]
    notes: list[str]
    """What a reader of the metrics must know."""
    items: list[int]
    """Numbers of the images in their source."""
    keys: list[str]
    """Names of the images in their source."""
    references: list[list[str]]
    """True captions of each image."""
    real_BSS3: np.ndarray
    skipped: SkippedItems
    """The images that could not be read."""
    captions: list[str] = field(default_factory=list)
    """Generated captions; empty if they were left out."""
    generated_BSS3: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredImages:
    """The captioned images that a run is scored on, read and encoded once."""

    items: list[int]
    """Numbers of the images in their source."""
    pixels_BSS3: np.ndarray
    encoded: ImageTokenExamples
    skipped: SkippedItems
    """The images that could not be read."""

    @classmethod
    def read(cls, diptych: Diptych, source: Source, config: EvaluateConfig) -> "ScoredImages":
        """Raises UserError for a source without images or captions."""
        skipped = SkippedItems(max_skipped_share=config.max_skipped_share)
        items, pixels = read_captioned(source, limit=config.limit, size=diptych.image_size, skipped=skipped)
        return cls(items=items, pixels_BSS3=pixels, encoded=diptych.encode(pixels), skipped=skipped)


def evaluate(
    diptych: Diptych,
    source: Source,
    config: EvaluateConfig,
    *,
    images: ScoredImages | None = None,
    extractor: FeatureExtractor | None = None,
    progress: Literal["shown", "silent"] = "silent",
) -> Evaluation:
    """Score captions, generated images, and the information gain of both, on the captioned images of ``source``.

    Captions: CIDEr-D, BLEU, ROUGE-L and variety. Images: the Frechet distance of generated to real images, on features
    of ``extractor`` (default: a random network). Both: :func:`information_gain`, in nats per token. On `scenes:` also
    the exact accuracies, and of both the :func:`drift`. Real images are cut to their centre square and, for the Frechet
    distance, resized to the size of the generated ones, without compression. ``progress`` is shown on stderr.
    ``images`` are those of ``source``, if they have been read before. Raises UserError for a source without images or
    captions.
    """
    shown = progress == "shown"
    images = images or ScoredImages.read(diptych, source, config)
    items, pixels = images.items, images.pixels_BSS3
    references = [source.captions(item) for item in items]
    first = [texts[0] for texts in references]
    scenes = source.scenes(items) if isinstance(source, ScenesSource) else None
    metrics: dict[str, float] = {"images": len(items)}
    notes: list[str] = []
    captions: list[str] = []
    generated = None
    score = CaptionScorer(references, scenes)
    if config.captions:
        captions = [
            caption.text
            for caption in diptych.caption_encoded(
                images.encoded, beams=config.beams, advance=ProgressLine("captioning") if shown else None
            )
        ]
        metrics |= score(captions)
        notes += score.warnings
        if config.images:
            length = diptych.model.config.max_text_len
            gain = information_gain(diptych, images.encoded, diptych.text_encoder.tokenize(first, length=length)[0])
            metrics |= {"caption_information_gain": gain.caption, "image_information_gain": gain.image}
            notes.append(_GAIN_NOTE)
    if config.images:
        generated = diptych.imagine_pixels(
            first,
            seed=config.seed,
            config=config.image_generation,
            advance=ProgressLine("generating images") if shown else None,
        )
        distance, note = _frechet(pixels, generated, extractor or RandomFeatures())
        metrics |= distance
        notes += [note] if note else []
        if scenes is not None:
            metrics |= _scene_metrics("image", image_accuracy(generated, scenes))
            if config.captions:
                metrics |= drift(diptych, captions, generated, scenes, seed=config.seed)
                notes.append(_DRIFT_NOTE)
    return Evaluation(
        metrics=metrics,
        notes=notes,
        items=items,
        keys=[source.key(item) for item in items],
        references=references,
        real_BSS3=pixels,
        skipped=images.skipped,
        captions=captions,
        generated_BSS3=generated,
    )


class CaptionScorer:
    """The scores of captions for some images: of those that a run generates, and of its baselines."""

    def __init__(self, references: Sequence[Sequence[str]], scenes: Sequence[Scene] | None = None) -> None:
        """``references``: the true captions of each image; ``scenes``: what is known of each, of `scenes:` alone."""
        self.references, self.scenes = references, scenes
        self.warnings: list[str] = []

    def __call__(self, captions: Sequence[str]) -> dict[str, float]:
        """Scores of one caption for each image. Sets ``warnings``, what a reader of them must know."""
        scores = score_captions(captions, self.references)
        self.warnings = scores.warnings
        exact = _scene_metrics("caption", caption_accuracy(captions, self.scenes)) if self.scenes is not None else {}
        return scores.table() | exact


def _frechet(
    real_BSS3: np.ndarray, generated_BSS3: np.ndarray, extractor: FeatureExtractor
) -> tuple[dict[str, float], str | None]:
    """The Frechet distance under its metric's name, and a note for the reader if there is one."""
    real_B3SS, generated_B3SS = channels_first(real_BSS3), channels_first(generated_BSS3)
    real_B3SS = resize_pixels(real_B3SS, generated_B3SS.shape[-1])
    statistics = [feature_statistics(extractor, pixels_B3SS) for pixels_B3SS in (real_B3SS, generated_B3SS)]
    if len(real_BSS3) < 2:
        return {}, "The Frechet distance needs two images or more."
    found = frechet_distance(*statistics)
    return {metric_name(extractor): found.value}, found.warning


def _scene_metrics(side: str, score: SceneScore) -> dict[str, float]:
    attributes = {f"{side}_{name.replace(' ', '_')}": value for name, value in score.attributes.items()}
    return {f"{side}_accuracy": score.exact, f"{side}_readable": score.readable} | attributes


# Drift


def drift(
    diptych: Diptych,
    captions: Sequence[str],
    generated_BSS3: UInt8[np.ndarray, "B S S 3"],
    scenes: Sequence[Scene],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """How much better round trips score than their first halves. Above 0, both directions agree on something untrue.

    ``text_drift`` is the share of texts that are right again after text -> image -> text, less the share of images that
    are right; ``image_drift`` the share of images that are right after image -> text -> image, less the share of texts.
    Any consistent exchange of meanings satisfies both cycles, so their losses fall for it too; drift rises only then.
    Also for shape, colour and place alone, as the mean over the things of a scene.

    Args:
        captions: The captions of the images of ``scenes``.
        generated_BSS3: The images generated from their true captions.
    """
    told = [caption.text for caption in diptych.caption_encoded(diptych.encode(generated_BSS3), beams=1)]
    text_trip, image = caption_accuracy(told, scenes), image_accuracy(generated_BSS3, scenes)
    image_trip, caption = (
        image_accuracy(diptych.imagine_pixels(captions, seed=seed), scenes),
        caption_accuracy(captions, scenes),
    )
    return _excess("text_drift", text_trip, image) | _excess("image_drift", image_trip, caption)


def _excess(name: str, trip: SceneScore, half: SceneScore) -> dict[str, float]:
    """The difference of two scores, of all attributes together and of each kind."""
    kinds: dict[str, list[float]] = {}
    for attribute, share in trip.attributes.items():
        kinds.setdefault(attribute.split()[0], []).append(share - half.attributes[attribute])
    return {name: trip.exact - half.exact} | {f"{name}_{kind}": float(np.mean(each)) for kind, each in kinds.items()}


# Information gain


@dataclass(frozen=True, slots=True)
class InformationGain:
    """Mean gain in log-probability from the right partner rather than another row's, in nats per token.

    It is 0 where nothing was learned. A wrong partner misleads a confident network, so it may exceed the mutual
    information of captions and images.
    """

    caption: float
    """Gain of a caption's tokens from its image (I2T)."""
    image: float
    """Gain of an image's tokens from its caption, with the whole image hidden (T2I)."""


@torch.no_grad()
def information_gain(diptych: Diptych, images: ImageTokenExamples, ids_BL: Int[Tensor, "B L"]) -> InformationGain:
    """How much captions and images say about each other, on pairs of encoded images and text ids.

    Each row is compared with the next one's caption. Cycles cannot teach anything before the gain is above zero: T2I2T
    learns from images generated for unpaired texts, and if these do not depend on the text, it can only learn to
    describe whatever such an image shows. The same holds for I2T2I.
    """
    caption = image = 0.0
    others_BL = ids_BL.roll(1, 0)
    for start in range(0, len(ids_BL), _ROWS):
        rows = slice(start, start + _ROWS)
        right, wrong = (part[rows].to(diptych.device) for part in (ids_BL, others_BL))
        some = images[rows].to(diptych.device)
        share, tokens_BN = len(some) / len(ids_BL), some.tokens_BN
        prefix_BPD = diptych.model.caption_prefix(tokens_BN, some.image_features_BG)
        caption += (
            share * (_caption_loss(diptych, prefix_BPD, wrong) - _caption_loss(diptych, prefix_BPD, right)).item()
        )
        image += share * (diptych.image_nats(tokens_BN, wrong) - diptych.image_nats(tokens_BN, right)).mean().item()
    return InformationGain(caption, image)


def _caption_loss(diptych: Diptych, prefix_BPD: Tensor, ids_BL: Tensor) -> Tensor:
    """Nats per token of captions, given what is read from whole images."""
    logits_BLV = diptych.model.text_logits(prefix_BPD, shift_right(ids_BL))
    return token_loss(logits_BLV, ids_BL, ids_BL != PAD, label_smoothing=0.0)


def pair_fits(
    diptych: Diptych,
    source: Source,
    *,
    skipped: SkippedItems,
    others: int = 4,
    engine: Engine = LOCAL,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Fit]:
    """How much more probable each caption is given its own image than given ``others`` other images, in nats a token.

    Captions of the source's readable images; raises UserError for a source without images or captions. The ``reopen``
    of another engine than the local gives the run and the source.
    """
    tools = diptych, source
    networks = [each for each in (diptych.tokenizer, diptych.image_encoder, diptych.model) if each is not None]
    about: dict[str, Any] = {"source": source, "network": torch.nn.ModuleList(networks), "rows": _ROWS}
    images = engine.gather("tokens", _encode_images, tools, paired_items(source), skipped=skipped, **about)
    items = images.pop("items")
    counts = np.array([len(source.captions(int(item))) for item in items], np.int64)
    row_P = np.repeat(np.arange(len(items)), counts)
    number_P = np.concatenate([np.arange(count) for count in counts])
    # Offsets of an image's own captions would compare it with itself; the images of distant rows are others.
    offsets = [0, *(1 + len(items) * k // (others + 1) for k in range(min(others, len(items) - 1)))]

    def payload(pairs: np.ndarray) -> _PairsAndImages:
        rows = [(row_P[pairs] + offset) % len(items) for offset in offsets]
        texts = [source.captions(int(items[row_P[pair]]))[number_P[pair]] for pair in pairs]
        return texts, [{name: array[some] for name, array in images.items()} for some in rows]

    pairs, none = np.arange(len(row_P)), SkippedItems()
    found = engine.gather("nats", _nats, tools, pairs, skipped=none, payload=payload, advance=advance, **about)
    nats_PK = found["nats"]
    return fits_of(items, counts, nats_PK[:, 1:].mean(1) - nats_PK[:, 0])


_PairsAndImages = tuple[list[str], list[dict[str, np.ndarray]]]
"""Captions, and as many images for each of them: the fields of `ImageTokenExamples`, first those of its own image."""


def _encode_images(tools: tuple[Diptych, Source], items: np.ndarray) -> Rows:
    diptych, source = tools
    pixels, items, skipped = read_block(source, items, size=diptych.image_size)
    if not len(items):
        return Rows(skipped=skipped)
    found = diptych.encode(pixels)
    arrays = {"items": items, "tokens_BN": found.tokens_BN.cpu().numpy()}
    if found.image_features_BG is not None:
        arrays["image_features_BG"] = found.image_features_BG.cpu().numpy()
    return Rows(arrays=arrays, skipped=skipped)


@torch.no_grad()
def _nats(tools: tuple[Diptych, Source], pairs: _PairsAndImages) -> Rows:
    """Nats a token of each caption, given each of its images."""
    diptych, _ = tools
    texts, images = pairs
    ids_BL = diptych.text_encoder.tokenize(texts, length=diptych.model.config.max_text_len)[0].to(diptych.device)
    valid_BL = ids_BL != PAD
    nats = []
    for fields in images:
        some = ImageTokenExamples(**{name: torch.from_numpy(array) for name, array in fields.items()})
        some = some.to(diptych.device)
        prefix_BPD = diptych.model.caption_prefix(some.tokens_BN, some.image_features_BG)
        logits_BLV = diptych.model.text_logits(prefix_BPD, shift_right(ids_BL))
        nats_BL = F.cross_entropy(logits_BLV.float().transpose(1, 2), ids_BL, reduction="none")
        nats.append(((nats_BL * valid_BL).sum(1) / valid_BL.sum(1)).cpu().numpy())
    return Rows(arrays={"nats": np.stack(nats, 1)})


@torch.no_grad()
def assess_images(
    diptych: Diptych,
    images: Subset[Source],
    *,
    drafts: bool = True,
    skipped: SkippedItems,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> AssessedImages:
    """The vectors of the readable ones of ``images`` (:meth:`Diptych.vectors`); and, with ``drafts``, their captions,
    and how uncertain the network is of them: minus their length-normalized log-probability.
    """
    beams = max(2, diptych.text_generation.beams)  # one beam has no score
    items, features, texts, nats = [], [], [], []
    for pixels_B3SS, some in image_batches(
        images.source, images.items, size=diptych.image_size, skipped=skipped, rows=_ROWS
    ):
        encoded = diptych.encode(pixels_B3SS.permute(0, 2, 3, 1).numpy())
        features.append(diptych.vectors(encoded).cpu().numpy())
        items.append(some)
        if drafts:
            found = diptych.caption_encoded(encoded, beams=beams)
            texts += [caption.text for caption in found]
            nats += [-caption.score for caption in found if caption.score is not None]
        advance(sum(map(len, items)), len(images.items))
    return AssessedImages(
        items_N=np.concatenate(items),
        features_NF=np.concatenate(features),
        uncertainty_N=np.array(nats) if drafts else None,
        drafts=texts if drafts else None,
    )


# Baselines

PAIRS_ONLY = "pairs_only"
"""Folder, in the run folder, of the same network trained on the pairs alone: `--compare pairs-only`."""
ALONE = "pairs alone for the same time"
"""Name of that network in the tables."""
_ADVICE = "more pairs, more --minutes, or parts that are trained already (--tokenizer, --text-encoder)"
_ADVICE_UNPAIRED = "a later --objective.cycle-start-step, --objective.texts off or --objective.images off"


def compare(
    data: DataConfig,
    source: Source,
    items: Sequence[int],
    *,
    encoder: str | None = None,
    select: str = "cider",
    device: Device = "auto",
) -> Comparison:
    """Baselines of captions for the images ``items``, from the pairs of a run, ahead of the run's own scores.

    Raises UserError where ``encoder``, of images and by name, cannot be opened. Where the pairs are gone, there are no
    baselines, and a note says so.
    """
    baselines, notes = [], []
    opened = open_image_encoder(encoder).to(pick_device(device)) if encoder is not None else None
    scenes = source.scenes(items) if isinstance(source, ScenesSource) else None
    score = CaptionScorer([source.captions(item) for item in items], scenes)
    try:
        pairs = open_data(data).pairs
        if isinstance(pairs.source, Store):
            raise UserError(f"{data.pairs}: encoded data has no images to compare with")
        notes += note_on_learned(pairs.source, pairs.items, source)
        test = Subset(source, np.asarray(items))
        baselines = caption_baselines(pairs, test, score=score, encoder=opened, encoder_name=encoder or "")
    except UserError as error:
        notes.append(f"No baselines from the pairs: {error}")
    return Comparison(
        source=source.name,
        select=select,
        baselines=baselines,
        advice=_ADVICE,
        advice_unpaired=_ADVICE_UNPAIRED,
        notes=notes,
    )


# The command


def evaluate_run(
    run: Path,
    source: Source,
    config: EvaluateConfig,
    *,
    features: str | None,
    out: Path,
    device: Device,
    precision: InferencePrecision = "auto",
    visible: float | None = None,
    encoder: str | None = None,
) -> None:
    """Score a run; print a table, and write ``metrics.json``, ``captions.jsonl`` and ``sheet.png`` into ``out``.

    Beside it are its baselines, with the features of ``encoder`` too, by default the run's own ``baseline_encoder``;
    and the same network on the pairs alone, if it was trained.
    """
    diptych = Diptych.from_pretrained(run, device=device, precision=precision, visible=visible)
    _ = diptych.text_encoder  # what is wrong with it is told before the work
    extractor = open_extractor(features)
    found = evaluate(diptych, source, config, extractor=extractor, progress="shown")
    comparison = _compare_run(run, source, found, encoder=encoder, device=device)
    if (run / PAIRS_ONLY / "model").is_dir():
        alone = Diptych.from_pretrained(run / PAIRS_ONLY, device=device, precision=precision, visible=visible)
        scores = evaluate(alone, source, config, extractor=extractor, progress="shown").metrics
        comparison.baselines.append(Baseline(name=ALONE, scores=scores, kind="without unpaired data"))
    out.mkdir(parents=True, exist_ok=True)
    notes = found.notes + found.skipped.report(out / "skipped.jsonl")
    print_metrics(found.metrics, title=f"{run} on {source.name}", notes=notes)
    title, notes_beside = "beside its baselines", [*comparison.notes, comparison.verdict()]
    print_comparison(*comparison.table(), title=title, notes=notes_beside)
    told = {
        "skipped": len(found.skipped),
        "source": source.name,
        "precision": precision,
        **diptych.reading,
        "notes": notes + comparison.notes,
    }
    write_json(out / "metrics.json", {**found.metrics, **told, **comparison.record()})
    if found.captions:
        write_captions(out / "captions.jsonl", found.keys, found.captions, found.references)
    save_png(out / "sheet.png", sheet(found))
    print(f"written to {out}")


def write_captions(
    file: Path, keys: Sequence[str], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> None:
    """Write a line {"key", "caption", "references"} for each image. The file appears whole."""
    lines = (
        json.dumps({"key": key, "caption": text, "references": true}, ensure_ascii=False)
        for key, text, true in zip(keys, captions, references, strict=True)
    )
    write_bytes(file, ("\n".join(lines) + "\n").encode())


def _compare_run(run: Path, source: Source, found: Evaluation, *, encoder: str | None, device: Device) -> Comparison:
    """The scores of a run beside the baselines from its pairs."""
    try:
        fields = read_config(run)["run"]
        data = DataConfig(**{**fields["data"], "columns": Columns(**fields["data"]["columns"])})
    except (UserError, KeyError, TypeError) as error:
        why = f"No baselines: the run does not tell its pairs ({first_line(error)})."
        return Comparison(source=source.name, select="cider", baselines=[], advice=_ADVICE, notes=[why])
    encoder, select = (
        encoder or fields.get("baseline_encoder") or fields.get("image_encoder"),
        fields.get("select", "cider"),
    )
    comparison = compare(data, source, found.items, encoder=encoder, select=select, device=device)
    return replace(comparison, scores=found.metrics)


def sheet(found: Evaluation, *, shown: int = _SHOWN, title: str = "") -> Image.Image:
    """Real images with their first caption, the captions generated for them, and the images generated from it."""
    rows = {
        "image": [Cell(image=p, caption=t[0]) for p, t in zip(found.real_BSS3, found.references, strict=True)][:shown]
    }
    if found.captions:
        rows["caption"] = [Cell(caption=text) for text in found.captions[:shown]]
    if found.generated_BSS3 is not None:
        rows["generated"] = [Cell(image=pixels) for pixels in found.generated_BSS3[:shown]]
    return comparison(rows, title=title)
