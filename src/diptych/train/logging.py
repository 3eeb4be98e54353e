"""What a run writes and shows: metrics.jsonl, the same curves for TensorBoard, and the progress of a training.

:class:`RunLogger` is what the training loop talks to. It alone reads the numbers of a step from the device; it hands
them to :class:`MetricsLogger`, which writes files, and to :class:`ProgressDisplay`, which prints on stderr.
"""

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
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from diptych.errors import UserError
from diptych.report.html import score_line
from diptych.report.terminal import clock, in_words
from diptych.train.checkpoint import TrainProgress
from diptych.train.config import TrainConfig
from diptych.train.pace import Pace
from diptych.train.step import StepResult

Measured: TypeAlias = float | int | Image.Image
"""A number for metrics.jsonl and TensorBoard, or an image for TensorBoard alone."""


_MORE = 1.03
"""Factor by which a whole run must take longer than its training for both estimates to be printed."""
_BETWEEN = 10.0
"""Seconds between two validations that are printed."""
_WORTH_TELLING = 30.0
"""Shortest rest of a run, in seconds, for which an estimate is printed."""


@dataclass(frozen=True, slots=True)
class _Unread:
    """A finished step whose numbers may still be on the device."""

    progress: TrainProgress
    result: StepResult
    rows: int


class RunLogger:
    """Reads the numbers of finished steps from the device, and stops a run whose losses stay not finite.

    The main process also writes and shows the numbers. The others only count bad steps, so that all stop together.
    """

    def __init__(
        self,
        out: Path,
        *,
        title: str,
        start: TrainProgress,
        train: TrainConfig,
        pace: Pace,
        is_main: bool,
        epoch_steps: float | None = None,
    ) -> None:
        """``start`` is where the run continues, ``epoch_steps`` the number of steps of an epoch, if it is known.

        Raises UserError if ``out`` cannot be written to.
        """
        self._train, self._pace, self._said, self._epoch_steps = train, pace, -math.inf, epoch_steps
        self._quiet = train.quiet or pace.show is not None
        self.bad_steps = start.bad_steps
        """Updates in a row that were skipped, up to the last step that was read."""
        self._max_bad_steps = train.max_bad_steps
        self._step = start.step
        self._unread: list[_Unread] = []
        self._loss = float("nan")
        self._metrics, self._display = None, None
        if is_main:
            self._metrics = MetricsLogger(out, start=start.step, tensorboard=train.tensorboard, every=train.log_every)
            self._display = ProgressDisplay(title, start=start.step, quiet=self._quiet, epoch_steps=epoch_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._display:
            left = self._pace.stage_left(self._step, self._train.steps), None
            self._display.close(self._step, self._train.steps, loss=self._loss, left=left)
        if self._metrics:
            self._metrics.close()

    @property
    def steps_done(self) -> int:
        """Number of finished steps."""
        return self._step

    @property
    def evaluated(self) -> bool:
        """Whether the step that the run continues from has its evaluation, as far as this process knows."""
        return self._metrics is None or self._metrics.evaluated

    def say(self, text: str) -> None:
        """Print a line that stays, on the main process."""
        if self._display:
            self._display.say(text)

    def step(self, progress: TrainProgress, result: StepResult, *, rows: int) -> None:
        """Note the step that just finished, on ``rows`` rows over all processes. Its numbers are not read yet."""
        self._step = progress.step
        self._unread.append(_Unread(progress, result, rows))

    def read(self) -> None:
        """Read the numbers of all steps since the last time, in one transfer from the device; write and show them.

        Raises:
            UserError: ``max_bad_steps`` in a row were not finite; or the disk refused.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        numbers = iter(torch.cat([each.result.values for each in unread]).tolist())
        for each in unread:
            names, step = each.result.names, each.progress.step
            loss, *others, norm = islice(numbers, len(names) + 2)
            line = {"loss": loss} | dict(zip(names, others, strict=True))
            line |= {"lr": each.result.lr, "grad_norm": norm, "seconds": round(each.progress.seconds, 3)}
            if self._epoch_steps:
                line["epoch"] = round(step / self._epoch_steps, 4)
            good = math.isfinite(loss + norm)
            if self._metrics:
                self._metrics.write(step, line if good else line | {"skipped": True})
            self._count_bad(step, loss=loss, norm=norm, good=good)
            self._loss = loss
        self.flush()
        if self._display:
            rows, steps = sum(each.rows for each in unread), self._train.steps
            left = self._pace.stage_left(self._step, steps), self._pace.all_left(self._step, steps)
            self._display.update(self._step, steps, rows=rows, loss=self._loss, left=left)

    def estimate(self, step: int) -> None:
        """Print the time that is left, of this training and of its whole run, unless it is over in a moment."""
        stage = self._pace.stage_left(step, self._train.steps)
        everything = self._pace.all_left(step, self._train.steps)
        if self._display is None or self._quiet or stage is None or everything is None:
            return
        if everything > _WORTH_TELLING:
            more = f"; all: {in_words(everything)} left" if everything > _MORE * stage else ""
            epochs = f" ({self._train.steps / self._epoch_steps:.3g} epochs)" if self._epoch_steps else ""
            self._display.say(f"{self._train.steps:,} steps{epochs}, {in_words(stage)} left{more}")

    def evaluation(self, progress: TrainProgress, numbers: Mapping[str, Measured], *, seconds: float) -> None:
        """Write one line for all evaluations after a step, so that metrics.jsonl has all of them or none.

        ``seconds`` is the time that they took.
        """
        if self._metrics:
            line = {"seconds": round(progress.seconds, 3), **numbers, "evaluation_seconds": round(seconds, 3)}
            self._metrics.write(progress.step, line)
            self._metrics.flush()
        now = time.monotonic()
        due = now - self._said >= _BETWEEN or progress.step == self._train.steps
        if self._display and due and not self._quiet and (scores := score_line(numbers)):
            self._said = now
            self._display.say(f"step {progress.step:,}: validation {scores} ({in_words(seconds)})")

    def flush(self, *, to_disk: bool = False) -> None:
        """See :meth:`MetricsLogger.flush`."""
        if self._metrics:
            self._metrics.flush(to_disk=to_disk)

    def _count_bad(self, step: int, *, loss: float, norm: float, good: bool) -> None:
        self.bad_steps = 0 if good else self.bad_steps + 1
        if good:
            return
        problem = f"step {step}: the loss is {loss:g} and the norm of its gradient {norm:g}"
        if self.bad_steps < self._max_bad_steps:
            self.say(f"{problem}; this update is skipped ({self.bad_steps} of at most {self._max_bad_steps} in a row).")
            return
        self.flush()
        mend = "lower optim.lr or look at the data of these steps; the same command continues from the last checkpoint"
        raise UserError(f"{problem}; {self._max_bad_steps} updates in a row were skipped, so the run stops: {mend}.")


class MetricsLogger:
    """Appends to ``out/metrics.jsonl``, one JSON object per line, and to TensorBoard's event files if wanted.

    Lines of steps after ``start`` are dropped first. Numbers that JSON lacks (nan, infinity) become null.
    """

    def __init__(self, out: Path, *, start: int, tensorboard: bool, every: int) -> None:
        """TensorBoard gets the training curves at every ``every``-th step."""
        self.path, self.every = out / "metrics.jsonl", every
        self._board = _open_board(out / "tensorboard", start) if tensorboard else None
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.evaluated = truncate(self.path, start)
            """Whether step ``start`` has its evaluation."""
            self._file = self.path.open("a")
        except OSError as error:
            raise self._refused(error) from error

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Write one line: ``step`` and ``numbers``. Images among them go to TensorBoard alone."""
        images = {name: value for name, value in numbers.items() if isinstance(value, Image.Image)}
        numbers = {name: _plain(value) for name, value in numbers.items() if name not in images}
        line = json.dumps({"step": step} | numbers, allow_nan=False)
        try:
            self._file.write(line + "\n")
            # A point costs TensorBoard about 0.1 ms: training curves are thinned, evaluations are not.
            if self._board and ("loss" not in numbers or step % self.every == 0):
                for name, value in numbers.items():
                    if isinstance(value, float | int):
                        self._board.add_scalar(name, value, step)
                for name, image in images.items():
                    self._board.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        except OSError as error:
            raise self._refused(error) from error

    def flush(self, *, to_disk: bool = False) -> None:
        """Hand the lines to the operating system and, before a checkpoint relies on them, to the disk."""
        try:
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Close the files. Errors are dropped: all that matters was flushed before, and a full disk reported then."""
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
    """A value that JSON can hold."""
    if hasattr(value, "item"):  # a 0-d array or tensor of an evaluation
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_board(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes half a second, and only the main process needs it

    return SummaryWriter(str(folder), purge_step=start + 1)


class ProgressDisplay:
    """Shows steps, rates, loss and the time that is left, on stderr.

    A terminal gets a bar; elsewhere there is a line for the first step and one every ten seconds.
    """

    def __init__(self, title: str, *, start: int, quiet: bool, epoch_steps: float | None = None) -> None:
        self.title, self.start, self.quiet, self.epoch_steps = title, start, quiet, epoch_steps
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
            )
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(title, total=None, completed=start, note="")
            self._bar.start()

    def update(
        self, step: int, steps: int, *, rows: int, loss: float, left: tuple[float | None, float | None] = (None, None)
    ) -> None:
        """Show, if it is time to, that ``step`` of ``steps`` steps are finished.

        ``rows`` were trained on since the last call; ``left`` are the seconds for the rest of this training and of the
        whole run, as far as they are known.
        """
        self._rows += rows
        now = time.monotonic()
        if self.quiet or now - self._shown < (0.25 if self._bar else 10.0):
            return
        self._shown = now
        self._show(step, steps, loss=loss, left=left)

    def say(self, text: str) -> None:
        """Print a line that stays, also when quiet: something the user must know."""
        if self._bar:
            self._bar.console.print(f"{self.title}: {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def close(
        self, step: int, steps: int, *, loss: float, left: tuple[float | None, float | None] = (None, None)
    ) -> None:
        """Show that the run ended after ``step`` steps."""
        if not self.quiet and step > self.start:
            self._show(step, steps, loss=loss, left=left)
        if self._bar:
            self._bar.stop()

    def _show(self, step: int, steps: int, *, loss: float, left: tuple[float | None, float | None]) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        stage, everything = left
        note = f"{(step - self.start) / seconds:.3g} steps/s  {self._rows / seconds:.3g} rows/s  loss {loss:.4g}"
        if self.epoch_steps:
            note = f"epoch {step / self.epoch_steps:.3g}  {note}"
        if stage is not None:
            note += f"  {clock(stage)} left"
        if stage is not None and everything is not None and everything > _MORE * stage:
            note += f"  all: {in_words(everything)} left"
        if self._bar:
            self._bar.update(self._task, completed=step, total=steps, note=note)
        else:
            self.say(f"step {step}/{steps}  {note}")
