"""Scores by the protocols of the field, each with a record of exactly what was done.

`coco-karpathy` is for captions: CIDEr-D, BLEU and ROUGE-L against all references, from beam search with 4 beams; the
5,000 test images of Karpathy's split make the number that papers print. `coco-fid30k` is for images: the Frechet
distance of 30,000 images to the real images whose captions they were generated from, drawn from COCO's *training*
captions as in ITIT's paper; most other papers draw from val2014.

The rounds of cycle generation are scored here too, as in Figures 6 and 10 of that paper.

Both protocols read their images in batches, so the number of images is not bounded by memory.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diptych.data.pixels import SkippedItems, captioned_items, channels_first, image_batches
from diptych.data.scenes import ScenesSource
from diptych.data.sources import Source, require_pairs
from diptych.data.sources.open import first_scenes
from diptych.encoders.image import resize_pixels
from diptych.errors import UserError
from diptych.eval.captions import score_captions
from diptych.eval.frechet import (
    FeatureExtractor,
    FeatureStatistics,
    frechet_distance,
    metric_name,
    open_extractor,
)
from diptych.eval.scenes import SceneScore, caption_accuracy, image_accuracy
from diptych.io import write_bytes
from diptych.itit.evaluation import EvaluateConfig, ScoredImages, write_captions
from diptych.itit.generation import ImageGenerationConfig
from diptych.itit.pipeline import Diptych
from diptych.nn.inference import Device, InferencePrecision
from diptych.report.figures import Panel, one_figure
from diptych.report.terminal import ProgressLine, print_metrics
from diptych.rng import derive_seed
from diptych.run_folder import write_json

Protocol = Literal["coco-karpathy", "coco-fid30k"]

KARPATHY_IMAGES, KARPATHY_BEAMS, REFERENCES = 5_000, 4, 5
"""Images of Karpathy's test split of COCO, beams of ITIT's paper, and the fewest references of an image of COCO."""
FID_IMAGES = 30_000
"""Number of captions from which images are generated."""
_ROWS = 64
"""Number of images in memory at once."""
_METEOR = "not printed: its reference implementation is a Java program with tables of paraphrases"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolScores:
    """Scores by a protocol, and what was done to get them."""

    metrics: dict[str, float]
    did: dict[str, Any]
    """What was done, a name and a value for each choice; `departures` lists what differs from the protocol."""
    skipped: SkippedItems
    """The images that could not be read."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the metrics must know."""
    keys: list[str] = field(default_factory=list)
    """Names of the captioned images."""
    captions: list[str] = field(default_factory=list)
    """Generated captions, one for each key."""
    references: list[list[str]] = field(default_factory=list)


def coco_karpathy(
    diptych: Diptych, source: Source, config: EvaluateConfig, *, advance: Any = lambda done, total: None
) -> ProtocolScores:
    """Captions by beam search, against all references of each image.

    Raises UserError for a source without images or captions.
    """
    items = _captioned(source)[: config.limit]
    skipped = SkippedItems(max_skipped_share=config.max_skipped_share)
    beams = config.beams or KARPATHY_BEAMS
    keys, captions, references = [], [], []
    for pixels_B3SS, some in image_batches(source, items, size=diptych.image_size, skipped=skipped, rows=_ROWS):
        encoded = diptych.encode(pixels_B3SS.permute(0, 2, 3, 1).numpy())
        captions += [each.text for each in diptych.caption_encoded(encoded, beams=beams)]
        keys += [source.key(int(item)) for item in some]
        references += [source.captions(int(item)) for item in some]
        advance(len(keys), len(items))
    scores = score_captions(captions, references)
    counts = [len(texts) for texts in references]
    departures = []
    if len(keys) != KARPATHY_IMAGES:
        departures.append(f"{len(keys):,} images: the test split of COCO has {KARPATHY_IMAGES:,}")
    if min(counts) < REFERENCES:
        departures.append(f"{sum(n < REFERENCES for n in counts):,} images have fewer than {REFERENCES} references")
    if beams != KARPATHY_BEAMS:
        departures.append(f"beams {beams}: the paper has {KARPATHY_BEAMS}")
    text = diptych.text_generation
    if text.visible < 1:
        departures.append(f"captions are read from {text.visible:g} of the image tokens: the paper reads all")
    did = {
        "images": f"{len(keys):,} of {source.name}, their centre square at {diptych.image_size} pixels",
        "references": f"{sum(counts):,}, {min(counts)} to {max(counts)} of an image, all of them used",
        "captions": f"beam search, {beams} beams, length power {text.length_power:g}, "
        f"at most {diptych.model.config.max_text_len} tokens"
        + (f", chosen with weight {text.agreement:g} on agreement with the image" if text.agreement else "")
        + (f" and {text.consensus:g} on similarity to captions of the nearest pairs" if text.consensus else ""),
        "scores": "CIDEr-D x 100, BLEU-1 to BLEU-4 and ROUGE-L of pycocoevalcap, on tokens as PTBTokenizer makes them",
        "meteor": _METEOR,
        "departures": departures,
    }
    return ProtocolScores(
        metrics={"images": len(keys)} | scores.table(),
        did=did,
        skipped=skipped,
        notes=scores.warnings,
        keys=keys,
        captions=captions,
        references=references,
    )


def coco_fid30k(
    diptych: Diptych,
    source: Source,
    config: EvaluateConfig,
    *,
    extractor: FeatureExtractor,
    count: int = FID_IMAGES,
    advance: Any = lambda done, total: None,
) -> ProtocolScores:
    """The Frechet distance of images generated from ``count`` captions to the images that these captions are of.

    Images are drawn without replacement, and a caption of each. With fewer in the source all of them are used. Raises
    UserError for a source without images or captions, and for fewer than two images.
    """
    settings = config.image_generation or diptych.image_generation
    captioned = _captioned(source)
    wanted = min(count, config.limit or count, len(captioned))
    if wanted < 2:
        raise UserError(f"{source.name}: a Frechet distance needs two captioned images or more")
    rng = np.random.Generator(np.random.PCG64(derive_seed(config.seed, "coco-fid30k")))
    items = np.sort(rng.choice(captioned, wanted, replace=False))
    chosen = dict(zip(items.tolist(), rng.random(wanted).tolist(), strict=True))
    skipped = SkippedItems(max_skipped_share=config.max_skipped_share)
    if isinstance(extractor, nn.Module):
        extractor.to(diptych.device)
    size, done = diptych.tokenizer.image_size, 0
    real: FeatureStatistics | None = None
    made: FeatureStatistics | None = None
    for pixels_B3SS, some in image_batches(source, items, size=size, skipped=skipped, rows=_ROWS):
        texts = [(found := source.captions(int(item)))[int(chosen[int(item)] * len(found))] for item in some]
        generated = diptych.imagine_pixels(texts, seed=derive_seed(config.seed, int(some[0])), config=settings)
        generated_B3SS = torch.from_numpy(generated).permute(0, 3, 1, 2).contiguous()
        pixels_B3SS = resize_pixels(pixels_B3SS, generated_B3SS.shape[-1])
        real = _added(real, extractor(pixels_B3SS.to(diptych.device)))
        made = _added(made, extractor(generated_B3SS.to(diptych.device)))
        done += len(some)
        advance(done, wanted)
    assert real is not None
    assert made is not None
    distance = frechet_distance(real, made)
    name = metric_name(extractor)
    departures = (
        [] if done == FID_IMAGES else [f"{done:,} images, not {FID_IMAGES:,}: the distance is larger for fewer"]
    )
    if name != "fid":
        departures.append(f"features of {extractor.name}, not of FID's Inception: not comparable with any FID")
    did = {
        "pairs": f"{done:,} images of the {len(captioned):,} captioned ones of {source.name}, drawn without "
        f"replacement with seed {config.seed}, and one caption of each",
        "real images": f"those of these captions, their centre square resized to {size} pixels (antialiased bicubic), "
        "never compressed",
        "generated images": f"{size} pixels, {described(settings)}, seed {config.seed}, never compressed",
        "features": f"{extractor.name}, of width {real.width}" + (", FID's Inception" if name == "fid" else ""),
        "distance": "|mean - mean|^2 + tr(C + C - 2 (C C)^1/2), unbiased covariances, 64-bit",
        "departures": departures,
    }
    return ProtocolScores(
        metrics={"images": done, name: distance.value},
        did=did,
        skipped=skipped,
        notes=[distance.warning] if distance.warning else [],
    )


def described(settings: ImageGenerationConfig) -> str:
    """Settings of the generation of images in words."""
    ramp = " rising from 0" if settings.guidance_ramp else ""
    return (
        f"{settings.steps} steps, guidance {settings.guidance:g}{ramp}, temperature {settings.temperature:g}, "
        f"tokens sampled at temperature {settings.token_temperature:g}"
    )


def _captioned(source: Source) -> np.ndarray:
    """Numbers of the items with a caption. Raises UserError where there are none, or no images."""
    require_pairs(source, source.name)
    items = captioned_items(source)
    if not len(items):
        raise UserError(f"{source.name}: no image has a caption")
    return items


def _added(statistics: FeatureStatistics | None, features_BD: Tensor) -> FeatureStatistics:
    return (statistics or FeatureStatistics(features_BD.shape[1])).add(features_BD)


_SPLITS = re.compile(r"(?<![a-z])(train|restval|val|valid|validation|dev|test)(?![a-z])")


def split_named_in(spec: str) -> str | None:
    """The split that the spec of a source names: its option `split`, else a word in the name of the file."""
    if option := re.search(r"[?&]split=([^&]+)", spec):
        return option[1]
    found = _SPLITS.findall(Path(spec.partition("?")[0]).name.lower())
    return found[0] if len(set(found)) == 1 else None


def evaluate_protocol(
    run: Path,
    spec: str,
    source: Source,
    config: EvaluateConfig,
    *,
    protocol: Protocol,
    features: str | None,
    out: Path,
    device: Device,
    precision: InferencePrecision = "auto",
    visible: float | None = None,
) -> None:
    """Score a run by ``protocol``; print scores and what was done, and write both into ``out/metrics.json``.

    ``spec`` names ``source``: a split that is not the protocol's is reported.
    """
    diptych = Diptych.from_pretrained(run, device=device, precision=precision, visible=visible)
    _ = diptych.text_encoder  # what is wrong with it is told before the work
    source = first_scenes(source)
    split = split_named_in(spec)
    if protocol == "coco-karpathy":
        found = coco_karpathy(diptych, source, config, advance=ProgressLine("captioning"))
        fits = split in (None, "test")
    else:
        extractor = open_extractor(features)
        found = coco_fid30k(diptych, source, config, extractor=extractor, advance=ProgressLine("generating images"))
        fits = split is None or all(part in ("train", "restval") for part in split.split("+"))
    wanted = "the test split" if protocol == "coco-karpathy" else "captions of the training split"
    if not fits:
        found.did["departures"].append(f"{spec} names the split {split}: the protocol has {wanted}")
    did = {"source": spec, "split": split or f"named by nothing in the source; the protocol has {wanted}", **found.did}
    out.mkdir(parents=True, exist_ok=True)
    notes = found.notes + found.skipped.report(out / "skipped.jsonl")
    print_metrics(found.metrics, title=f"{run} on {source.name}, {protocol}", notes=notes)
    print_protocol(protocol, did)
    record = {"protocol": {"name": protocol, "run": str(run), **did}, "notes": notes}
    write_json(out / "metrics.json", {**found.metrics, "skipped": len(found.skipped), **record})
    if found.captions:
        write_captions(out / "captions.jsonl", found.keys, found.captions, found.references)
    print(f"written to {out}")


def print_protocol(name: str, did: dict[str, Any]) -> None:
    """Print a line for each choice of the protocol, and a line for each departure from it."""
    print(f"protocol {name}")
    for what, value in did.items():
        if what != "departures":
            print(f"  {what}: {value}")
    for line in did["departures"]:
        print(f"  DEPARTS: {line}")


# Cycles


def cycle_scores(
    diptych: Diptych,
    source: Source,
    images: ScoredImages,
    *,
    rounds: int,
    extractor: FeatureExtractor,
    seed: int = 0,
    advance: Any = lambda done, total: None,
) -> list[dict[str, float]]:
    """Scores of each round of cycle generation against the start of its cycle, a record for each round.

    `from_text/...` is text -> image -> text -> ..., from the first caption of each image; `from_image/...` is image ->
    text -> image -> ... A round makes an image and a text. On `scenes:` they are scored by the share of attributes
    (shape, colour, place of each thing) that are those of the scene, and by the share that is right in all. On other
    images the text is scored by CIDEr-D against the text that the cycle began with, or the captions of the image that
    it began with; the image by its :func:`feature_distance` to the true one.
    """
    texts = [source.captions(item) for item in images.items]
    scenes = source.scenes(images.items) if isinstance(source, ScenesSource) else None
    records: list[dict[str, float]] = [{"round": number} for number in range(1, rounds + 1)]

    def score_texts(start: str, record: dict[str, float], made: Sequence[str]) -> None:
        if scenes is not None:
            record |= _attributes(f"{start}/caption", caption_accuracy(made, scenes))
        else:
            references = [each[:1] for each in texts] if start == "from_text" else texts
            record[f"{start}/cider"] = score_captions(list(made), references).cider

    def score_images(start: str, record: dict[str, float], made: np.ndarray) -> None:
        if scenes is not None:
            record |= _attributes(f"{start}/image", image_accuracy(made, scenes))
        else:
            record[f"{start}/feature_distance"] = feature_distance(images.pixels_BSS3, made, extractor)

    captions = [each[0] for each in texts]
    for number, record in enumerate(records):
        generated = diptych.imagine_pixels(captions, seed=seed + number)
        score_images("from_text", record, generated)
        captions = [caption.text for caption in diptych.caption_encoded(diptych.encode(generated))]
        score_texts("from_text", record, captions)
        advance(number + 1, 2 * rounds)
    encoded = images.encoded
    for number, record in enumerate(records):
        captions = [caption.text for caption in diptych.caption_encoded(encoded)]
        score_texts("from_image", record, captions)
        generated = diptych.imagine_pixels(captions, seed=seed + number)
        score_images("from_image", record, generated)
        encoded = diptych.encode(generated)
        advance(rounds + number + 1, 2 * rounds)
    return records


def _attributes(name: str, score: SceneScore) -> dict[str, float]:
    return {f"{name}_attributes": float(np.mean(list(score.attributes.values()))), f"{name}_accuracy": score.exact}


def feature_distance(
    real_BSS3: UInt8[np.ndarray, "B S S 3"], made_BSS3: UInt8[np.ndarray, "B R R 3"], extractor: FeatureExtractor
) -> float:
    """Mean squared difference of the features of paired images, each feature in units of its spread among real images.

    0: the same images; 1: as far as one real image is from another, on the mean.
    """
    made_B3SS = channels_first(made_BSS3)
    real_B3SS = resize_pixels(channels_first(real_BSS3), made_B3SS.shape[-1])
    real_BD, made_BD = (
        torch.cat([extractor(piece).double().cpu() for piece in part.split(_ROWS)]) for part in (real_B3SS, made_B3SS)
    )
    variance_D = real_BD.var(0).clamp(min=1e-12)
    return float(((made_BD - real_BD).square() / (2 * variance_D)).mean())


def evaluate_cycles(
    runs: Sequence[Path],
    spec: str,
    source: Source,
    config: EvaluateConfig,
    *,
    rounds: int,
    features: str | None,
    out: Path,
    device: Device,
    precision: InferencePrecision = "auto",
    visible: float | None = None,
) -> None:
    """Score cycles of one or several runs; print a table of each, and write ``cycles.svg`` and ``metrics.json``.

    Raises UserError for fewer than two images: neither CIDEr nor the distance of features says anything then.
    """
    extractor = open_extractor(features)
    found: dict[str, list[dict[str, float]]] = {}
    counts: dict[str, int] = {}
    for run in runs:
        diptych = Diptych.from_pretrained(run, device=device, precision=precision, visible=visible)
        if config.image_generation is not None:
            diptych.image_generation = config.image_generation
        images = ScoredImages.read(diptych, source, config)
        if len(images.items) < 2:
            raise UserError(f"{spec}: cycles are scored on two captioned images or more")
        counts[str(run)] = len(images.items)
        found[str(run)] = cycle_scores(
            diptych,
            source,
            images,
            rounds=rounds,
            extractor=extractor,
            seed=config.seed,
            advance=ProgressLine(f"cycles of {run}"),
        )
    names = [name for name in next(iter(found.values()))[0] if name != "round"]
    console = Console(highlight=False)
    for run_name, records in found.items():
        table = Table("score", *(f"round {record['round']}" for record in records))
        for name in names:
            table.add_row(name, *(f"{record[name]:.3g}" for record in records))
        title = f"cycles of {run_name} on {counts[run_name]:,} images of {source.name}"
        console.print(title, style="bold", markup=False, soft_wrap=True)
        console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    panels = [Panel(title=name.replace("_", " "), keys=[name]) for name in names if not name.endswith("_accuracy")]
    short = {name: Path(name).name for name in found}
    unique = len(set(short.values())) == len(short)
    write_bytes(
        out / "cycles.svg",
        one_figure({short[n] if unique else n: each for n, each in found.items()}, panels=panels, over="round"),
    )
    metrics = {"source": spec, "images": counts, "seed": config.seed, "features": extractor.name, "cycles": found}
    write_json(out / "metrics.json", metrics)
    print(f"written to {out}")
