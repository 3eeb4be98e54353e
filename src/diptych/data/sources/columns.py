"""Which columns of a table hold the image, the captions and the label: as named, else by type and usual name."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diptych.data.sources.decode import is_image_path
from diptych.data.sources.text import clean
from diptych.errors import UserError

Role = Literal["image", "caption", "label"]
Table = Mapping[str, Sequence[Any]]

STEM_NAMES = frozenset({"image_id", "img_id", "image", "image_name", "filename", "file_name", "filepath"})
"""Columns that may name image files without their suffix."""
IMAGE_NAMES = frozenset(
    {"image", "img", "picture", "photo", "jpg", "png", "file", "path"}
    | {"file_name", "filename", "filepath", "file_path", "image_path", "image_file", "image_name", "img_path"}
)
CAPTION_NAMES = frozenset(
    {"caption", "text", "sentence", "description", "prompt", "raw", "txt", "alt", "alt_text", "alttext"}
    | {"captions", "texts", "sentences", "descriptions", "prompts"}
)
LABEL_NAMES = frozenset({"label", "labels", "class", "classes", "cls", "class_name", "classname", "category"})
SPLIT_NAMES = frozenset({"split", "partition"})
_NUMBERED = re.compile(r"(caption|text|sentence|description)s?_?\d+", re.IGNORECASE)
_NULLS = frozenset({"nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "N/A", "n/a", "#N/A"})
_INNER = ("raw", "caption", "text", "sentence")
"""Where a list of captions holds records instead of strings, the fields that may carry the text."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Columns:
    """Names of the columns (or fields) of a table. One that is not named is guessed; an empty name means none."""

    image: str | None = None
    """Name of the column of images: paths relative to the table, or the bytes of the images."""
    caption: str | None = None
    """Name of the column of captions or lists of captions; several names are separated by commas."""
    label: str | None = None
    """Name of the column of classes."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Found:
    """The columns that a source uses."""

    image: str | None
    captions: tuple[str, ...]
    label: str | None
    split: str | None
    embedded: bool
    """True where the image column holds the images themselves, not paths."""
    notes: tuple[str, ...] = ()
    """What the owner of the table may not expect of the choice, a line each."""


def find_columns(table: Table, *, wanted: Columns, source: str) -> Found:
    """The columns to use of a table of images, texts or both.

    Args:
        table: Every column name with a few of its values that are not missing, as `is_missing` says.
        wanted: Names given by the user.
        source: What messages call the table.

    Raises UserError, which lists the columns, where a named column is missing, where several qualify, and where there
    is neither an image nor a caption column.
    """
    image = find_image(table, wanted.image, source)
    found = find_fields(table, wanted=wanted, source=source, image=image)
    if image is not None:
        return found
    if not found.captions:
        for name in table:
            _refuse_addresses(table, name, source)
        raise UserError(
            f"{source}: no column of images or captions among {_listed(table)}; "
            "name one with --data.columns.image NAME or --data.columns.caption NAME"
        )
    strange = [
        f"no images: column {name!r} holds {str(values[0])[:60]!r}, which is no path of an image file"
        for name, values in table.items()
        if wanted.image is None
        and name not in found.captions
        and ((usual(name, IMAGE_NAMES) and values) or _all(values, _is_address))
    ]
    return replace(found, notes=(*found.notes, *strange))


def find_fields(table: Table, *, wanted: Columns, source: str, image: str | None = None) -> Found:
    """The columns of captions, label and split, given the one of the image, if any. Raises as `find_columns`."""
    captions = _find_captions(table, wanted.caption, image, source)
    label = _named(table, wanted.label, "label", source) if wanted.label else None
    if wanted.label is None:
        known = [name for name in table if usual(name, LABEL_NAMES) and name not in captions]
        label = _one(known, "label", table, source)
    split = next((name for name in table if usual(name, SPLIT_NAMES)), None)
    embedded = image is not None and _embedded(table[image])
    named = [name for name in captions if usual(name, CAPTION_NAMES) or _NUMBERED.fullmatch(name)]
    notes = []
    if wanted.caption is None and captions and not named:
        notes.append(f"captions are taken from {captions[0]!r}, the only column of sentences")
    return Found(image=image, captions=captions, label=label, split=split, embedded=embedded, notes=tuple(notes))


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, an empty text, or a list of nothing else."""
    if isinstance(value, list | tuple):
        return all(map(is_missing, value))
    return value is None or (isinstance(value, float) and value != value) or value == ""


def says_missing(value: Any) -> bool:
    """Whether a cell holds the word that some library writes for an empty one."""
    return isinstance(value, str) and value.strip() in _NULLS


def label_of(value: Any) -> str | None:
    """The label in a cell; whole floats, which libraries make of integers beside empty cells, as integers."""
    if is_missing(value) or says_missing(value):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip() or None


def captions_of(value: Any) -> list[str]:
    """The captions in a cell: a text, a list of texts, or a list of records such as {"raw": ...}.

    A list may also be written as text, as JSON or as Python and NumPy print it.
    """
    if isinstance(value, str):
        if value[:1] == "[" and (items := _written_list(value)) is not None:
            return captions_of(items)
        text = clean(value)
        return [text] if text and not says_missing(text) else []
    if isinstance(value, Mapping):
        return next((captions_of(value[name]) for name in _INNER if name in value), [])
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for item in value for text in captions_of(item)]
    return [] if is_missing(value) else [str(value)]


def _written_list(text: str) -> list[Any] | None:
    """The list of texts or records that ``text`` writes out; None where it writes none."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = _python_list(text)
    if isinstance(items, list) and all(isinstance(item, str | dict) or is_missing(item) for item in items):
        return items
    return None


def _python_list(text: str) -> list[Any] | None:
    if not text.rstrip().endswith("]"):
        return None
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
        strings = [token.string for token in tokens if token.type == tokenize.STRING]
        marks = {token.string for token in tokens if token.type == tokenize.OP}
        # NumPy puts no commas between texts, and Python would join them.
        if strings and marks <= set("[],") and all(token.type != tokenize.NAME for token in tokens):
            return [ast.literal_eval(string) for string in strings]
        return ast.literal_eval(text.strip())
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError, IndentationError):
        return None


def is_embedded(value: Any) -> bool:
    """Image bytes, or the {bytes, path} record of `datasets`."""
    return isinstance(value, bytes | bytearray) or (isinstance(value, Mapping) and "bytes" in value)


def find_image(table: Table, wanted: str | None, source: str) -> str | None:
    """The column of images: the named one, else one of bytes, else one of paths. Raises UserError."""
    if wanted == "":
        return None
    if wanted is not None:
        _refuse_addresses(table, _named(table, wanted, "image", source), source)
        return wanted
    pixels = [name for name, values in table.items() if _embedded(values)]
    paths = [name for name, values in table.items() if _holds(name, IMAGE_NAMES, values, is_image_path)]
    tiers = (
        [name for name in pixels if usual(name, IMAGE_NAMES)],
        pixels,
        [name for name in paths if usual(name, IMAGE_NAMES)],
        paths,
    )
    for tier in tiers:
        if tier:
            return _one(tier, "image", table, source)
    return None


def _refuse_addresses(table: Table, name: str | None, source: str) -> None:
    if name is not None and _all(table[name], _is_address):
        raise UserError(
            f"{source}: column {name!r} holds web addresses, which are not fetched; download the images first "
            "(e.g. with img2dataset) and give their paths"
        )


def _find_captions(table: Table, wanted: str | None, image: str | None, source: str) -> tuple[str, ...]:
    if wanted == "":
        return ()
    if wanted is not None:
        names = (wanted,) if wanted in table else tuple(part.strip() for part in wanted.split(","))
        return tuple(str(_named(table, name, "caption", source)) for name in names)
    texts = [name for name, values in table.items() if name != image and _holds(name, CAPTION_NAMES, values, _is_text)]
    known = [name for name in texts if usual(name, CAPTION_NAMES)]
    if not known and (numbered := [name for name in texts if _NUMBERED.fullmatch(name)]):
        return tuple(numbered)
    other = CAPTION_NAMES | IMAGE_NAMES | LABEL_NAMES | SPLIT_NAMES
    prose = [name for name in texts if not usual(name, other) and any(" " in text for text in captions_of(table[name]))]
    found = _one(known or prose, "caption", table, source)
    return (found,) if found is not None else ()


def _named(table: Table, name: str | None, role: Role, source: str) -> str | None:
    if name is not None and name not in table:
        raise UserError(f"{source}: no column {name!r} among {_listed(table)}; check --data.columns.{role}")
    return name


def _one(names: list[str], role: Role, table: Table, source: str) -> str | None:
    if len(names) > 1:
        raise UserError(
            f"{source}: {', '.join(names)} may each be the {role} column (columns: {_listed(table)}); "
            f"choose one with --data.columns.{role} NAME"
        )
    return names[0] if names else None


def _listed(table: Table) -> str:
    names = [str(name) for name in table]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def usual(name: str, names: frozenset[str]) -> bool:
    """Whether ``name`` is one of ``names``, whatever its case, with blanks or hyphens for underscores."""
    return name.strip().lower().replace(" ", "_").replace("-", "_") in names


def _all(values: Sequence[Any], test: Callable[[Any], bool]) -> bool:
    return bool(values) and all(map(test, values))


def _holds(name: str, names: frozenset[str], values: Sequence[Any], test: Callable[[Any], bool]) -> bool:
    """Whether a column is of a kind: all its values, or at least half of them where its name says so too."""
    return _all(values, test) or (usual(name, names) and 2 * sum(map(test, values)) >= max(1, len(values)))


def _embedded(values: Sequence[Any]) -> bool:
    return _all(values, is_embedded)


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower().startswith(("http://", "https://"))


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return not is_image_path(value) and not _is_address(value)
    if isinstance(value, Mapping):
        return any(isinstance(value.get(name), str) for name in _INNER)
    if not isinstance(value, list | tuple):
        return False
    present = [item for item in value if not is_missing(item)]
    return bool(present) and all(map(_is_text, present))
