"""What ITIT is compared with in the demo: three networks that learn from the pairs alone, and a classifier of pixels.

The networks train in a second process beside ITIT, because a network this small uses one core at most.

Shapes: B images, N image tokens, P numbers of an image's pixels.
"""

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.data.scenes import COLOURS, PLACES, SHAPES, Scene, ScenesSource, Thing, caption
from diptych.data.splits import Subset
from diptych.data.store import Store
from diptych.errors import Interrupted, UserError
from diptych.eval.probe import fit_linear, select_linear
from diptych.eval.scenes import SceneScore, caption_accuracy
from diptych.itit.data import TrainingInputs, open_data
from diptych.itit.evaluation import EvaluateConfig, evaluate
from diptych.itit.objective import ItitObjective
from diptych.itit.training import ItitRun
from diptych.report.figures import read_metrics
from diptych.rng import StepRNG
from diptych.run_folder import write_config
from diptych.train.checkpoint import BestWeights, Score
from diptych.train.loop import Hook
from diptych.train.pace import Pace

TITLES = {
    "paired_only": "pairs only",
    "paired_only_longer": "pairs only, same time",
    "paired_only_stopped": "pairs only, dropout, stopped early",
}
"""Name of each network in the report, by its run folder."""
LONGER = "paired_only_longer"
"""The network that trains for as many seconds as ITIT."""
_WATCHED = 100
"""Number of held-out scenes that are scored during training."""
_HELD_OUT = 10
"""One of so many pairs is held out to decide when to stop."""
_PATIENCE = 5
"""Number of evaluations without a lower loss on held-out pairs after which training stops."""
_STOP_EVERY = 40
"""Steps between two evaluations on held-out pairs."""
_L2 = (1.0, 0.1, 0.01)
"""Strengths of the l2 penalty that the regression chooses from."""


def train_watched(
    run: ItitRun,
    inputs: TrainingInputs,
    out: Path,
    test: ScenesSource,
    *,
    title: str,
    hooks: Sequence[Callable[[ItitObjective], Hook]] = (),
    best: BestWeights | None = None,
    pace: Pace | None = None,
) -> None:
    """Train in the run folder ``out``, with the accuracies on some held-out scenes in ``metrics.jsonl``.

    ``hooks`` are made for the objective; the network is saved with the weights of ``best``, if any.
    """
    write_config(out, recipe="itit-tiny", run=run)
    objective = run.build(inputs)
    diptych = run.diptych(objective, inputs)
    watched = replace(test, count=min(_WATCHED, test.count))

    def watch(step: int, module: nn.Module) -> dict[str, float]:
        found = evaluate(diptych, watched, EvaluateConfig(beams=1)).metrics
        return {name: found[name] for name in ("caption_accuracy", "image_accuracy", "text_drift", "image_drift")}

    watching = Hook(every=run.train.eval_every, run=watch)
    all_hooks = [watching, *(make(objective) for make in hooks)]
    run.train_on(inputs, objective, out, hooks=all_hooks, title=title, best=best, pace=pace)


# Beside ITIT


@contextmanager
def controls_beside(
    run: ItitRun, out: Path, test: ScenesSource, *, waiting: Callable[[float], object]
) -> Iterator[Callable[[str], Path]]:
    """Train the three networks of `TITLES` in a process of their own while the body of the `with` trains ITIT.

    The body is given a function that waits for a network by its name, and returns its folder. After the body, the
    network :data:`LONGER` trains on until it has trained for as many seconds as ITIT; ``waiting`` is told how many are
    missing. What the process prints is in ``controls.log``. A killed call can be repeated. Raises UserError if the
    process ends early.
    """
    if all((out / name / "model").is_dir() for name in TITLES):
        yield lambda name: out / name  # an earlier call has trained them
        return
    child = multiprocessing.get_context("spawn").Process(target=_train_controls, args=(run, out, test))
    child.start()

    def finished(name: str) -> Path:
        while not (out / name / "model").is_dir():
            if not child.is_alive():
                raise UserError(f"{out}/{name}: the control stopped early; run the same command again to go on")
            time.sleep(0.2)
        return out / name

    try:
        yield finished
        enough = seconds_trained(out / "itit")
        while child.is_alive() and (missing := enough - seconds_trained(out / LONGER)) > 0:
            waiting(missing)
            time.sleep(0.2)
    finally:
        child.terminate()
        child.join()
    for name in TITLES:
        finished(name)


def seconds_trained(folder: Path) -> float:
    """Seconds of training of a run folder, all calls together; 0 before its first step."""
    if not (folder / "metrics.jsonl").is_file():
        return 0.0
    return max(
        (record["seconds"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record), default=0.0
    )


def _train_controls(run: ItitRun, out: Path, test: ScenesSource) -> None:
    """Train the three one after another, the longer one until SIGTERM. Runs in the process of the controls."""
    with (out / "controls.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        _train_three(run, out, test)


def _train_three(run: ItitRun, out: Path, test: ScenesSource) -> None:
    torch.set_num_threads(half_the_cores())
    alone = replace(run, train=replace(run.train, quiet=True)).pairs_only()
    inputs = alone.prepare(out / "itit")
    train_watched(alone, inputs, out / "paired_only", test, title=TITLES["paired_only"])
    train_stopped(alone, inputs, out / "paired_only_stopped", test)
    folder, title = out / LONGER, TITLES[LONGER]
    if not folder.exists():
        shutil.copytree(out / "paired_only", folder, ignore=shutil.ignore_patterns("model"))
    try:
        endless = replace(alone, train=replace(alone.train, steps=1_000_000))
        train_watched(endless, inputs, folder, test, title=title)
    except Interrupted as stopped:
        ended = replace(alone, train=replace(alone.train, steps=stopped.step))
        train_watched(ended, inputs, folder, test, title=title)  # no step is left: it saves the model


def half_the_cores() -> int:
    """Number of threads of each of the two processes."""
    return max(1, (os.cpu_count() or 1) // 2)


# Stopped early


def train_stopped(alone: ItitRun, inputs: TrainingInputs, out: Path, test: ScenesSource) -> None:
    """Train with dropout on nine tenths of the pairs; keep the network with the lowest loss on the other tenth."""
    run = replace(alone, model=replace(alone.model, dropout=0.1))
    pairs = inputs.encoded.pairs
    items = np.asarray(pairs.items)
    kept = np.arange(len(items)) % _HELD_OUT != 0
    training = replace(inputs, encoded=replace(inputs.encoded, pairs=Subset(pairs.source, items[kept])))
    assert isinstance(pairs.source, Store)
    held = pairs.source.pairs(items[~kept], seed=0)
    rows = np.arange(held.size)
    examples = held.take(rows, np.zeros_like(rows))
    best = BestWeights(out / "best", patience=_PATIENCE)

    def hook(objective: ItitObjective) -> Hook:
        def validate(step: int, module: nn.Module) -> dict[str, float]:
            rng = StepRNG(0, 0)  # the same positions are hidden at each evaluation
            losses = {"t2i": objective.t2i_loss(examples, rng)} | objective.i2t_and_i2i_losses(examples, rng)
            loss = float(losses["t2i"] + losses["i2t"])
            best.offer(Score(step=step, value=-loss), objective)
            return {"held_out_loss": loss}

        return Hook(every=_STOP_EVERY, run=validate, stop_early=best.is_over)

    if not (out / "model").is_dir():
        train_watched(run, training, out, test, title=TITLES["paired_only_stopped"], hooks=[hook], best=best)


# A classifier of pixels


def regression_on_pixels(run: ItitRun, test: ScenesSource) -> SceneScore:
    """Captions of ``test`` by logistic regression on the raw pixels of the captioned images.

    For each quarter one classifier says the shape, or that there is nothing, and another one the colour. The caption
    names the three quarters that are least likely to be empty. The l2 penalty is the one of `_L2` that does best on a
    fifth of the pairs.
    """
    data = open_data(run.data).pairs
    source, items = data.source, np.arange(test.count)
    assert isinstance(source, ScenesSource)
    train_BP, test_BP = (_pixels(each, which) for each, which in ((source, np.asarray(data.items)), (test, items)))
    known = source.scenes(data.items)
    names = {"shape": ["", *SHAPES], "colour": ["", *COLOURS]}
    read = {
        (place, kind): _log_probabilities(train_BP, _labels(known, place, kind, names[kind]), test_BP, len(names[kind]))
        for place in PLACES
        for kind in names
    }
    captions = []
    for row in range(test.count):
        empty = {place: float(sum(read[place, kind][row, 0] for kind in names)) for place in PLACES}
        named = [place for place in PLACES if place in sorted(PLACES, key=empty.__getitem__)[: test.level]]
        values = {key: names[key[1]][1 + int(read[key][row, 1:].argmax())] for key in read}
        things = tuple(Thing(values[place, "shape"], values[place, "colour"]) for place in named)
        captions.append(caption(Scene(things, tuple(named))))
    return caption_accuracy(captions, test.scenes(items))


def _pixels(source: ScenesSource, items: np.ndarray) -> Float[Tensor, "B P"]:
    return torch.from_numpy(source.images(items)).flatten(1).float() / 255


def _labels(scenes: Sequence[Scene], place: str, kind: str, names: Sequence[str]) -> Int[Tensor, "B"]:
    """The shape or the colour in a quarter, as its index in ``names``; index 0 is an empty quarter."""
    things = [dict(zip(scene.places, scene.things, strict=True)).get(place) for scene in scenes]
    return torch.tensor([names.index(getattr(thing, kind) if thing else "") for thing in things])


def _log_probabilities(train_BP: Tensor, labels_B: Tensor, test_BP: Tensor, classes: int) -> Float[Tensor, "B C"]:
    """Log-probabilities of the classes of the test images by multinomial logistic regression."""
    fifth = len(train_BP) // 5
    held = train_BP[:fifth], labels_B[:fifth]
    best = select_linear(train_BP[fifth:], labels_B[fifth:], validation=held, classes=classes, grid=_L2)
    return fit_linear(train_BP, labels_B, classes=classes, l2=best.l2, start=best.linear)(test_BP).log_softmax(1)
