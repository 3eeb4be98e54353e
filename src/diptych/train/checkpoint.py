"""Checkpoints: folders that appear whole or not at all, and that are believed only when their digests hold.

    checkpoints/step-00001000/model.safetensors, ema.safetensors, optimizer.safetensors, state.json, SHA256SUMS

SHA256SUMS has the format of the program of that name (`sha256sum -c SHA256SUMS`). Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.errors import UserError

SUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose digests held."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under ``name``, on the CPU; empty if there were none."""
        path = self.path / f"{name}.safetensors"
        return load_file(path) if path.exists() else {}


def save(
    folder: Path, *, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write the checkpoint of ``step`` into ``folder`` and remove all but the newest ``keep``.

    ``tensors`` holds one file's content per name, ``state`` what JSON can carry.

    Raises:
        UserError: the disk refused; older checkpoints are as they were.
    """
    path, draft = folder / f"step-{step:08d}", folder / f".draft-{step:08d}"
    try:
        _clear(folder)
        draft.mkdir(parents=True)
        for name, content in tensors.items():
            save_file({key: value.contiguous() for key, value in content.items()}, draft / f"{name}.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        files = sorted(draft.iterdir())
        (draft / SUMS).write_text("".join(f"{_digest(file)}  {file.name}\n" for file in files))
        for entry in (*files, draft / SUMS, draft):
            _sync(entry)
        if path.exists():  # a run may reach the step of a checkpoint that it did not continue from
            os.replace(path, folder / f".draft-old-{step:08d}")
        os.replace(draft, path)
        _sync(folder)
        _clear(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the checkpoint could not be written ({reason}); older ones are intact.") from error
    for _, old in _listed(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest sound checkpoint in ``folder`` (None if there is none at all) and a line about each damaged newer one.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    warnings = []
    listed = _listed(folder)
    for step, path in reversed(listed):
        if reason := _damage(path):
            warnings.append(f"{path} is damaged ({reason}); trying the checkpoint before it.")
            continue
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(path, step, state), warnings
    if listed:
        raise UserError(f"{folder}: every checkpoint is damaged; delete this folder to start from step 0.")
    return None, warnings


def forget_after(folder: Path, step: int) -> None:
    """Set aside the checkpoints after ``step`` (they were damaged), so that they never count among the newest."""
    for later, path in _listed(folder):
        if later > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def load_into(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], *, where: Path) -> None:
    """Copy ``saved`` over ``targets``, name by name.

    Raises:
        UserError: the names or shapes differ, that is, the checkpoint is of another model.
    """
    odd = sorted(targets.keys() ^ saved.keys())
    odd += [name for name in targets.keys() & saved.keys() if targets[name].shape != saved[name].shape]
    if odd:
        raise UserError(f"{where} holds another model: {odd[0]} is missing on one side or of another shape.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints, oldest first."""
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted((int(path.name[5:]), path) for path in found if path.name[5:].isdigit())


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        lines = (path / SUMS).read_text().splitlines()
        for digest, name in (line.split("  ", 1) for line in lines):
            if _digest(path / name) != digest:
                return f"{name} does not match its digest"
        return None if any(line.endswith("  state.json") for line in lines) else f"{SUMS} is incomplete"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or f"{SUMS} is unreadable"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    """Remove what interrupted writes left."""
    for draft in folder.glob(".draft-*") if folder.is_dir() else ():
        shutil.rmtree(draft, ignore_errors=True)
