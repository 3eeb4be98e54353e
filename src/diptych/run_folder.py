"""The run folder: the settings a run was made with, and its parts."""

import json
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from diptych.errors import UserError
from diptych.io import replace_folder, write_bytes

Kind = Literal["itit", "dual", "classifier", "feature encoder", "tokenizer", "text encoder"]
"""What a run folder holds, which decides what the commands can do with it."""

_LIBRARIES = ("diptych", "torch", "accelerate", "transformers", "datasets")


@runtime_checkable
class Run(Protocol):
    """A complete description of a training run: a dataclass of all its settings, and the method that carries it out."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[Kind]

    def fit(self, out: Path, *, recipe: str) -> object:
        """Trains into the run folder ``out``, from where an earlier call stopped. ``recipe`` is written down there."""


def write_config(out: Path, *, recipe: str, run: Run) -> None:
    """Writes ``config.json``: kind of run, recipe, all fields, library versions and, in a git checkout, the commit."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": recipe,
        "kind": run.kind,
        "run": asdict(run),
        "versions": {name: version(name) for name in _LIBRARIES},
        "commit": _commit(),
    }
    write_json(out / "config.json", content)


def read_config(run: Path) -> dict[str, Any]:
    """What ``config.json`` holds. Raises UserError when ``run`` is no run folder or the file is damaged."""
    try:
        config = json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{run}: no run folder (it has no config.json)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{run}/config.json: not readable ({error}): copy it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{run}/config.json: not the settings of a run: copy it again")
    return config


def kind_of(run: Path) -> Kind:
    """What a run folder holds. Raises UserError when it is no run folder, or does not say what it holds."""
    kind, kinds = read_config(run).get("kind"), get_args(Kind)
    if kind is None:
        wanted = ", ".join(f'"{name}"' for name in kinds)
        raise UserError(f'{run}/config.json: an older Diptych left out "kind": add it with one of the values {wanted}')
    if kind not in kinds:
        raise UserError(f"{run}: a run of the unknown kind {kind!r}: use the version of Diptych that made it")
    return kind


def save_model(model: Any, folder: Path) -> None:
    """Writes what ``model.save_pretrained`` writes. The folder appears whole and takes the place of an older one."""
    fresh = folder.with_name(f".{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)  # what a killed process left there
    model.save_pretrained(fresh)
    replace_folder(fresh, folder)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON; what JSON does not know becomes its ``str``. The file appears whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, default=str) + "\n").encode())


def part_of(name: str, part: str) -> str:
    """The folder ``part`` of the run folder ``name`` (``tokenizer``, ``text_encoder``, ``model``), else ``name``."""
    inside = Path(name) / part
    return str(inside) if inside.is_dir() else name


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "log", "-1", "--format=%H", "--", "."], cwd=here, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
