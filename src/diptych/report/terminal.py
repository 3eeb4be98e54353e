"""What a command prints: tables of scores on stdout, with the direction in which each is better, and progress on
stderr."""

import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Meaning:
    """How a score is read."""

    better: Literal["higher", "lower", ""] = ""
    """Which values are better; empty where neither is."""
    unit: Literal["%", "dB", "nats", ""] = ""
    """Unit; a share from 0 to 1 is written in %."""
    scale: str = ""
    """What else a reader needs, such as the value of chance."""

    def written(self, value: float) -> str:
        """A value with its unit."""
        if self.unit == "%":
            return f"{100 * value:.1f} %"
        number = f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"
        return f"{number} {self.unit}".rstrip()


_MEANINGS: tuple[tuple[str, Meaning], ...] = (
    (r"cider", Meaning("higher", scale="CIDEr-D x 100")),
    (r"rouge_l|bleu_\d", Meaning("higher", "%")),
    (r"(i2t2i/)?distinct_captions", Meaning("higher", "%", "different ones among all")),
    (r"distinct_\d", Meaning("higher", "%", "different n-grams among all")),
    (r"most_common_share", Meaning("lower", "%", "100 %: one caption for all")),
    (r"vocabulary", Meaning(scale="different words")),
    (r"mean_length", Meaning(scale="words")),
    (r"\w+_information_gain", Meaning("higher", "nats", "0: nothing learned")),
    (r"(text|image)_drift.*", Meaning(scale="above 0: mistakes that agree")),
    (r"frechet/.*|fid", Meaning("lower", scale="0: the same distribution")),
    (r"(retrieval/)?(\w+/r\d+|mean_r1)", Meaning("higher", "%")),
    (r"(retrieval/)?\w+/median_rank", Meaning("lower", scale="1: the right one is first")),
    (r"modality/distance", Meaning("lower", scale="0: one cloud, 2: opposite")),
    (r"modality/accuracy", Meaning("lower", "%", "50 %: images and texts mixed")),
    (r"linear_probe/l2", Meaning()),
    (r"psnr", Meaning("higher", "dB")),
    (r"used", Meaning("higher", "%", "codes that occur")),
    (r"perplexity", Meaning("higher", scale="codes in effective use")),
    (r"rfd", Meaning("lower", scale="0: the same distribution")),
    (r".*(accuracy|_readable|top\d+)", Meaning("higher", "%")),
    (r"loss", Meaning("lower", "nats")),
    (r"(caption|image)_[a-z]+(_\d+)?", Meaning("higher", "%")),
)


HEADLINES = (
    "cider",
    "distinct_captions",
    "caption_accuracy",
    "image_accuracy",
    "mean_r1",
    "image_to_text/r10",
    "text_to_image/r10",
    "retrieval/mean_r1",
    "retrieval/image_to_text/r10",
    "retrieval/text_to_image/r10",
    "accuracy",
    "loss",
)
"""Scores that are printed in the terminal, where a run has them."""


def meaning_of(name: str) -> Meaning:
    """The meaning of a score by its name in ``metrics.json`` or, after ``valid/`` or ``measure/``, in
    ``metrics.jsonl``."""
    name = name.removeprefix("valid/").removeprefix("measure/")
    return next((meaning for pattern, meaning in _MEANINGS if re.fullmatch(pattern, name)), Meaning())


def better(name: str, value: float, other: float) -> bool:
    """Whether ``value`` is better than ``other`` as the score ``name``; never, where neither direction is better."""
    direction = meaning_of(name).better
    return value > other if direction == "higher" else direction == "lower" and value < other


_COLUMNS = 4
"""Number of scores beside one another in a table of baselines, which has to fit into a terminal."""


def print_metrics(metrics: Mapping[str, float], *, title: str, notes: Sequence[str] = ()) -> None:
    """Prints a table on stdout, with the direction in which each is better, under a title and above the notes."""
    table = Table("metric", "value", "better", "")
    for name, value in metrics.items():
        meaning = meaning_of(name)
        table.add_row(name, meaning.written(value), meaning.better, meaning.scale)
    console = Console(highlight=False)
    console.print(title, style="bold", markup=False, soft_wrap=True)  # over a narrow table a path would be broken
    console.print(table)
    for note in notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)


def print_comparison(
    head: Sequence[str], rows: Sequence[Sequence[str | float | None]], *, title: str, notes: Sequence[str]
) -> None:
    """Prints a run beside its baselines on stdout, above the notes: the headline scores, the first one always.

    ``head`` names the scores. A row is a name and a value for each score.
    """
    console = Console(highlight=False)
    if rows:
        console.print(title, style="bold", markup=False, soft_wrap=True)
    shown = [place for place, name in enumerate(head) if place == 0 or name in HEADLINES][:_COLUMNS]
    if rows:
        table = Table("", *(head[place] for place in shown))
        for name, *values in rows:
            cells = [(head[place], values[place]) for place in shown]
            table.add_row(str(name), *("" if v is None else meaning_of(n).written(float(v)) for n, v in cells))
        console.print(table)
    for note in filter(None, notes):
        console.print(note, markup=False, soft_wrap=True)


class ProgressLine:
    """Called with the number of things that are done and that of all."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._began = time.monotonic()
        self._shown = self._began
        self._live = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._live and done >= total:
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # what follows takes its place
        elif done < total and now - self._shown >= (0.2 if self._live else 10.0):
            self._shown = now
            left = f", {clock((now - self._began) / done * (total - done))} left" if done else ""
            line = f"{self.title}: {done:,} of {total:,}{left}"
            print(
                f"\r{line}\033[K" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True
            )


_DONE = "done"
"""What a bar shows in the end, in the place of a part."""


class WholeBar:
    """One bar on stderr for all that a command does: what runs now, and the time that is left in all.

    A terminal gets a bar; elsewhere there is a line for each part and one every thirty seconds. What the body of the
    `with` prints in a terminal is shown above the bar.
    """

    def __init__(self, expected: float) -> None:
        """``expected`` is the number of seconds that the whole takes."""
        self._began, self._shown = time.monotonic(), -math.inf
        self._part, self._ends, self._later = "start", self._began, expected
        self._live: Live | None = None
        if sys.stderr.isatty():
            # Output that goes to a file while the bar is in the terminal stays in that file.
            console, both = Console(stderr=True), sys.stdout.isatty()
            self._live = Live(get_renderable=self._line, console=console, refresh_per_second=4, redirect_stdout=both)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.show(_DONE, left=0.0, later=0.0)
        if self._live:
            self._live.stop()

    def show(self, part: str, *, left: float, later: float) -> None:
        """``part`` runs and takes ``left`` more seconds; all that follows takes ``later`` seconds.

        Until the next call the bar counts ``left`` down, but not beyond 0.
        """
        now = time.monotonic()
        new, late = part != self._part, now - self._shown >= 30.0
        self._part, self._ends, self._later = part, now + left, later
        if self._live:
            if new:
                self._live.refresh()
        elif new or late:
            self._shown = now
            print(f"{self.share:4.0%}  {self._words()}", file=sys.stderr, flush=True)

    @property
    def left(self) -> float:
        """Seconds that are left in all."""
        return max(0.0, self._ends - time.monotonic()) + self._later

    @property
    def share(self) -> float:
        """Share of the time of this call that has passed, 0 to 1; 1 at the end alone."""
        if self._part == _DONE:
            return 1.0
        passed = time.monotonic() - self._began
        return min(0.99, passed / max(passed + self.left, 1e-9))

    def _words(self) -> str:
        return f"{in_words(self.left)} left in all: {self._part}" if self._part != _DONE else _DONE

    def _line(self) -> Table:
        line = Table.grid(padding=(0, 1), expand=False)
        bar = ProgressBar(total=1.0, completed=self.share, width=30)
        line.add_row(bar, f"{self.share:4.0%}", Text(self._words(), no_wrap=True, overflow="ellipsis"))
        return line


def clock(seconds: float) -> str:
    """``seconds`` as hours:minutes:seconds."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def in_words(seconds: float) -> str:
    """``seconds`` as one would say it: 40 s, 14 min, 2 h 5 min, 3 days."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60 / 24:.0f} days"
