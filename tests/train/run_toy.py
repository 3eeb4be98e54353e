"""Trains the toy in a process of its own, to be killed or launched by torchrun.

run_toy.py OUT SECONDS_PER_STEP STEPS...: each of STEPS is one call of train with that many steps. All but the first
resume, and have a hook for every second step.
"""

import sys
import time
from pathlib import Path

from toy_objective import Toy, config, optim, toy_batches

from diptych.train.loop import Hook, train


def main(out: str, pause: str, *steps: str) -> None:
    hooks: list[Hook] = []
    for count in steps:
        toy = Toy(late_from=3)
        toy.on_step = lambda step: time.sleep(float(pause))
        train(toy, toy_batches, out=Path(out), train=config(steps=int(count)), optim=optim(), hooks=hooks)
        hooks = [Hook(every=2, run=lambda step, objective: {"score": step})]


if __name__ == "__main__":
    main(*sys.argv[1:])
