"""Commands on finished runs."""

import json
from dataclasses import asdict
from pathlib import Path

from diptych.data.encode import Coders
from diptych.data.pixels import channels_first
from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.eval.features import FeatureExtractor, HubExtractor, RandomFeatures, TorchScriptExtractor
from diptych.eval.generation import EvaluateConfig, Evaluation, read_images
from diptych.eval.generation import evaluate as score
from diptych.eval.tokenizer import evaluate_tokenizer
from diptych.models.image_tokenizer import ImageTokenizer
from diptych.models.text_encoder import TextEncoder
from diptych.nn.inference import Device, pick_device
from diptych.pipeline import Diptych, coders
from diptych.recipes.folders import read_config, write_json
from diptych.report.console import print_metrics
from diptych.report.files import write_bytes
from diptych.report.sheet import Cell, comparison, save_png

_SHOWN = 8


def run_coders(run: Path, *, features: bool) -> Coders:
    """The coders of a run, finished or not."""
    for part in ("tokenizer", "text_encoder"):
        if not (run / part).is_dir():
            raise UserError(f"{run}: has no {part}/: give a run of an itit recipe")
    device = pick_device("auto")
    tokenizer = ImageTokenizer.from_pretrained(run / "tokenizer").to(device)
    text_encoder = TextEncoder.from_pretrained(run / "text_encoder").to(device)
    length = read_config(run)["run"]["model"]["text_tokens"]
    return coders(tokenizer, text_encoder, length=length, features=features)


def evaluate_run(
    run: Path, source: Source, config: EvaluateConfig, *, features: str | None, out: Path, device: Device
) -> None:
    """Score a run; print a table, write ``metrics.json``, ``captions.jsonl`` and ``sheet.png`` into ``out``."""
    diptych = Diptych.from_pretrained(run, device=device)
    found = score(diptych, source, config, extractor=_extractor(features))
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


def evaluate_tokenizer_run(
    run: Path, source: Source, *, limit: int | None, features: str | None, out: Path, device: Device
) -> None:
    """Score the image tokenizer of a run: a line, ``metrics.json`` and a sheet of pictures before and after."""
    tokenizer = ImageTokenizer.from_pretrained(run / "tokenizer").to(pick_device(device))
    pixels_BSS3 = read_images(source, limit=limit, size=tokenizer.size)[1]
    pixels_B3SS = channels_first(pixels_BSS3)
    score = evaluate_tokenizer(tokenizer, pixels_B3SS.split(64), extractor=_extractor(features))
    after = tokenizer.decode(tokenizer.encode(pixels_B3SS[:_SHOWN])).permute(0, 2, 3, 1).cpu().numpy()
    write_json(out / "metrics.json", {**asdict(score), "source": source.name})
    rows = {"image": [Cell(picture=p) for p in pixels_BSS3[:_SHOWN]], "after": [Cell(picture=p) for p in after]}
    save_png(out / "sheet.png", comparison(rows, title=f"{run.name}: what the tokens keep"))
    print(f"{score}, on {score.images:,} images of {source.name}\nwritten to {out}")


def sheet(found: Evaluation, *, shown: int = _SHOWN, title: str = ""):
    """Real images with a reference, what was written about them, and what was drawn for that reference."""
    rows = {
        "image": [Cell(picture=p, caption=t[0]) for p, t in zip(found.real_BSS3, found.references, strict=True)][:shown]
    }
    if found.captions:
        rows["caption"] = [Cell(caption=text) for text in found.captions[:shown]]
    if found.drawn_BSS3 is not None:
        rows["drawn"] = [Cell(picture=picture) for picture in found.drawn_BSS3[:shown]]
    return comparison(rows, title=title)


def _extractor(name: str | None) -> FeatureExtractor:
    if name is None:
        return RandomFeatures()
    if Path(name).is_file():
        return TorchScriptExtractor(name)
    return HubExtractor(name)
