"""`diptych demo`: what unpaired data is worth, shown on the built-in scenes in a few minutes of CPU."""

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as ConsoleTable
from torch import nn

from diptych.data.pixels import channels_first
from diptych.data.scenes.source import ScenesSource
from diptych.errors import UserError
from diptych.eval.scenes import image_accuracy
from diptych.itit.data import DataConfig
from diptych.itit.evaluation import EvaluateConfig, Evaluation, evaluate
from diptych.itit.pipeline import Diptych
from diptych.itit.recipes import itit_tiny
from diptych.itit.training import ItitRun, Prepared
from diptych.report.figures import Panel, curves, read_metrics
from diptych.report.html import (
    Captioned,
    Comparison,
    Example,
    Facts,
    Figures,
    Section,
    Strip,
    Table,
    Text,
    write_report,
)
from diptych.run_folder import write_config, write_json
from diptych.train.interrupt import Interrupted
from diptych.train.loop import Hook

PAIRS, UNPAIRED = 48, 18_000
"""Captioned pictures; and bare pictures, and as many loose texts, none of which belong together."""
_SCORED, _WATCHED = 500, 100
_TITLES = {"paired_only": "pairs only", "paired_only_longer": "pairs only, same time", "itit": "ITIT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRun:
    """A trained network and what it did on the held-out scenes."""

    name: str
    """Of its run folder."""
    title: str
    metrics: dict[str, Any]
    evaluation: Evaluation
    diptych: Diptych


def run_demo(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train with pairs alone and with unpaired data as well; score both on held-out scenes; write ``report.html``.

    Leaves ``paired_only/`` and ``itit/``, ordinary run folders with the same initial weights and number of steps;
    ``paired_only_longer/``, the first one trained on for as many seconds as the second took; and ``metrics.json``.
    The two train side by side, each on half of the cores: networks this small do not fill more.
    """
    began = time.monotonic()
    say = Console(highlight=False).print
    run = demo_recipe(quick=quick, seed=seed)
    test = ScenesSource(split="test", seed=seed + 1, count=50 if quick else _SCORED)
    unpaired = (len(ScenesSource.from_spec(run.data.pairs)) - PAIRS) // 2
    say(f"[bold]{PAIRS}[/bold] captioned pictures, {unpaired:,} bare pictures, {unpaired:,} loose texts")
    ready = run.prepare(out / "itit")
    ceiling = _ceiling(ready, test)
    say(f"tokenizer: {ceiling:.1%} of {len(test):,} unseen pictures are recognised after encoding and decoding")

    _share(out / "itit", out / "paired_only")
    with _trained_beside(paired_only(run), out, test), _threads(_half_the_cores()):
        say("training ITIT, and beside it the same network on pairs only")
        _train(run, ready, out / "itit", test, title="ITIT")
    say("scoring")
    scored_runs = [
        _score(out / name, title, test) for name, title in _TITLES.items() if (out / name / "model").is_dir()
    ]
    metrics: dict[str, Any] = {scored_run.name: scored_run.metrics for scored_run in scored_runs}
    metrics |= {"tokenizer": {"image_accuracy": ceiling}, "seconds": round(time.monotonic() - began, 1), "quick": quick}
    write_json(out / "metrics.json", metrics)
    _print_table(scored_runs)
    report = write_demo_report(out, scored_runs, metrics=metrics, pairs=PAIRS, unpaired=unpaired)
    say(f"{time.monotonic() - began:.0f} s in all. Open [bold]{report}[/bold] to see what was learned.")
    return metrics


def demo_recipe(*, quick: bool, seed: int) -> ItitRun:
    """`itit-tiny` on the built-in scenes, with a constant rate and averaged weights, so that it may stop anywhere."""
    base = itit_tiny()
    total = PAIRS + 2 * UNPAIRED
    run = replace(
        base,
        data=DataConfig(pairs=f"scenes:?split=train&seed={seed}&count={total}", max_pairs=PAIRS),
        model=replace(base.model, max_text_len=16),  # as long as the longest caption of level 1
        train=replace(base.train, seed=seed, tensorboard=False),
    )
    if not quick:
        return run
    return replace(
        run,
        data=replace(run.data, pairs=f"scenes:?split=train&seed={seed}&count={PAIRS + 2000}"),
        tokenizer_stage=replace(run.tokenizer_stage, train=replace(run.tokenizer_stage.train, steps=60)),
        text_encoder_stage=replace(run.text_encoder_stage, train=replace(run.text_encoder_stage.train, steps=30)),
        objective=replace(run.objective, cycle_start_step=15),
        train=replace(run.train, steps=30, checkpoint_every=1000, eval_every=1000),
    )


def paired_only(run: ItitRun) -> ItitRun:
    """The control: the same run without unpaired data."""
    return replace(run, objective=replace(run.objective, texts="off", images="off"))


def _train(run: ItitRun, ready: Prepared, out: Path, test: ScenesSource, *, title: str) -> None:
    write_config(out, recipe="itit-tiny", run=run, generation=asdict(run.generation))
    objective = run.build(ready)
    diptych = run.diptych(objective, ready)
    watched = replace(test, count=min(_WATCHED, test.count))

    def watch(step: int, module: nn.Module) -> dict[str, float]:
        found = evaluate(diptych, watched, EvaluateConfig(beams=1)).metrics
        return {name: found[name] for name in ("caption_accuracy", "image_accuracy")}

    run.train_on(ready, objective, out, hooks=[Hook(every=run.train.eval_every, run=watch)], title=title)


@contextmanager
def _trained_beside(alone: ItitRun, out: Path, test: ScenesSource) -> Iterator[None]:
    """The control trains in a process of its own; when the body is done it is told to stop."""
    if (out / "paired_only_longer" / "model").is_dir():
        yield  # an earlier call has done it
        return
    child = multiprocessing.get_context("spawn").Process(target=_train_control, args=(alone, out, test))
    child.start()
    try:
        yield
        while child.is_alive() and not (out / "paired_only" / "model").is_dir():
            time.sleep(0.2)  # its own number of steps comes first, should it be the slower one
    finally:
        child.terminate()
        child.join()
    if not (out / "paired_only" / "model").is_dir():
        raise UserError(f"{out}/paired_only: the control stopped early; run the same command again to go on")


def _train_control(alone: ItitRun, out: Path, test: ScenesSource) -> None:
    """The same number of steps, and then on with a copy until SIGTERM."""
    torch.set_num_threads(_half_the_cores())
    alone = replace(alone, train=replace(alone.train, quiet=True))
    ready = alone.prepare(out / "itit")
    _train(alone, ready, out / "paired_only", test, title=_TITLES["paired_only"])
    folder = out / "paired_only_longer"
    if not folder.exists():
        shutil.copytree(out / "paired_only", folder, ignore=shutil.ignore_patterns("model"))
    try:
        _train(_until(alone, 1_000_000), ready, folder, test, title=_TITLES["paired_only_longer"])
    except Interrupted as stopped:
        _train(_until(alone, stopped.step), ready, folder, test, title=_TITLES["paired_only_longer"])


def _until(run: ItitRun, steps: int) -> ItitRun:
    return replace(run, train=replace(run.train, steps=steps))


def _half_the_cores() -> int:
    return max(1, (os.cpu_count() or 1) // 2)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _share(source: Path, out: Path) -> None:
    """Run folders are self-contained, so each has its own copy of what was made once."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(source / part, out / part, dirs_exist_ok=True)


def _ceiling(ready: Prepared, test: ScenesSource) -> float:
    """Accuracy of pictures that only went through the tokenizer: no network that draws tokens can do better."""
    items = np.arange(len(test))
    pixels_B3HW = channels_first(test.images(items, ready.tokenizer.image_size))
    decoded = ready.tokenizer.decode(ready.tokenizer.encode(pixels_B3HW)).permute(0, 2, 3, 1).cpu().numpy()
    return image_accuracy(decoded, test.scenes(items)).exact


def _score(folder: Path, title: str, test: ScenesSource) -> ScoredRun:
    diptych = Diptych.from_pretrained(folder)
    found = evaluate(diptych, test, EvaluateConfig())
    last = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record][-1]
    metrics = {**found.metrics, "seconds": round(last["seconds"], 1), "steps": last["step"]}
    return ScoredRun(name=folder.name, title=title, metrics=metrics, evaluation=found, diptych=diptych)


def _print_table(scored_runs: list[ScoredRun]) -> None:
    table = ConsoleTable(
        "", "captions exact", "pictures exact", "CIDEr", "steps", "seconds", title="on held-out scenes"
    )
    for scored_run in scored_runs:
        m = scored_run.metrics
        table.add_row(
            scored_run.title, f"{m['caption_accuracy']:.3f}", f"{m['image_accuracy']:.3f}", f"{m['cider']:.0f}",
            f"{m['steps']:,}", f"{m['seconds']:.0f}",
        )  # fmt: skip
    Console().print(table)


# JOINED recipes.demo_report
#| The report of `diptych demo`.


_SHOWN = 12
_ATTRIBUTES = ("shape", "colour", "size", "place", "background")


def write_demo_report(
    out: Path, scored_runs: list[ScoredRun], *, metrics: dict[str, Any], pairs: int, unpaired: int
) -> Path:
    """``out/report.html``."""
    both = [scored_run for scored_run in scored_runs if scored_run.name in ("paired_only", "itit")]
    sections = [
        Section("What was learned", _learned(scored_runs, metrics)),
        Section("Captions", [Text("Scenes whose combination of shape, colour and place no network has seen, and what "
                                  "each wrote about them."), _captions(both)]),
        Section("Pictures", [Text("Drawn for the captions of such scenes."), _pictures(both)]),
        Section("Cycles", [block for scored_run in both for block in _cycle(scored_run)]),
        Section("Curves", _curves(out, scored_runs)),
    ]  # fmt: skip
    lead = (
        f"Two networks with the same initial weights, both given {pairs} captioned pictures. One also got {unpaired:,} "
        f"bare pictures and {unpaired:,} loose texts, and learned from them by cycle consistency."
    )
    return write_report(out / "report.html", sections, title="Diptych: demo", lead=lead)


def _learned(scored_runs: list[ScoredRun], metrics: dict[str, Any]) -> list[Any]:
    head = ["", "captions exact", "pictures exact", "CIDEr", "distinct captions", "steps", "seconds"]
    keys = ("caption_accuracy", "image_accuracy", "cider", "distinct_captions", "steps", "seconds")
    rows = [[c.title, *(c.metrics[key] for key in keys)] for c in scored_runs]
    parts = [
        [f"{c.title}, {side}", *(c.metrics[f"{kind}_{name}"] for name in _ATTRIBUTES)]
        for c in scored_runs
        for side, kind in (("captions", "caption"), ("pictures", "image"))
    ]
    digits = {"CIDEr": 0, "steps": 0, "seconds": 0}
    scored = scored_runs[0].metrics["images"]
    return [
        Table(head=head, rows=rows, digits=digits, best=dict.fromkeys(head[1:4], "high"), caption=(
            f"On {scored:,} held-out scenes. Exact: all five attributes right, as read back by a parser and "
            "by a recogniser that learns nothing.")),
        Table(head=["right", *_ATTRIBUTES], rows=parts, caption="Attribute by attribute."),
        Facts(items={"pictures that survive the tokenizer": metrics["tokenizer"]["image_accuracy"],
                     "seconds in all": metrics["seconds"]}),
    ]  # fmt: skip


def _captions(both: list[ScoredRun]) -> Comparison:
    shown = both[0].evaluation
    return Comparison(
        [
            Example(
                shown.references[row][0],
                [
                    Captioned(image=shown.real_BSS3[row], label="scene"),
                    *(Captioned(caption=c.evaluation.captions[row], label=c.title) for c in both),
                ],
            )
            for row in range(min(_SHOWN, len(shown.keys)))
        ]
    )


def _pictures(both: list[ScoredRun]) -> Comparison:
    shown = both[0].evaluation
    examples = []
    for row in range(min(_SHOWN, len(shown.keys))):
        drawn = [
            Captioned(image=c.evaluation.drawn_BSS3[row], label=c.title)
            for c in both
            if c.evaluation.drawn_BSS3 is not None
        ]
        scene = Captioned(image=shown.real_BSS3[row], label="scene")
        examples.append(Example(shown.references[row][0], [scene, *drawn]))
    return Comparison(examples)


def _cycle(scored_run: ScoredRun) -> list[Any]:
    text = scored_run.evaluation.references[0][0]
    steps = [step.shown for step in scored_run.diptych.cycle(text=text, rounds=3)]
    return [Text(f"{scored_run.title}: text to picture to text, three times over."), Strip(steps)]


def _curves(out: Path, scored_runs: list[ScoredRun]) -> list[Any]:
    runs = {c.title: read_metrics(out / c.name / "metrics.jsonl") for c in scored_runs}
    accuracy = [
        Panel(title="captions exact", keys=["caption_accuracy"]),
        Panel(title="pictures exact", keys=["image_accuracy"]),
    ]
    losses = [Panel(title=name, keys=[f"loss/{name}"]) for name in ("t2i", "i2t", "i2i", "t2i2t", "i2t2i")]
    variety = Panel(title="distinct captions in the cycle", keys=["loss/i2t2i/distinct_captions"])
    return [
        Figures(images=curves(runs, panels=accuracy, over="seconds"), caption="Accuracy over seconds of training."),
        Figures(images=curves(runs, panels=accuracy), caption="Accuracy over steps."),
        Figures(images=curves(runs, panels=[*losses, variety], smooth=0.95), caption="Losses over steps."),
    ]
