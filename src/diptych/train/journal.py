"""What became of each step: read from the device, written to metrics.jsonl, shown, and counted when it was bad."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image

from diptych.errors import UserError
from diptych.train.config import TrainConfig
from diptych.train.metrics import MetricsLog
from diptych.train.progress import ProgressDisplay
from diptych.train.update import Outcome

Measured: TypeAlias = float | int | Image.Image
"""What an evaluation finds."""


@dataclass(slots=True)
class Standing:
    """Where a run stands; a checkpoint saves it beside the weights."""

    step: int = 0
    """Finished steps."""
    seconds: float = 0.0
    """Time trained, all invocations together."""
    bad_steps: int = 0
    """Updates skipped in a row."""


@dataclass(frozen=True, slots=True)
class _Finished:
    """A step whose numbers may still be on the device."""

    step: int
    outcome: Outcome
    rows: int
    seconds: float


class Journal:
    """Writes and shows on the first process; on the others it only counts bad steps, so that all stop together."""

    def __init__(self, out: Path, *, title: str, at: Standing, train: TrainConfig, first: bool) -> None:
        self.at, self.max_bad_steps = at, train.max_bad_steps
        self._unread: list[_Finished] = []
        self._loss = float("nan")
        self._log, self._display = None, None
        if first:
            self._log = MetricsLog(out, start=at.step, tensorboard=train.tensorboard, every=train.log_every)
            self._display = ProgressDisplay(title, start=at.step, steps=train.steps, quiet=train.quiet)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        if self._display:
            self._display.close(self.at.step, loss=self._loss)
        if self._log:
            self._log.close()

    @property
    def evaluated(self) -> bool:
        """Whether the step that the run continues from has its evaluation."""
        return self._log is None or self._log.evaluated

    def say(self, text: str) -> None:
        if self._display:
            self._display.say(text)

    def note(self, outcome: Outcome, *, rows: int) -> None:
        """The step that just finished, its numbers unread; ``rows`` over all processes."""
        self._unread.append(_Finished(self.at.step, outcome, rows, self.at.seconds))

    def read(self) -> None:
        """Bring the numbers of the steps since the last time from the device, and write them.

        Raises:
            UserError: ``max_bad_steps`` in a row were not finite; or the disk refused.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        numbers = iter(torch.cat([finished.outcome.values for finished in unread]).tolist())
        for finished in unread:
            names = finished.outcome.names
            loss, *terms, norm = islice(numbers, len(names) + 2)
            line = {"loss": loss} | {f"loss/{name}": term for name, term in zip(names, terms, strict=True)}
            line |= {"lr": finished.outcome.lr, "grad_norm": norm, "seconds": round(finished.seconds, 3)}
            good = math.isfinite(loss + norm)
            if self._log:
                self._log.write(finished.step, line if good else line | {"skipped": True})
            self._count_bad(finished.step, loss=loss, norm=norm, good=good)
            self._loss = loss
        self.flush()
        if self._display:
            self._display.update(self.at.step, rows=sum(finished.rows for finished in unread), loss=self._loss)

    def evaluation(self, numbers: Mapping[str, Measured], *, seconds: float) -> None:
        """One line for all hooks of a step: either all of its evaluation is there or nothing."""
        if self._log:
            self._log.write(
                self.at.step, {"seconds": round(self.at.seconds, 3), **numbers, "evaluation_seconds": round(seconds, 3)}
            )
            self._log.flush()

    def flush(self, *, to_disk: bool = False) -> None:
        if self._log:
            self._log.flush(to_disk=to_disk)

    def _count_bad(self, step: int, *, loss: float, norm: float, good: bool) -> None:
        self.at.bad_steps = 0 if good else self.at.bad_steps + 1
        if good:
            return
        told = f"step {step}: the loss is {loss:g} and the norm of its gradient {norm:g}"
        if self.at.bad_steps < self.max_bad_steps:
            self.say(f"{told}; this update is skipped ({self.at.bad_steps} of at most {self.max_bad_steps} in a row).")
            return
        self.flush()
        mend = "lower optim.lr or look at the data of these steps; the same command continues from the last checkpoint"
        raise UserError(f"{told}; {self.max_bad_steps} updates in a row were skipped, so the run stops: {mend}.")
