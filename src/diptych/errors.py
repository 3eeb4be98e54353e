"""How a command ends before it is finished: by a mistake of the user, or by Ctrl-C and SIGTERM."""

import signal
import threading
import time
from types import FrameType


class UserError(ValueError):
    """A mistake the user can mend. The message says which file or value, what is wrong and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, cut to its first line; the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal ended the run, after its checkpoint was written. ``exit_code`` is what a shell expects: 130 or 143."""

    def __init__(self, number: int, *, step: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"Stopped by {name} after step {step}; a checkpoint is saved, the same command continues.")
        self.step = step
        self.exit_code = 128 + number


class SignalWatch:
    """A context that notes the first Ctrl-C or SIGTERM in ``pending`` (0: none yet); a second Ctrl-C quits at once.

    Python delivers signals to the main thread only. In another thread, nothing is watched.
    """

    _SAME_PRESS = 0.5  # seconds; launchers relay the terminal's Ctrl-C to children which have already seen it

    def __init__(self) -> None:
        self.pending = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Python's handler of a signal."""
        now = time.monotonic()
        if self.pending and number == signal.SIGINT and now - self._since > self._SAME_PRESS:
            raise KeyboardInterrupt
        if not self.pending:
            self.pending, self._since = number, now
