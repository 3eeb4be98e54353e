"""How far a command has come, on stderr: one line that counts in a terminal, elsewhere a line every ten seconds."""

import math
import sys
import time


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
