"""`diptych fit RECIPE --help`: the options that matter first. `--help-all` lists every field of the recipe."""

import ast
import inspect
import itertools
import shutil
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

from tyro import MISSING

from diptych.run_folder import Kind, Run

FIRST: dict[Kind, tuple[str, ...]] = {
    "itit": (
        "data.pairs",
        "data.images",
        "data.texts",
        "data.valid",
        "data.max_pairs",
        "tokenizer",
        "text_encoder",
        "train.steps",
        "train.batch_size",
        "optim.lr",
    ),
    "dual": (
        "data.pairs",
        "data.valid",
        "start",
        "model.image_tower",
        "model.text_tower",
        "model.tune",
        "model.image_size",
        "train.steps",
        "train.batch_size",
        "optim.lr",
    ),
    "classifier": (
        "data.images",
        "data.texts",
        "data.valid",
        "data.shots",
        "encoder",
        "text_encoder",
        "objective.aux_weight",
        "patience",
        "train.steps",
        "optim.lr",
    ),
    "feature encoder": (
        "target",
        "others",
        "model.width",
        "model.depth",
        "train.steps",
        "train.batch_size",
        "optim.lr",
    ),
    "tokenizer": (
        "images",
        "stage.model.image_size",
        "stage.model.codebook_size",
        "stage.train.steps",
        "stage.train.batch_size",
        "stage.optim.lr",
    ),
    "text encoder": (
        "texts",
        "stage.model.vocab_size",
        "stage.max_text_len",
        "stage.train.steps",
        "stage.train.batch_size",
        "stage.optim.lr",
    ),
}
"""Fields of each kind of run that are listed by `--help`."""


def short_help(name: str, run: Run, *, about: str, always: dict[str, str]) -> str:
    """The help of a recipe on a page or two. ``always`` are the options that all recipes have, with their help."""
    width = min(shutil.get_terminal_size().columns, 120)
    rows = dict(always)
    for field in FIRST[run.kind]:
        text, value = _field(run, field)
        default = " (required)" if value is MISSING else f" (default: {value})" if value not in (None, "") else ""
        rows[f"--{field.replace('_', '-')}"] = text + default
    lines = [f"usage: diptych fit {name} [OPTIONS]", "", textwrap.dedent(f"    {about.strip()}"), ""]
    for flag, text in rows.items():
        lines += [flag, *textwrap.wrap(text, width - 6, initial_indent="      ", subsequent_indent="      ")]
    rest = _count(run) - len(FIRST[run.kind])
    return "\n".join([*lines, "", f"{rest} more options: diptych fit {name} --help-all", ""])


def _field(run: Any, path: str) -> tuple[str, Any]:
    """Help and value of a field with a dotted name."""
    *outer, last = path.split(".")
    for name in outer:
        run = getattr(run, name)
    return next(found for kind in type(run).__mro__ if (found := _documented(kind).get(last))), getattr(run, last)


def _documented(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass: by our convention its help."""
    if not is_dataclass(kind):
        return {}
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body if hasattr(node, "body"))
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def _count(run: Any) -> int:
    """Number of fields that are no dataclasses, at any depth."""
    values = [getattr(run, field.name) for field in fields(run)]
    return sum(_count(value) if is_dataclass(value) else 1 for value in values)
