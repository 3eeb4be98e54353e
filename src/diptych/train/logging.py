"""metrics.jsonl, one JSON object per line and step, and the same curves for TensorBoard."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diptych.errors import UserError
from diptych.train.config import TrainConfig
from diptych.train.step import StepResult


class MetricsLog:
    """Appends to ``out/metrics.jsonl`` from step ``start`` on; lines of later steps are dropped first.

    Numbers that JSON lacks (nan, infinity) become null. ``evaluated`` says whether step ``start`` has its evaluation.
    """

    def __init__(self, out: Path, *, start: int, tensorboard: bool, every: int) -> None:
        self.path, self.every = out / "metrics.jsonl", every
        self._board = _open_board(out / "tensorboard", start) if tensorboard else None
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.evaluated = truncate(self.path, start)
            self._file = self.path.open("a")
        except OSError as error:
            raise self._refused(error) from error

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """One line: ``step`` and ``numbers``. Pictures among them go to TensorBoard alone."""
        pictures = {name: value for name, value in numbers.items() if isinstance(value, Image.Image)}
        numbers = {name: _plain(value) for name, value in numbers.items() if name not in pictures}
        line = json.dumps({"step": step} | numbers, allow_nan=False)
        try:
            self._file.write(line + "\n")
            # A point costs TensorBoard about 0.1 ms: training curves are thinned, evaluations are not.
            if self._board and ("loss" not in numbers or step % self.every == 0):
                for name, value in numbers.items():
                    if isinstance(value, float | int):
                        self._board.add_scalar(name, value, step)
                for name, picture in pictures.items():
                    self._board.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        except OSError as error:
            raise self._refused(error) from error

    def flush(self, *, to_disk: bool = False) -> None:
        """Hand the lines to the operating system and, before a checkpoint counts on them, to the disk."""
        try:
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """All that counts was flushed before: a disk that refuses the rest has already been reported."""
        with suppress(OSError):
            self._file.close()
        if self._board:
            with suppress(OSError):
                self._board.close()

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self.path} could not be written ({error.strerror}); make room and run the command again.")


def truncate(path: Path, start: int) -> bool:
    """Keep only whole lines of steps up to ``start``, so that a resumed run writes each step once.

    Returns whether ``start`` has been evaluated: whether one of its lines is not of training.
    """
    if not path.exists():
        return False
    draft, evaluated = path.with_suffix(".draft"), False
    with path.open() as old, draft.open("w") as new:
        for text in old:
            try:
                line = json.loads(text)
                step, trained = line["step"], "loss" in line
            except (ValueError, TypeError, KeyError):
                continue  # the torn last line of a killed process
            if step <= start:
                new.write(text if text.endswith("\n") else text + "\n")
                evaluated = evaluated or (step == start and not trained)
    os.replace(draft, path)
    return evaluated


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a 0-d array or tensor: no reason to lose an evaluation
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_board(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # half a second, and of no use to the other processes

    return SummaryWriter(str(folder), purge_step=start + 1)


# JOINED train.progress
#| What a person sees while a run trains: a bar in a terminal, else a line for the first step and every ten seconds.
#|
#| All on stderr.


class ProgressDisplay:
    """Shows steps, rates, loss and the time that is left."""

    def __init__(self, title: str, *, start: int, steps: int, quiet: bool) -> None:
        self.title, self.start, self.steps, self.quiet = title, start, steps, quiet
        self._began = time.monotonic()
        self._shown = -math.inf
        self._rows = 0
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(title, total=steps, completed=start, note="")
            self._bar.start()

    def update(self, step: int, *, rows: int, loss: float) -> None:
        """``step`` steps are finished; ``rows`` were trained on since the last call."""
        self._rows += rows
        now = time.monotonic()
        if self.quiet or now - self._shown < (0.25 if self._bar else 10.0):
            return
        self._shown = now
        self._show(step, loss=loss, seconds=now - self._began)

    def say(self, text: str) -> None:
        """A line that stays, also when quiet: something the person must know."""
        if self._bar:
            self._bar.console.print(f"{self.title}: {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def close(self, step: int, *, loss: float) -> None:
        """The run ended after ``step`` steps."""
        if not self.quiet and step > self.start:
            self._show(step, loss=loss, seconds=time.monotonic() - self._began)
        if self._bar:
            self._bar.stop()

    def _show(self, step: int, *, loss: float, seconds: float) -> None:
        speed = (step - self.start) / max(seconds, 1e-9)
        note = f"{speed:.3g} steps/s  {self._rows / max(seconds, 1e-9):.3g} rows/s  loss {loss:.4g}"
        if self._bar:
            self._bar.update(self._task, completed=step, note=note)
        else:
            left = _clock((self.steps - step) / speed) if speed else "?"
            self.say(f"step {step}/{self.steps}  {note}  {left} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


# JOINED train.journal
#| What became of each step: read from the device, written to metrics.jsonl, shown, and counted when it was bad.


Measured: TypeAlias = float | int | Image.Image
"""What an evaluation finds."""


@dataclass(slots=True)
class TrainProgress:
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
    outcome: StepResult
    rows: int
    seconds: float


class MetricsLogger:
    """Writes and shows on the first process; on the others it only counts bad steps, so that all stop together."""

    def __init__(self, out: Path, *, title: str, at: TrainProgress, train: TrainConfig, first: bool) -> None:
        self.at, self.max_bad_steps = at, train.max_bad_steps
        self._unread: list[_Finished] = []
        self._loss = float("nan")
        self._log, self._display = None, None
        if first:
            self._log = MetricsLog(out, start=at.step, tensorboard=train.tensorboard, every=train.log_every)
            self._display = ProgressDisplay(title, start=at.step, steps=train.steps, quiet=train.quiet)

    def __enter__(self) -> "MetricsLogger":
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

    def note(self, outcome: StepResult, *, rows: int) -> None:
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
