"""`diptych sweep`: the scores of a run over a grid of settings of its generation, to choose them by.

ITIT's paper chooses temperature and guidance for each model. Images are scored by their Frechet distance, captions by
CIDEr-D. Choose the settings on validation data: scores on a test set by which they were chosen are too good.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from diptych.data.pixels import channels_first
from diptych.data.sources import Source
from diptych.encoders.image import resize_pixels
from diptych.errors import UserError
from diptych.eval.captions import score_captions
from diptych.eval.frechet import feature_statistics, frechet_distance, metric_name, open_extractor
from diptych.io import weights_digest, write_bytes
from diptych.itit.evaluation import EvaluateConfig, ScoredImages
from diptych.itit.pipeline import Diptych
from diptych.itit.protocols import split_named_in
from diptych.nn.inference import Device
from diptych.report.figures import Panel, one_figure
from diptych.report.terminal import ProgressLine, meaning_of
from diptych.run_folder import write_json

CELLS = "cells.jsonl"
"""File of the scores, a line for each setting. A repeated command continues from it."""

_CAPTION_SCORES = ("cider", "bleu_4", "rouge_l", "mean_length")

ScoredCell = dict[str, Any]
"""The settings of one cell of the grid, and its scores once it has been scored."""


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """The grid, and the images that it is scored on. An empty list leaves a side out."""

    guidance: Sequence[float] = (0.0, 1.0, 2.0, 4.0)
    """Strengths of guidance of images."""
    temperature: Sequence[float] = (1.0, 4.0, 16.0, 32.0)
    """Temperatures of images: noise in the order in which tokens are chosen."""
    beams: Sequence[int] = (1, 4, 8)
    """Numbers of beams of captions."""
    length_power: Sequence[float] = (0.0, 0.6, 1.0)
    """Powers of the length penalty of captions."""
    steps: int | None = None
    """Number of steps of an image. None takes the run's own."""
    limit: int = 500
    """Number of images, the first of the source."""
    seed: int = 0
    """Seed of the generated images."""

    def images(self) -> list[ScoredCell]:
        """The settings of images."""
        grid = product(self.temperature, self.guidance)
        return [{"side": "images", "temperature": float(t), "guidance": float(g)} for t, g in grid]

    def captions(self) -> list[ScoredCell]:
        """The settings of captions."""
        grid = product(self.beams, self.length_power)
        return [{"side": "captions", "beams": int(b), "length_power": float(p)} for b, p in grid]


def sweep_run(
    run: Path,
    spec: str,
    source: Source,
    config: SweepConfig,
    *,
    features: str | None,
    out: Path,
    device: Device,
) -> list[ScoredCell]:
    """Score a run at each setting; print tables, and write ``cells.jsonl``, ``sweep.json`` and figures into ``out``.

    A repeated command resumes where it stopped, and scores settings that are new. Raises UserError where ``out`` holds
    a sweep of another run, other data or another seed.
    """
    if (split := split_named_in(spec)) == "test":
        print(
            f"{spec} names the split {split}: settings that are chosen on it make its scores too good; "
            "choose them on validation data",
            file=sys.stderr,
        )
    diptych = Diptych.from_pretrained(run, device=device)
    _ = diptych.text_encoder  # what is wrong with it is told before the work
    extractor = open_extractor(features)
    if isinstance(extractor, torch.nn.Module):
        extractor.to(diptych.device)
    images = ScoredImages.read(diptych, source, EvaluateConfig(limit=config.limit))
    references = [source.captions(item) for item in images.items]
    name = metric_name(extractor)
    steps = config.steps or diptych.image_generation.steps
    made_by = {
        "weights": weights_digest(diptych.model),
        "source": spec,
        "images": len(images.items),
        "seed": config.seed,
        "steps": steps,
        "features": extractor.name,
    }
    done = _begun(out, made_by)
    pixels_B3SS = resize_pixels(channels_first(images.pixels_BSS3), diptych.tokenizer.image_size)
    real = feature_statistics(extractor, pixels_B3SS.to(diptych.device)) if config.images() else None

    def score(cell: ScoredCell) -> dict[str, float]:
        if cell["side"] == "images":
            assert real is not None
            settings = replace(
                diptych.image_generation, steps=steps, guidance=cell["guidance"], temperature=cell["temperature"]
            )
            generated = diptych.imagine_pixels([texts[0] for texts in references], seed=config.seed, config=settings)
            made = feature_statistics(extractor, channels_first(np.asarray(generated)).to(diptych.device))
            return {name: frechet_distance(real, made).value}
        own = diptych.text_generation
        diptych.text_generation = replace(own, length_power=cell["length_power"])
        try:
            found = diptych.caption_encoded(images.encoded, beams=cell["beams"])
        finally:
            diptych.text_generation = own
        scores = score_captions([caption.text for caption in found], references).table()
        return {key: scores[key] for key in _CAPTION_SCORES}

    cells = _score_all([*config.images(), *config.captions()], done, score, out)
    _write_and_print(out, cells, name, made_by, title=f"{run} on {len(images.items):,} images of {spec}")
    return cells


def _begun(out: Path, made_by: dict[str, Any]) -> list[ScoredCell]:
    """The cells that an earlier call has scored in ``out``; writes down what the sweep is of."""
    file = out / "sweep.json"
    if file.is_file():
        before = json.loads(file.read_text())["of"]
        if differing := [key for key, value in made_by.items() if before.get(key) != value]:
            raise UserError(f"{out}: holds a sweep of other {', '.join(differing)}: give another --out, or remove it")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, {"of": made_by})
    lines = (out / CELLS).read_text().splitlines() if (out / CELLS).is_file() else []
    return [json.loads(line) for line in lines]


def _score_all(
    grid: Sequence[ScoredCell], done: list[ScoredCell], score: Callable[[ScoredCell], dict[str, float]], out: Path
) -> list[ScoredCell]:
    """Every cell of the grid with its scores. After each the file of cells is written anew."""
    known = {_key(cell): cell for cell in done}
    progress = ProgressLine("settings")
    for number, cell in enumerate(grid):
        progress(number, len(grid))
        if _key(cell) in known:
            continue
        known[_key(cell)] = {**cell, **score(cell)}
        write_bytes(out / CELLS, "".join(json.dumps(each) + "\n" for each in known.values()).encode())
    progress(len(grid), len(grid))
    return [{**known[_key(cell)], **cell} for cell in grid]


def _key(cell: ScoredCell) -> str:
    """The settings that matter: greedy decoding has no length penalty."""
    settings = {**cell, "length_power": None} if cell.get("beams") == 1 else cell
    return json.dumps([settings.get(name) for name in ("side", "temperature", "guidance", "beams", "length_power")])


def _write_and_print(out: Path, cells: Sequence[ScoredCell], name: str, made_by: dict[str, Any], *, title: str) -> None:
    """A table and a figure for each side, and the best settings."""
    best: dict[str, ScoredCell] = {}
    console = Console(highlight=False)
    for side, across, along, score in (
        ("images", "temperature", "guidance", name),
        ("captions", "beams", "length_power", "cider"),
    ):
        some = [cell for cell in cells if cell["side"] == side]
        if not some:
            continue
        sign = -1 if meaning_of(score).better == "lower" else 1
        best[side] = max(some, key=lambda cell: sign * cell[score])
        columns = list(dict.fromkeys(cell[along] for cell in some))
        table = Table(f"{across} / {along}", *(f"{value:g}" for value in columns))
        for row in dict.fromkeys(cell[across] for cell in some):
            found = {cell[along]: cell for cell in some if cell[across] == row}
            mark = [" *" if found[value] is best[side] else "" for value in columns]
            table.add_row(f"{row:g}", *(f"{found[v][score]:.4g}{m}" for v, m in zip(columns, mark, strict=True)))
        console.print(f"{score} of {title}", style="bold", markup=False, soft_wrap=True)
        console.print(table)
        more = {"images": [], "captions": [Panel(title="words of a caption", keys=["mean_length"])]}[side]
        runs = {f"{across} {row:g}": [c for c in some if c[across] == row] for row in {c[across]: 0 for c in some}}
        figure = one_figure(runs, panels=[Panel(title=score, keys=[score]), *more], over=along)
        write_bytes(out / f"{side}.svg", figure)
    write_json(out / "sweep.json", {"of": made_by, "best": best, "cells": list(cells)})
    for side, cell in best.items():
        chosen = {key: value for key, value in cell.items() if key not in ("side", name, *_CAPTION_SCORES)}
        where = "image" if side == "images" else "text"
        settings = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        print(f"best for {side}: {settings}; a run keeps its own in generation.{where} of config.json")
    print(f"written to {out}")
