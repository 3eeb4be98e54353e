"""Trains the toy in a process of its own, to be killed or launched by torchrun: run_toy.py OUT SECONDS_PER_STEP STEPS...

Each of STEPS is one call of train with that many steps: the second and later ones resume.
"""

import sys
import time
from pathlib import Path

from toy_objective import Toy, config, optim, toy_batches

from diptych.train.loop import train


def main(out: str, pause: str, *steps: str) -> None:
    for count in steps:
        toy = Toy(late_from=3)
        toy.on_step = lambda step: time.sleep(float(pause))
        train(toy, toy_batches, out=Path(out), train=config(steps=int(count), checkpoint_every=4), optim=optim())


if __name__ == "__main__":
    main(*sys.argv[1:])
