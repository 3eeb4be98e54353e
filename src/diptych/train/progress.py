"""What a person sees while a run trains: a bar in a terminal, else a line for the first step and every ten seconds.

All on stderr.
"""

import math
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
