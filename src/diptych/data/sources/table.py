"""Tables with a row per image or text: csv, tsv, json, jsonl, and parquet whose images are paths."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych.data.sources.columns import Columns, Found, captions_of, find_columns
from diptych.data.sources.decode import SUFFIXES as IMAGE_SUFFIXES
from diptych.data.sources.decode import ImageLimits, decode
from diptych.data.sources.text import read_text
from diptych.errors import UserError

SUFFIXES = frozenset({".csv", ".tsv", ".json", ".jsonl", ".ndjson"})
_SAMPLE = 64
"""Rows whose values decide what a column holds."""

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a csv, tsv, json or jsonl file, which may end in .gz. Raises UserError for a damaged or empty one."""
    suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        rows = _read_delimited(text, path, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        rows = _read_json(text, path)
    else:
        rows = _read_json_lines(text, path)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def _read_delimited(text: str, path: Path, delimiter: str) -> list[dict[str, Any]]:
    first = text.split("\n", 1)[0]
    if delimiter not in first:  # in many countries spreadsheets write ; into csv files
        delimiter = next((other for other in ";\t," if other in first), delimiter)
    try:
        return _read_cells(text, path, delimiter, csv.QUOTE_MINIMAL)
    except UserError:
        if delimiter != "\t":
            raise
        # Many tab-separated files hold quotes as plain characters.
        return _read_cells(text, path, delimiter, csv.QUOTE_NONE)


def _read_cells(text: str, path: Path, delimiter: str, quoting: Literal[0, 3]) -> list[dict[str, Any]]:
    # Strict: an unclosed quote would otherwise swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    rows: list[dict[str, Any]] = []
    start = 2
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header) or not all(map(_is_name, header)):
            shown = ", ".join(header)[:100]
            raise UserError(f"{path}: the first line must name every column, each once; it is {shown!r}")
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{path}: the row at line {start} has {len(cells)} cells and the header {len(header)}; "
                    "put quotes around cells that hold the delimiter"
                )
            if cells:
                rows.append(dict(zip(header, cells, strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: the row at line {start}: {error}; look for a quote that is not closed") from None
    return rows


def _is_name(cell: str) -> bool:
    """False for a cell that must be data: the first line of a table without a header."""
    return 0 < len(cell) <= 100 and Path(cell).suffix.lower() not in IMAGE_SUFFIXES


def _read_json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            row = _parse(line, f"{path}: line {number}")
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is not a JSON object {{...}}")
            rows.append(row)
    return rows


def _read_json(text: str, path: Path) -> list[dict[str, Any]]:
    """Rows of a list of objects or texts, an object that holds one such list, COCO captions or misnamed JSON lines."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _read_json_lines(text, path)
        raise UserError(f"{path}: is not JSON ({error})") from None
    if isinstance(document, dict):
        lists = {name: value for name, value in document.items() if _is_rows(value)}
        if {"images", "annotations"} <= lists.keys():
            return _join_coco(lists["images"], lists["annotations"], path)
        document = next(iter(lists.values())) if len(lists) == 1 else document
    if isinstance(document, list) and document and all(isinstance(item, str) for item in document):
        return [{"text": text} for text in document]
    if not _is_rows(document):
        raise UserError(f'{path}: must be a list of objects, e.g. [{{"file_name": ..., "caption": ...}}, ...]')
    return document


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _join_coco(images: list[dict], annotations: list[dict], path: Path) -> list[dict[str, Any]]:
    """Rows from COCO's two lists, which keep the captions apart from the images they belong to."""
    try:
        captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
        for annotation in annotations:
            captions[annotation["image_id"]].append(annotation["caption"])
        return [{"file_name": image["file_name"], "captions": captions[image["id"]]} for image in images]
    except KeyError as error:
        raise UserError(f"{path}: looks like COCO captions, but {error} is missing") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON ({error})") from None


def open_tables(
    paths: Sequence[Path], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "TableSource":
    """One source from one or more files with the same columns."""
    rows: list[dict[str, Any]] = []
    folders: list[Path] = []
    for path in paths:
        found = read_rows(path)
        rows += found
        folders += [path.parent] * len(found)
    return from_rows(rows, folders=folders, name=name, columns=columns, split=split, limits=limits)


def from_rows(
    rows: Sequence[Row], *, folders: Sequence[Path], name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "TableSource":
    """A source from rows in memory; the image path of row i is relative to ``folders[i]``. Raises UserError."""
    found = find_columns(sample_columns(rows), wanted=columns, source=name)
    if found.embedded:
        raise UserError(f"{name}: images inside a {Path(name).suffix} table are not read; store their paths")
    chosen = select_split([row.get(found.split) if found.split else None for row in rows], split, source=name)
    return TableSource([(folders[i], rows[i]) for i in chosen], name=name, found=found, limits=limits)


def sample_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Every column name with a few of its values, evenly spaced over the table."""
    names = dict.fromkeys(name for row in rows for name in row)
    step = max(1, len(rows) // _SAMPLE)
    return {str(name): [row.get(name) for row in rows[::step]] for name in names}


def select_split(values: Sequence[Any], split: str | None, *, source: str) -> list[int]:
    """Indices of the rows of ``split``, of all rows when it is None."""
    if split is None:
        return list(range(len(values)))
    chosen = [i for i, value in enumerate(values) if value == split]
    if not chosen:
        raise unknown_split(split, {str(value) for value in values if value is not None}, source=source)
    return chosen


def unknown_split(split: str, found: Iterable[str], *, source: str) -> UserError:
    listed = ", ".join(sorted(found)[:20])
    return UserError(
        f"{source}: no split {split!r}; " + (f"it has {listed}" if listed else "it is not divided in splits")
    )


class TableSource:
    """Rows in memory, images on disk.

    Rows that name the same image are one item with all their captions, so that a table with a row per caption cannot
    put one image into two streams.
    """

    def __init__(self, rows: Iterable[tuple[Path, Row]], *, name: str, found: Found, limits: ImageLimits):
        self.name = name
        self.has_images, self.has_captions = found.image is not None, bool(found.captions)
        self._limits = limits
        self._keys: list[str] = []
        self._captions: list[tuple[str, ...]] = []
        self._labels: list[str | None] = []
        at: dict[str, int] = {}
        for number, (folder, row) in enumerate(rows):
            captions = tuple(text for column in found.captions for text in captions_of(row.get(column)))
            if found.image is None and not captions:
                continue
            key = f"row {number}" if found.image is None else self._path(folder, row.get(found.image), number)
            i = at.setdefault(key, len(self._keys))
            if i < len(self._keys):
                self._captions[i] += captions
                continue
            self._keys.append(key)
            self._captions.append(captions)
            label = row.get(found.label) if found.label else None
            self._labels.append(None if label is None or label == "" else str(label))
        self._check_files()

    def _path(self, folder: Path, value: Any, number: int) -> str:
        if not isinstance(value, str) or not value:
            raise UserError(f"{self.name}: row {number} (counted from 0) has no image path, but {value!r}")
        return str(Path(folder, value))  # one name for `a.jpg` and `./a.jpg`

    def _check_files(self) -> None:
        """Raise UserError where none of the first images exists: paths are relative to another folder, then."""
        first = self._keys[:8]
        if not self._keys:
            raise UserError(f"{self.name}: holds no captions")
        if self.has_images and not any(os.path.exists(path) for path in first):
            raise UserError(f"{first[0]}: does not exist; image paths in {self.name} are relative to its folder")

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        return list(self._captions[i])

    def image(self, i: int, size: int) -> np.ndarray:
        if not self.has_images:
            raise UserError(f"{self.name}: holds no images")
        return decode(Path(self._keys[i]), size, limits=self._limits)

    def label(self, i: int) -> str | None:
        return self._labels[i]
