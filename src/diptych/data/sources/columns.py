"""Which columns of a table hold the image, the captions and the label: as named, else by type and usual name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from diptych.data.sources.decode import SUFFIXES
from diptych.data.sources.text import clean
from diptych.errors import UserError

Role = Literal["image", "caption", "label"]
Table = Mapping[str, Sequence[Any]]

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


def find_columns(table: Table, *, wanted: Columns, source: str) -> Found:
    """The columns to use of a table of images, texts or both.

    Args:
        table: Every column name with a few of its values.
        wanted: Names given by the user.
        source: What messages call the table.

    Raises UserError, which lists the columns, where a named column is missing, where several qualify, and where there
    is neither an image nor a caption column.
    """
    image = _find_image(table, wanted.image, source)
    found = find_fields(table, wanted=wanted, source=source, image=image)
    if image is None and not found.captions:
        for name in table:
            _refuse_addresses(table, name, source)
        raise UserError(
            f"{source}: no column of images or captions among {_listed(table)}; "
            "name one with --data.columns.image NAME or --data.columns.caption NAME"
        )
    return found


def find_fields(table: Table, *, wanted: Columns, source: str, image: str | None = None) -> Found:
    """The columns of captions, label and split, given the one of the image, if any. Raises as `find_columns`."""
    captions = _find_captions(table, wanted.caption, image, source)
    label = _named(table, wanted.label, "label", source) if wanted.label else None
    if wanted.label is None:
        usual = [name for name in table if _usual(name, LABEL_NAMES) and name not in captions]
        label = _one(usual, "label", table, source)
    split = next((name for name in table if _usual(name, SPLIT_NAMES)), None)
    embedded = image is not None and _embedded(table[image])
    return Found(image=image, captions=captions, label=label, split=split, embedded=embedded)


def captions_of(value: Any) -> list[str]:
    """The captions in a cell: a string, a list of strings, or a list of records such as {"raw": ...}."""
    if value is None:
        return []
    if isinstance(value, str):
        text = clean(value)
        return [text] if text else []
    if isinstance(value, Mapping):
        return next((captions_of(value[name]) for name in _INNER if name in value), [])
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for item in value for text in captions_of(item)]
    return captions_of(str(value))


def is_embedded(value: Any) -> bool:
    """Image bytes, or the {bytes, path} record of `datasets`."""
    return isinstance(value, bytes | bytearray) or (isinstance(value, Mapping) and "bytes" in value)


def _find_image(table: Table, wanted: str | None, source: str) -> str | None:
    if wanted == "":
        return None
    if wanted is not None:
        _refuse_addresses(table, _named(table, wanted, "image", source), source)
        return wanted
    pixels = [name for name, values in table.items() if _embedded(values)]
    paths = [name for name, values in table.items() if _all(values, _is_image_path)]
    tiers = (
        [name for name in pixels if _usual(name, IMAGE_NAMES)],
        pixels,
        [name for name in paths if _usual(name, IMAGE_NAMES)],
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
    texts = [name for name, values in table.items() if name != image and _all(values, _is_text)]
    usual = [name for name in texts if _usual(name, CAPTION_NAMES)]
    if not usual and (numbered := [name for name in texts if _NUMBERED.fullmatch(name)]):
        return tuple(numbered)
    other = CAPTION_NAMES | IMAGE_NAMES | LABEL_NAMES | SPLIT_NAMES
    prose = [
        name for name in texts if not _usual(name, other) and any(" " in text for text in captions_of(table[name]))
    ]
    found = _one(usual or prose, "caption", table, source)
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


def _usual(name: str, names: frozenset[str]) -> bool:
    return name.strip().lower().replace(" ", "_").replace("-", "_") in names


def _all(values: Sequence[Any], test: Any) -> bool:
    present = [value for value in values if value is not None and value != "" and value != []]
    return bool(present) and all(test(value) for value in present)


def _embedded(values: Sequence[Any]) -> bool:
    return _all(values, is_embedded)


def _is_image_path(value: Any) -> bool:
    return isinstance(value, str) and PurePath(value).suffix.lower() in SUFFIXES and "://" not in value


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return not _is_image_path(value) and not _is_address(value)
    if isinstance(value, Mapping):
        return any(isinstance(value.get(name), str) for name in _INNER)
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))
