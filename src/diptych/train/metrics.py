"""metrics.jsonl, one JSON object per line and step, and the same curves for TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.errors import UserError


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
