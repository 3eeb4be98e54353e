"""The run folder: the settings a run was made with, and its parts.

Who writes what, with the parts of an ITIT run; :data:`PARTS` has those of the other kinds. For what the files hold see
"The run folder" in docs/data.md::

    RUN/
        config.json                    write_config, here
        config.yaml                    cli/training.py
        tokenizer/, text_encoder/      itit/training.py, from tokenizers/
        image_encoder/                 itit/training.py, from encoders/image.py
        encoded/                       data/store.py
        stages/                        tokenizers/training.py: checkpoints and metrics of the stages before
        checkpoints/, best/            train/checkpoint.py
        metrics.jsonl, tensorboard/    train/logging.py
        samples/                       itit/validation.py
        budget.json, pace.json         train/pace.py
        model/, near_captions/         itit/training.py, at the end
        baselines.json                 eval/baselines.py
        report.html                    report/html.py
        evaluation/                    itit/evaluation.py and protocols.py, by `diptych evaluate`
        confidence/                    itit/confidence.py, by `diptych caption --calibrate`
"""

import json
import os
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

PARTS: dict[Kind, tuple[str, ...]] = {
    "itit": ("tokenizer", "text_encoder", "model"),
    "dual": ("model",),
    "classifier": ("encoder", "head"),
    "feature encoder": ("model",),
    "tokenizer": ("tokenizer",),
    "text encoder": ("text_encoder",),
}
"""Folders that a finished run of each kind holds."""
USES: dict[Kind, tuple[str, str]] = {
    "itit": ("neither captions nor generates images", "an itit recipe"),
    "dual": ("holds no dual encoder", "clip, siglip, slip or ito"),
    "classifier": ("holds no classifier", "uml-probe or uml-finetune"),
    "feature encoder": ("embeds no features", "uml-ssl"),
    "tokenizer": ("holds no image tokenizer of its own", "a vqgan recipe"),
    "text encoder": ("holds no text encoder of its own", "a text-encoder recipe"),
}
"""What only runs of each kind can do, said of another run, and the recipes of the kind."""
BASELINES = "baselines.json"
"""File of what a run is compared with, beside its own scores."""
CLASS_BASELINES = "baselines.safetensors"
"""File of the classifiers that a classifier is compared with."""
_LIBRARIES = ("diptych", "torch", "accelerate", "transformers", "datasets")


@runtime_checkable
class Run(Protocol):
    """A complete description of a training run: a dataclass of all its settings, and the method that carries it out."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[Kind]

    def fit(self, out: Path, *, recipe: str, budget: Any = None) -> object:
        """Trains into the run folder ``out``, from where an earlier call stopped. ``recipe`` is written down there.

        ``budget`` is a :class:`diptych.train.pace.Budget`, None where steps decide when the run ends.
        """


def write_config(out: Path, *, recipe: str, run: Run, data: str = "") -> None:
    """Writes ``config.json``: kind of run, recipe, all fields, library versions and, in a git checkout, the commit.

    ``data`` is what `check_parts` returned; the counts that it begins with are written down.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": recipe,
        "kind": run.kind,
        "run": asdict(run),
        "data": data.partition(";")[0],
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


def check_finished(run: Path, *wanted: Kind) -> Kind:
    """The kind of a finished run. Reads only its ``config.json``, so that a command can ask before it loads a library.

    A folder with the parts of the first kind passes too if its ``config.json``, if any, names no kind. Raises UserError
    for a run of a kind that is not ``wanted``, and for one that has not been trained to its end.
    """
    plain = not (run / "config.json").is_file() or "kind" not in read_config(run)
    kind = wanted[0] if plain and any((run / part).is_dir() for part in PARTS[wanted[0]]) else kind_of(run)
    if kind not in wanted:
        raise UserError(
            f"{run}: a run of kind {kind!r} {' and '.join(USES[each][0] for each in wanted)}: "
            f"give a run of {', or '.join(USES[each][1] for each in wanted)}"
        )
    for part in PARTS[kind]:
        if not (run / part).is_dir():
            recipe = "" if plain else f" {read_config(run).get('recipe', 'RECIPE')}"
            raise UserError(
                f"{run}: has no {part}/, so it is no finished run: repeat its `diptych fit{recipe}` to finish it"
            )
    return kind


def finished_part(name: str | os.PathLike[str], kind: Kind, part: str) -> Path | str:
    """``part`` of the run folder ``name``, or ``name`` itself where it is none. Raises as :func:`check_finished`."""
    try:
        is_run = "kind" in json.loads((Path(name) / "config.json").read_text())
    except (OSError, ValueError):
        is_run = False
    if not is_run:
        return str(name)
    check_finished(Path(name), kind)
    return Path(name) / part


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
