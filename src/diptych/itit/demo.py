"""`diptych demo`: ITIT against the same network without unpaired data, on the built-in scenes, and a report of both.

It takes a few minutes on a CPU.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from diptych.data.batch import Batch, ImageTokenExamples, PairExamples, TextExamples
from diptych.data.pixels import channels_first
from diptych.data.scenes import ScenesSource
from diptych.data.store import Store
from diptych.eval.scenes import image_accuracy
from diptych.itit.controls import LONGER, TITLES, controls_beside, half_the_cores, regression_on_pixels, train_watched
from diptych.itit.data import ENCODING, DataConfig, TrainingInputs
from diptych.itit.evaluation import EvaluateConfig, Evaluation, evaluate
from diptych.itit.objective import ItitObjective
from diptych.itit.pipeline import Diptych
from diptych.itit.recipes import itit_tiny
from diptych.itit.training import NETWORK, ItitRun
from diptych.report.figures import Panel, curves, read_metrics
from diptych.report.html import (
    Captioned,
    Example,
    Facts,
    Figures,
    ReportTable,
    Section,
    SideBySide,
    Strip,
    Text,
    write_report,
)
from diptych.report.terminal import WholeBar, in_words
from diptych.rng import StepRNG
from diptych.run_folder import write_json
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.training import TEXT_ENCODER, TOKENIZER
from diptych.train.pace import Pace, RunPlan, StageCost

STAGES = Path(__file__).parent / "scene_stages"
"""Image tokenizer and text encoder of the scenes, as `diptych demo --from-scratch` leaves them in its run folders."""
PAIRS, UNPAIRED = 80, 18_000
"""Number of captioned images, a fifth of a percent of all; number of unpaired images, and of scenes that unpaired texts
tell of."""
CAPTIONS = 2
"""Number of captions of a captioned image, and of unpaired texts about one scene."""
_SCORED = 500
"""Number of held-out scenes that are scored at the end."""
_SHOWN = 12
"""Number of held-out scenes in the report."""
_ATTRIBUTES = ("shape", "colour", "place")
"""Attributes of each of the three things of a scene."""
_TIMED = 6
"""Number of steps that are timed for the estimate."""
_SCORES, _REPORT = "scores, and the controls", "scores, and the report"
"""Names of what follows the training of ITIT, before and after the wait for the control that trains longer."""
_TOKENIZER_COST, _TEXT_ENCODER_COST = 17.0, 1.3
"""Cost of a step of the two stages of `--from-scratch`, where one of ITIT with cycles costs 5, as in `ItitRun.costs`:
processor time on one core with AVX2. Scenes are drawn anew for each step of the tokenizer."""
_TITLES = TITLES | {"itit": "ITIT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRun:
    """A trained network and its results on the held-out scenes."""

    name: str
    """Name of its run folder."""
    title: str
    """Name in the report."""
    metrics: dict[str, Any]
    """Scores, steps and seconds of training."""
    evaluation: Evaluation
    diptych: Diptych


def run_demo(out: Path, *, quick: bool = False, from_scratch: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train with pairs alone and with unpaired data as well; score both on held-out scenes; write ``report.html``.

    Leaves ``itit/`` and ``paired_only/``, run folders with the same initial weights and number of steps;
    ``paired_only_longer/``, in which the latter was trained on for as many seconds as the former took; and
    ``metrics.json``. The two train side by side, each on half of the cores, as networks this small do not fill more.

    Returns the content of ``metrics.json``. ``quick`` takes less data and fewer steps, to see that everything works;
    ``from_scratch`` trains the image tokenizer and the text encoder too.
    """
    began = time.monotonic()
    say = Console(highlight=False).print
    run = demo_recipe(quick=quick, from_scratch=from_scratch, seed=seed)
    test = ScenesSource(level=3, split="test", seed=seed + 1, count=50 if quick else _SCORED)
    unpaired = (len(ScenesSource.from_spec(run.data.pairs)) - PAIRS) // 2
    say(
        f"[bold]{PAIRS}[/bold] images with {CAPTIONS} captions each, {unpaired:,} unpaired images, "
        f"{unpaired * CAPTIONS:,} unpaired texts"
    )
    plan = RunPlan(costs_left(run, out), unit=_unit_expected(run))
    say(f"about {in_words(plan.seconds)} in all on this machine")
    with WholeBar(plan.seconds) as plan.bar:
        plan.show(TOKENIZER if from_scratch else ENCODING)
        inputs = run.prepare(out / "itit", plan)
        tokenizer_accuracy = reconstruction_accuracy(inputs, test)
        shown = f"{tokenizer_accuracy:.1%} of {len(test):,} unseen images"
        print(f"tokenizer: {shown} are recognized after encoding and decoding", flush=True)
        for name in ("paired_only", "paired_only_stopped"):
            _copy_tokenizers(out / "itit", out / name)

        def waiting(missing: float) -> None:
            plan.show(TITLES[LONGER], left=missing)

        with controls_beside(run, out, test, waiting=waiting) as finished, _threads(half_the_cores()):
            print("training ITIT, and beside it the same network on pairs only", flush=True)
            pace = Pace(cost=run.costs()[-1], later=plan.later(NETWORK), show=plan.show)
            train_watched(run, inputs, out / "itit", test, title=NETWORK, pace=pace)
            plan.show(_SCORES)
            regression = regression_on_pixels(run, test).exact
            found = {"itit": _score(out / "itit", _TITLES["itit"], test)}
            for name in ("paired_only", "paired_only_stopped"):  # while the longer one goes on
                found[name] = _score(finished(name), TITLES[name], test)
        plan.show(_REPORT)
        found[LONGER] = _score(out / LONGER, TITLES[LONGER], test)
        runs = [found[name] for name in _TITLES]
        metrics: dict[str, Any] = {each.name: each.metrics for each in runs}
        metrics["controls"] = _controls(runs, regression)
        metrics["tokenizer"] = {"image_accuracy": tokenizer_accuracy}
        metrics["world"] = describe_world(run, inputs)
        metrics |= {"seconds": round(time.monotonic() - began, 1), "quick": quick}
        write_json(out / "metrics.json", metrics)
        report = write_demo_report(out, runs, metrics=metrics, pairs=PAIRS, unpaired=unpaired)
    _print_table(runs, regression)
    say(f"{time.monotonic() - began:.0f} s in all. Open [bold]{report}[/bold] to see the results.")
    return metrics


def demo_recipe(*, quick: bool, from_scratch: bool = False, seed: int) -> ItitRun:
    """`itit-tiny` on the built-in scenes. It has a constant rate and averaged weights, so that it may stop anywhere."""
    base = itit_tiny()
    total = PAIRS + (2000 if quick else 2 * UNPAIRED)
    source = f"scenes:?level=3&split=train&seed={seed}&captions={CAPTIONS}&count={total}"
    run = replace(
        base,
        data=DataConfig(pairs=source, max_pairs=PAIRS),
        train=replace(base.train, seed=seed, tensorboard=False),
        optim=replace(base.optim, schedule="constant"),
        tokenizer=None if from_scratch else str(STAGES),
        text_encoder=None if from_scratch else str(STAGES),
    )
    if not quick:
        return run
    return replace(
        run,
        tokenizer_stage=replace(run.tokenizer_stage, train=replace(run.tokenizer_stage.train, steps=60)),
        text_encoder_stage=replace(run.text_encoder_stage, train=replace(run.text_encoder_stage.train, steps=30)),
        objective=replace(run.objective, cycle_start_step=15),
        train=replace(run.train, steps=30, checkpoint_every=1000, eval_every=1000),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def costs_left(run: ItitRun, out: Path) -> list[StageCost]:
    """The cost of each part of the demo in ``out``, in their order; nothing for what an earlier call has finished.

    Counted in steps of ITIT, its controls end after another 80 and an eighth of all, and the report after a further 10
    and a twentieth. That is rough, from one demo of 800 steps and one of 30 on two cores with AVX2.
    """
    tokenizer, text_encoder, encoding, network = run.costs()
    step = network.between(network.slow_from, network.slow_from + 1)
    trained = sum("loss" in record for record in read_metrics(out / "itit" / "metrics.jsonl"))
    left = network.between(min(trained, network.steps), network.steps)
    every = [
        replace(tokenizer, step_cost=_TOKENIZER_COST),
        replace(text_encoder, step_cost=_TEXT_ENCODER_COST),
        encoding,
        StageCost(name=NETWORK, steps=1, step_cost=left),
        StageCost(name=_SCORES, steps=1, step_cost=step * (50 + run.train.steps / 16)),
        StageCost(name=TITLES[LONGER], steps=1, step_cost=step * (30 + run.train.steps / 16)),
        StageCost(name=_REPORT, steps=1, step_cost=step * (10 + run.train.steps / 20)),
    ]
    made = {
        TOKENIZER: "itit/tokenizer",
        TEXT_ENCODER: "itit/text_encoder",
        ENCODING: "itit/encoded/texts/store.json",
        NETWORK: "itit/model",
        TITLES[LONGER]: f"{LONGER}/model",
    }
    return [
        replace(each, steps=0) if each.name in made and (out / made[each.name]).exists() else each for each in every
    ]


def _unit_expected(run: ItitRun) -> float:
    """Seconds on this machine for a cost of 1, from a few steps on a batch of random tokens."""
    tokenizer, text_encoder = (
        ImageTokenizer.from_pretrained(STAGES / "tokenizer"),
        TextEncoder.from_pretrained(STAGES / "text_encoder"),
    )
    objective = ItitObjective(run.model.build(tokenizer, text_encoder), text_encoder, run.objective)
    source = ScenesSource.from_spec(run.data.pairs)
    rows = range(run.train.batch_size)
    tokens_BN = tokenizer.encode(channels_first(source.images(rows)))
    ids_BL, valid_BL = text_encoder.tokenize([source.captions(row)[0] for row in rows], length=run.model.max_text_len)
    texts = {"ids_BL": ids_BL, "valid_BL": valid_BL, "features_BLF": text_encoder.features(ids_BL, valid_BL)}
    pairs = PairExamples(
        tokens_BN=tokens_BN.repeat(2, 1),
        **{name: part.repeat(2, *[1] * (part.ndim - 1)) for name, part in texts.items()},
    )
    streams = {"pairs": pairs, "images": ImageTokenExamples(tokens_BN=tokens_BN), "texts": TextExamples(**texts)}
    seconds = []
    with _threads(half_the_cores()):
        for step in range(_TIMED):
            began = time.monotonic()
            objective(Batch(rng=StepRNG(0, step), streams=streams), run.objective.cycle_start_step).total.backward()
            seconds.append(time.monotonic() - began)
    return float(np.median(seconds[1:])) / run.costs()[-1].between(run.slow_from, run.slow_from + 1)


def _controls(runs: list[ScoredRun], regression: float) -> dict[str, dict[str, float]]:
    """Accuracies of everything that ITIT is compared with, and the best of them."""
    found = {
        each.name: {key: each.metrics[key] for key in ("caption_accuracy", "image_accuracy")}
        for each in runs
        if each.name in TITLES
    }
    found["logistic_regression_on_pixels"] = {"caption_accuracy": regression}
    keys = ("caption_accuracy", "image_accuracy")
    return found | {"best": {key: max(each.get(key, 0.0) for each in found.values()) for key in keys}}


def _copy_tokenizers(source: Path, out: Path) -> None:
    """Copy the tokenizer and the text encoder of one run folder into another: each run folder has its own."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(source / part, out / part, dirs_exist_ok=True)


def reconstruction_accuracy(inputs: TrainingInputs, test: ScenesSource) -> float:
    """Accuracy of images that were only encoded and decoded: an upper bound for images generated as tokens."""
    tokenizer, items = inputs.tokenizer, np.arange(len(test))
    pixels_B3HW = channels_first(test.images(items, tokenizer.image_size))
    decoded = tokenizer.decode(tokenizer.encode(pixels_B3HW)).permute(0, 2, 3, 1).cpu().numpy()
    return image_accuracy(decoded, test.scenes(items)).exact


def describe_world(run: ItitRun, inputs: TrainingInputs) -> dict[str, int]:
    """Number of different scenes and of different token grids among the images of the training data."""
    scenes = ScenesSource.from_spec(run.data.pairs)
    sources = [subset.source for subset in (inputs.encoded.pairs, inputs.encoded.images)]
    stores = {source.folder: source for source in sources if isinstance(source, Store)}  # one, if all are pairs
    grids = np.concatenate([store.arrays["tokens"] for store in stores.values()])
    return {
        "distinct_scenes": len(set(scenes.scenes(np.arange(len(scenes))))),
        "images": len(grids),
        "distinct_grids": len(np.unique(grids, axis=0)),
    }


def _score(folder: Path, title: str, test: ScenesSource) -> ScoredRun:
    diptych = Diptych.from_pretrained(folder)
    found = evaluate(diptych, test, EvaluateConfig())
    last = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record][-1]
    metrics = {**found.metrics, "seconds": round(last["seconds"], 1), "steps": last["step"]}
    return ScoredRun(name=folder.name, title=title, metrics=metrics, evaluation=found, diptych=diptych)


def _print_table(runs: list[ScoredRun], regression: float) -> None:
    head = ("", "captions exact", "images exact", "CIDEr", "steps", "seconds")
    table = Table(*head, title="on held-out scenes")
    for each in runs:
        m = each.metrics
        accuracies = [f"{m['caption_accuracy']:.3f}", f"{m['image_accuracy']:.3f}"]
        table.add_row(each.title, *accuracies, f"{m['cider']:.0f}", f"{m['steps']:,}", f"{m['seconds']:.0f}")
    table.add_row("logistic regression on pixels", f"{regression:.3f}", "", "", "", "")
    Console().print(table)


# The report


def write_demo_report(out: Path, runs: list[ScoredRun], *, metrics: dict[str, Any], pairs: int, unpaired: int) -> Path:
    """Write ``out/report.html`` and return its path."""
    both = [each for each in runs if each.name in ("paired_only", "itit")]
    about_captions = "Scenes whose combination of all attributes no network has seen, with each one's caption."
    sections = [
        Section("One scene that neither has seen", [_one_scene(both)]),
        Section("What was learned", _learned(runs, metrics)),
        Section("Captions", [Text(about_captions), _captions(both)]),
        Section("Images", [Text("Images generated from the captions of such scenes."), _images(both)]),
        Section("Cycles", [block for each in both for block in _cycle(each)]),
        Section("Curves", _curves(out, runs)),
    ]
    alone, itit = (each.metrics for each in both)
    lead = (
        f"From {pairs} captioned images a network captions {alone['caption_accuracy']:.0%} of new scenes without a "
        f"mistake and generates {alone['image_accuracy']:.0%}; given {unpaired:,} images without captions and "
        f"{unpaired * CAPTIONS:,} texts without images as well, the same network captions "
        f"{itit['caption_accuracy']:.0%} and generates {itit['image_accuracy']:.0%}."
    )
    return write_report(out / "report.html", sections, title="Diptych: demo", lead=lead)


def _learned(runs: list[ScoredRun], metrics: dict[str, Any]) -> list[Any]:
    head = ["", "captions exact", "images exact", "CIDEr", "distinct captions", "steps", "seconds"]
    keys = ("caption_accuracy", "image_accuracy", "cider", "distinct_captions", "steps", "seconds")
    rows = [[each.title, *(each.metrics[key] for key in keys)] for each in runs]
    attribute_rows: list[list[str | float]] = [
        [f"{each.title}, {side}s", *(_mean_share(each.metrics, side, name) for name in _ATTRIBUTES)]
        for each in runs
        for side in ("caption", "image")
    ]
    about = (
        f"On {runs[0].metrics['images']:,} held-out scenes. Exact: all nine attributes are right, as read back by a "
        "parser and by a recognizer that learns nothing."
    )
    facts = {
        "images recognized after the tokenizer alone": metrics["tokenizer"]["image_accuracy"],
        "images to learn from": metrics["world"]["images"],
        "different grids of tokens among them": metrics["world"]["distinct_grids"],
        "different scenes in the world that they come from": metrics["world"]["distinct_scenes"],
        "seconds in all": metrics["seconds"],
    }
    digits = {"CIDEr": 0, "steps": 0, "seconds": 0}
    return [
        ReportTable(head=head, rows=rows, digits=digits, best=dict.fromkeys(head[1:4], "high"), caption=about),
        ReportTable(
            head=["right", *_ATTRIBUTES], rows=attribute_rows, caption="Share of things with each attribute right."
        ),
        Facts(items=facts),
    ]


def _mean_share(metrics: dict[str, Any], side: str, attribute: str) -> float:
    """Share of the things whose ``attribute`` is right."""
    return sum(metrics[f"{side}_{attribute}_{number}"] for number in (1, 2, 3)) / 3


def _one_scene(both: list[ScoredRun]) -> SideBySide:
    """A scene and its caption; what each network makes of either."""
    scenes = both[0].evaluation
    cells = [Captioned(image=scenes.real_BSS3[0], caption=scenes.references[0][0], label="scene")]
    for each in both:
        found = each.evaluation
        assert found.generated_BSS3 is not None
        cells.append(Captioned(image=found.generated_BSS3[0], caption=found.captions[0], label=each.title))
    return SideBySide([Example("its image generated from the caption, its caption generated from the image", cells)])


def _captions(both: list[ScoredRun]) -> SideBySide:
    scenes = both[0].evaluation
    examples = []
    for row in range(min(_SHOWN, len(scenes.keys))):
        scene = Captioned(image=scenes.real_BSS3[row], label="scene")
        captions = [Captioned(caption=each.evaluation.captions[row], label=each.title) for each in both]
        examples.append(Example(scenes.references[row][0], [scene, *captions]))
    return SideBySide(examples)


def _images(both: list[ScoredRun]) -> SideBySide:
    scenes = both[0].evaluation
    generated = [(each.evaluation.generated_BSS3, each.title) for each in both]
    examples = []
    for row in range(min(_SHOWN, len(scenes.keys))):
        scene = Captioned(image=scenes.real_BSS3[row], label="scene")
        images = [Captioned(image=pixels[row], label=title) for pixels, title in generated if pixels is not None]
        examples.append(Example(scenes.references[row][0], [scene, *images]))
    return SideBySide(examples)


def _cycle(run: ScoredRun) -> list[Any]:
    text = run.evaluation.references[0][0]
    steps = [step.shown for step in run.diptych.cycle(text=text, rounds=3)]
    return [Text(f"{run.title}: text to image to text, three times in a row."), Strip(steps)]


def _curves(out: Path, runs: list[ScoredRun]) -> list[Any]:
    records = {each.title: read_metrics(out / each.name / "metrics.jsonl") for each in runs}
    accuracy = [
        Panel(title="captions exact", keys=["caption_accuracy"]),
        Panel(title="images exact", keys=["image_accuracy"]),
    ]
    losses = [Panel(title=name, keys=[f"loss/{name}"]) for name in ("t2i", "i2t", "i2i", "t2i2t", "i2t2i")]
    variety = Panel(title="distinct captions in the cycle", keys=["measure/i2t2i/distinct_captions"])
    by_seconds, by_steps = curves(records, panels=accuracy, over="seconds"), curves(records, panels=accuracy)
    return [
        Figures(images=by_seconds, caption="Accuracy over seconds of training."),
        Figures(images=by_steps, caption="Accuracy over steps."),
        Figures(images=curves(records, panels=[*losses, variety], smooth=0.95), caption="Losses over steps."),
    ]
