"""`diptych demo`: what unpaired data is worth, shown on the built-in scenes in a few minutes of CPU."""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from diptych.data.scenes.source import ScenesSource
from diptych.eval.generation import EvaluateConfig, Evaluation, evaluate
from diptych.eval.scenes import image_accuracy
from diptych.pipeline import Diptych
from diptych.recipes.data import DataConfig
from diptych.recipes.demo_report import Contender, write_demo_report
from diptych.recipes.folders import write_config, write_json
from diptych.recipes.itit import ItitRun, Prepared
from diptych.recipes.itit_recipes import itit_tiny
from diptych.train.loop import Hook

PAIRS, UNPAIRED = 60, 18_000
"""Captioned pictures; and bare pictures, and as many loose texts, none of which belong together."""
_SCORED, _WATCHED = 1000, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    diptych: Diptych
    seconds: float
    steps: int


def run_demo(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train with pairs alone and with unpaired data as well; score both on held-out scenes; write ``report.html``.

    Leaves ``paired_only/`` and ``itit/``, ordinary run folders with the same initial weights and number of steps;
    ``paired_only_longer/``, the first one trained on for as many seconds as the second took; and ``metrics.json``.
    """
    began = time.monotonic()
    say = Console(highlight=False).print
    run = demo_recipe(quick=quick, seed=seed)
    test = ScenesSource(split="test", seed=seed + 1, count=100 if quick else _SCORED)
    say(f"[bold]{PAIRS}[/bold] captioned pictures, {UNPAIRED:,} bare pictures, {UNPAIRED:,} loose texts")
    ready = run.prepare(out / "itit")
    ceiling = _ceiling(ready, test)
    say(f"tokenizer: {ceiling:.1%} of {len(test):,} unseen pictures are recognised after encoding and decoding")

    itit = _train(run, ready, out / "itit", test, title="ITIT")
    alone = paired_only(run)
    _share(out / "itit", out / "paired_only")
    paired = _train(alone, ready, out / "paired_only", test, title="pairs only")
    contenders = [
        _score("paired_only", "pairs only", paired, test),
        _score("itit", "ITIT", itit, test),
    ]
    if paired.seconds < itit.seconds:
        longer = _train_longer(alone, ready, out, test, seconds=itit.seconds - paired.seconds)
        contenders.insert(1, _score("paired_only_longer", "pairs only, same time", longer, test))

    metrics: dict[str, Any] = {contender.name: contender.metrics for contender in contenders}
    metrics |= {"tokenizer": {"image_accuracy": ceiling}, "seconds": round(time.monotonic() - began, 1), "quick": quick}
    write_json(out / "metrics.json", metrics)
    _print_table(contenders)
    report = write_demo_report(out, contenders, metrics=metrics, pairs=PAIRS, unpaired=UNPAIRED)
    say(f"{time.monotonic() - began:.0f} s in all. Open [bold]{report}[/bold] to see what was learned.")
    return metrics


def demo_recipe(*, quick: bool, seed: int) -> ItitRun:
    """`itit-tiny` on the built-in scenes, with a constant rate and averaged weights, so that it may stop anywhere."""
    base = itit_tiny()
    total = PAIRS + 2 * UNPAIRED
    run = replace(
        base,
        data=DataConfig(pairs=f"scenes:?split=train&seed={seed}&count={total}", max_pairs=PAIRS),
        train=replace(base.train, seed=seed, tensorboard=False),
    )
    if not quick:
        return run
    return replace(
        run,
        data=replace(run.data, pairs=f"scenes:?split=train&seed={seed}&count={PAIRS + 2000}"),
        tokenizer_stage=replace(run.tokenizer_stage, train=replace(run.tokenizer_stage.train, steps=60)),
        text_encoder_stage=replace(run.text_encoder_stage, train=replace(run.text_encoder_stage.train, steps=30)),
        objective=replace(run.objective, cycles_from=15),
        train=replace(run.train, steps=30, checkpoint_every=1000, eval_every=1000),
    )


def paired_only(run: ItitRun) -> ItitRun:
    """The control: the same run without unpaired data."""
    return replace(run, objective=replace(run.objective, texts="off", images="off"))


def _train(run: ItitRun, ready: Prepared, out: Path, test: ScenesSource, *, title: str) -> _Trained:
    write_config(out, recipe="itit-tiny", run=run, generation=asdict(run.generation))
    objective = run.build(ready)
    diptych = run.diptych(objective, ready)
    watched = replace(test, count=min(_WATCHED, test.count))

    def watch(step: int, module: nn.Module) -> dict[str, float]:
        found = evaluate(diptych, watched, EvaluateConfig(beams=1)).metrics
        return {name: found[name] for name in ("caption_accuracy", "image_accuracy")}

    hook = Hook(every=run.train.eval_every, run=watch)
    result = run.train_on(ready, objective, out, hooks=[hook], title=title)
    return _Trained(diptych=Diptych.from_pretrained(out), seconds=result.seconds, steps=result.step)


def _train_longer(alone: ItitRun, ready: Prepared, out: Path, test: ScenesSource, *, seconds: float) -> _Trained:
    """Go on with a copy of the paired-only run until it has had as much time."""
    folder = out / "paired_only_longer"
    if not folder.exists():
        shutil.copytree(out / "paired_only", folder)
    longer = replace(alone, train=replace(alone.train, steps=1_000_000, max_seconds=seconds))
    return _train(longer, ready, folder, test, title="pairs only, same time")


def _share(source: Path, out: Path) -> None:
    """Run folders are self-contained, so each has its own copy of what was made once."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(source / part, out / part, dirs_exist_ok=True)


def _ceiling(ready: Prepared, test: ScenesSource) -> float:
    """Accuracy of pictures that only went through the tokenizer: no network that draws tokens can do better."""
    items = np.arange(len(test))
    pixels_B3HW = torch.from_numpy(test.images(items, ready.tokenizer.size)).permute(0, 3, 1, 2).contiguous()
    decoded = ready.tokenizer.decode(ready.tokenizer.encode(pixels_B3HW)).permute(0, 2, 3, 1).cpu().numpy()
    return image_accuracy(decoded, test.scenes(items)).exact


def _score(name: str, title: str, trained: _Trained, test: ScenesSource) -> Contender:
    found: Evaluation = evaluate(trained.diptych, test, EvaluateConfig())
    metrics = {**found.metrics, "seconds": round(trained.seconds, 1), "steps": trained.steps}
    return Contender(name=name, title=title, metrics=metrics, evaluation=found, diptych=trained.diptych)


def _print_table(contenders: list[Contender]) -> None:
    table = Table("", "captions exact", "pictures exact", "CIDEr", "steps", "seconds", title="on held-out scenes")
    for contender in contenders:
        m = contender.metrics
        table.add_row(
            contender.title, f"{m['caption_accuracy']:.3f}", f"{m['image_accuracy']:.3f}", f"{m['cider']:.0f}",
            f"{m['steps']:,}", f"{m['seconds']:.0f}",
        )  # fmt: skip
    Console().print(table)
