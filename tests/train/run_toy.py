"""Trains the toy in a process of its own, to be killed or launched by torchrun.

run_toy.py OUT STEPS...: each of STEPS is one call of train with that many steps. All but the first resume, and have a
hook for every second step.
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from toy_objective import Toy, config, optim, toy_batches

from diptych.train.loop import Hook, train


def total(module: nn.Module) -> float:
    """The sum of all weights, whole ones."""
    return sum(float(parameter.detach().double().sum()) for parameter in module.parameters())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int, nargs="+")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds per step")
    parser.add_argument("--late-from", type=int, default=3, help="step at which the toy's second term starts")
    parser.add_argument("--may-skip-parameters", type=int, help="overrides what the toy says of itself")
    parser.add_argument("--die-at", type=int, help="step at which the second process is killed")
    parser.add_argument("--write-late", action="store_true", help="shards wait for the step after their checkpoint")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--settings", type=json.loads, default={}, help="other fields of the training, as JSON")
    parser.add_argument(
        "--runs", type=json.loads, default={".": {}}, help="several runs: folder in OUT -> other options, as JSON"
    )
    options = parser.parse_args(arguments)
    for name, changes in options.runs.items():
        run(name, argparse.Namespace(**vars(options) | changes, folder=options.out / name))


def run(name: str, options: argparse.Namespace) -> None:
    hooks: list[Hook] = []
    begun = [0]

    def write_late(writer: HuggingFaceStorageWriter, plan: Any, planner: Any) -> Any:
        """Write what belongs to a checkpoint once the next step is being made: the training has not waited."""
        saved, waited = int(str(writer.path).rpartition("-")[2]), 0.0
        while begun[0] <= saved < options.steps[-1]:
            time.sleep(0.01)
            waited += 0.01
            assert waited < 60, "the training waits for its checkpoint"
        return write(writer, plan, planner)

    write = HuggingFaceStorageWriter.write_data
    if options.write_late:
        HuggingFaceStorageWriter.write_data = write_late

    def on_step(step: int) -> None:
        time.sleep(options.pause)
        if step == options.die_at and os.environ.get("RANK") == "1":
            (options.folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        begun[0] = step + 1

    for count in options.steps:
        toy = Toy(late_from=options.late_from)
        if options.may_skip_parameters is not None:
            toy.may_skip_parameters = bool(options.may_skip_parameters)
        toy.on_step = on_step
        result = train(
            toy,
            toy_batches,
            out=options.folder,
            train=config(steps=count, **options.settings),
            optim=optim(name=options.optimizer),
            hooks=hooks,
        )
        hooks = [Hook(every=2, run=lambda step, objective: {"score": step, "sum": total(objective)})]
        with result.eval_mode(toy):
            averaged = total(toy)
        print(f"SUMS {name} {total(toy):.6f} {averaged:.6f}", flush=True)  # of every process


if __name__ == "__main__":
    main()
