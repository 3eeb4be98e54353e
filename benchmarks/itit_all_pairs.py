"""How fast ITIT learns the built-in scenes when it has every caption: the bound on what cycles can reach.

    python benchmarks/itit_all_pairs.py --out runs/all_pairs [--seconds 120] [--seed 0] [--stages RUN] [--json FILE]
                                        [--set model.width=96 optim.lr=2e-3 ...]

Trains `itit-tiny` on 36,000 pairs for a number of seconds of processor time on one core, then captions and generates
for held-out combinations and for unseen images of training combinations. ``--set`` changes any field of the recipe;
``--stages`` takes tokenizer and text encoder of an earlier run of this benchmark.
"""

import argparse
import ast
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.data.scenes import ScenesSource
from diptych.eval.scenes import image_accuracy
from diptych.itit.data import DataConfig, TrainingInputs
from diptych.itit.demo import CAPTIONS, describe_world, reconstruction_accuracy
from diptych.itit.evaluation import EvaluateConfig, evaluate
from diptych.itit.recipes import itit_tiny
from diptych.itit.training import ItitRun
from diptych.run_folder import write_json

IMAGES, TIMED_STEPS = 36_000, 25


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seconds", type=float, default=120.0, help="processor time of the training")
    parser.add_argument("--steps", type=int, help="number of steps, in place of --seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", help="run folder whose tokenizer and text encoder are used")
    parser.add_argument("--scored", type=int, default=500, help="number of images scored")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = settings(options.set, seed=options.seed, stages=options.stages)
    inputs = run.prepare(options.out)
    test = ScenesSource(level=3, split="test", seed=options.seed + 1, count=options.scored)
    items = np.arange(len(test))
    facts: dict[str, float] = {
        **describe_world(run, inputs),
        "recognizer_exact": image_accuracy(test.images(items, inputs.tokenizer.image_size), test.scenes(items)).exact,
        "tokenizer_exact": reconstruction_accuracy(inputs, test),
    }
    print(json.dumps(facts), flush=True)
    steps = options.steps or int(options.seconds / seconds_per_step(run, inputs, options.out / "timing"))
    run.train = replace(run.train, steps=steps, eval_every=10 * steps)
    objective = run.build(inputs)
    began = time.process_time()
    trained = run.train_on(inputs, objective, options.out / f"steps-{steps}")
    result: dict[str, Any] = {"set": options.set, "seed": options.seed, "steps": steps, "world": facts}
    result["seconds"] = round(time.process_time() - began, 1)
    with trained.eval_mode(objective):
        diptych = run.diptych(objective, inputs)
        for name, split, seed in (("held_out", "test", options.seed + 1), ("unseen", "train", options.seed + 1)):
            source = ScenesSource(level=3, split=split, seed=seed, count=options.scored)
            result[name] = evaluate(diptych, source, EvaluateConfig()).metrics
    print(json.dumps(result), flush=True)
    if options.json:
        write_json(options.json, result)
    found = result["held_out"]
    print(
        f"held out: captions {found['caption_accuracy']:.3f}, images {found['image_accuracy']:.3f} exact, "
        f"{steps} steps, {result['seconds']:.0f} s"
    )


def settings(changes: Sequence[str], *, seed: int, stages: str | None) -> ItitRun:
    """`itit-tiny` without cycles on all pairs, with the changes ``field.of.field=value``."""
    run = itit_tiny()
    run.data = DataConfig(pairs=f"scenes:?level=3&seed={seed}&captions={CAPTIONS}&count={IMAGES}")
    run.objective = replace(run.objective, texts="off", images="off")
    run.train = replace(run.train, seed=seed, device="cpu", precision="fp32", quiet=True, tensorboard=False)
    run.tokenizer = run.text_encoder = stages
    changed(run, changes)
    return run


def changed(run: ItitRun, changes: Sequence[str]) -> None:
    """Apply the changes ``field.of.field=value`` to ``run`` in place."""
    for change in changes:
        path, _, text = change.partition("=")
        *owners, name = path.split(".")
        owner: Any = run
        for part in owners:
            owner = getattr(owner, part)
        getattr(owner, name)  # a misspelt field raises here
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        setattr(owner, name, value)


def seconds_per_step(run: ItitRun, inputs: TrainingInputs, out: Path) -> float:
    """Processor time of a step, measured on a network that is thrown away."""
    trial = replace(run, train=replace(run.train, steps=TIMED_STEPS, eval_every=10 * TIMED_STEPS))
    objective = trial.build(inputs)
    began = time.process_time()
    trial.train_on(inputs, objective, out)
    return (time.process_time() - began) / TIMED_STEPS


if __name__ == "__main__":
    main()
