"""The run folder: what a run was told, and what is kept of it."""

import json
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from diptych.errors import UserError
from diptych.io import write_bytes

_LIBRARIES = ("diptych", "torch", "accelerate", "transformers", "diffusers", "datasets")


def write_config(out: Path, *, recipe: str, run: Any, generation: dict[str, Any] | None = None) -> None:
    """``config.json``: the recipe, all its fields, library versions and, in a git checkout of Diptych, its commit."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": recipe,
        "run": asdict(run),
        "generation": generation or {},
        "versions": {name: version(name) for name in _LIBRARIES},
        "commit": _commit(),
    }
    write_json(out / "config.json", content)


def read_config(run: Path) -> dict[str, Any]:
    """Raises UserError when ``run`` is no run folder."""
    try:
        return json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{run}: no run folder (it has no config.json)") from None
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{run}/config.json: not readable ({error}): copy it again") from error


Kind = Literal["itit", "dual", "classifier", "feature encoder", "tokenizer", "text encoder"]
_KINDS: dict[str, Kind] = {"vqgan": "tokenizer", "text": "text encoder", "itit": "itit", "uml": "classifier"}
_KINDS |= dict.fromkeys(("clip", "siglip", "slip", "ito"), "dual")
_KINDS["uml-ssl"] = "feature encoder"


def kind_of(run: Path) -> Kind:
    """What a run folder holds, by the family its recipe belongs to. Raises UserError when it is no run folder."""
    recipe = str(read_config(run).get("recipe"))
    kind = _KINDS.get(recipe) or _KINDS.get(recipe.split("-")[0])
    if kind is None:
        raise UserError(f"{run}: made by the unknown recipe {recipe!r}: use the version of Diptych that made it")
    return kind


def save_model(model: Any, folder: Path) -> None:
    """Whatever ``model.save_pretrained`` writes. The folder appears whole and takes the place of an older one."""
    fresh = folder.with_name(f".{folder.name}.fresh")
    model.save_pretrained(fresh)
    if folder.exists():
        shutil.rmtree(folder)
    fresh.rename(folder)


def write_json(path: Path, value: Any) -> None:
    """The file appears whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, default=str) + "\n").encode())


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "log", "-1", "--format=%H", "--", "."], cwd=here, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def part_of(name: str, part: str) -> str:
    """``name`` may be an earlier run: then its ``part`` (``tokenizer``, ``text_encoder``) is meant."""
    inside = Path(name) / part
    return str(inside) if inside.is_dir() else name
