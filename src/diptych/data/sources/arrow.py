"""Parquet files and data sets of the hub, through the `datasets` library.

`datasets` keeps a memory-mapped copy of what it reads in its cache folder (HF_HOME). It can therefore read any row
without holding the others, and makes a new copy when the time or size of a file has changed.
"""

import glob
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.sources.columns import Columns, Found, captions_of, find_columns, is_missing, label_of
from diptych.data.sources.decode import ImageLimits, decode
from diptych.data.sources.table import (
    SAMPLE,
    TableSource,
    file_split_notes,
    from_rows,
    select_split,
    split_notes,
    unknown_split,
)
from diptych.errors import UserError


def open_parquet(
    paths: Sequence[Path], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "ArrowSource | TableSource":
    """One source from one or more parquet files. Raises UserError for a file that is damaged or holds no rows."""
    import datasets

    counts = [_rows_in(path) for path in paths]
    files = [glob.escape(str(path)) for path in paths]  # `datasets` takes every name for a pattern
    try:
        with _quietly():
            data = datasets.load_dataset("parquet", data_files=files, split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"{name}: is not readable as parquet ({_reason(error)})") from None
    tables = Tables(tuple(paths), tuple(accumulate(counts)))
    return _from_dataset(data, name=name, tables=tables, columns=columns, split=split, limits=limits)


@dataclass(frozen=True, slots=True)
class Tables:
    """The files that the rows of a data set come from."""

    paths: tuple[Path, ...]
    ends: tuple[int, ...]
    """Number of rows of each file and all before it."""

    def of(self, row: int) -> Path:
        """The file of a row."""
        return self.paths[bisect_right(self.ends, row)]


def _rows_in(path: Path) -> int:
    """Read the footer of a file alone: its errors name the file and the reason, which those of `datasets` do not."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not readable as parquet ({_reason(error)})") from None
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows


def open_hub(
    repository: str,
    *,
    config: str | None,
    revision: str | None,
    columns: Columns,
    split: str | None,
    limits: ImageLimits,
) -> "ArrowSource | TableSource":
    """A data set of the hub; the one kind of source that may use the network.

    Raises UserError for a data set that cannot be loaded, and for a split that is unknown or has to be chosen.
    """
    import datasets

    name = f"hub:{repository}"
    try:
        with _quietly():
            found = datasets.load_dataset(repository, config, revision=revision)
    # Offline, not found, gated, a script that is no longer run: each has its own class, and all have a clear message.
    except Exception as error:
        raise UserError(f"{name}: cannot be loaded ({_reason(error)})") from None
    if split is None and len(found) > 1:
        raise UserError(f"{name}: has the splits {', '.join(found)}; choose one, e.g. {name}:{next(iter(found))}")
    if split is not None and split not in found:
        raise unknown_split(split, found, source=name)
    data = found[split or next(iter(found))]
    tables = Tables((Path(),), (len(data),))
    return _from_dataset(data, name=name, tables=tables, columns=columns, split=None, limits=limits)


@contextmanager
def _quietly() -> Iterator[None]:
    """Turn the progress bars and log lines of `datasets` off; its errors come as exceptions too."""
    import datasets

    disabled, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not disabled:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split())[:300] or type(cause).__name__


def _from_dataset(
    data: Any, *, name: str, tables: Tables, columns: Columns, split: str | None, limits: ImageLimits
) -> "ArrowSource | TableSource":
    import datasets

    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):  # bytes, so that `limits` hold
            data = data.cast_column(column, datasets.Image(decode=False))
    if not len(data):
        raise UserError(f"{name}: holds no rows")
    found = find_columns(_sample(data), wanted=columns, source=name)
    if not found.embedded:
        kept = [each for each in (found.image, found.folder, *found.captions, found.label, found.split) if each]
        rows = data.select_columns(kept if found.image else data.column_names).to_list()
        for row in rows if found.label else ():
            row[found.label] = _class_name(data.features[found.label], row[found.label])
        wanted = Columns(image=found.image, caption=",".join(found.captions) or None, label=found.label)
        of = [tables.of(row) for row in range(len(rows))]
        return from_rows(rows, tables=of, name=name, columns=wanted, split=split, limits=limits)
    rows = np.arange(len(data))
    values = data[found.split][:] if found.split else [None] * len(data)
    if split is not None:
        rows = np.array(select_split(values, split, source=name))
        data = data.select(rows)
    notes = list(found.notes)
    if split is None:
        notes += split_notes(values) or file_split_notes(tables.paths)
    return ArrowSource(data, name=name, found=found, rows=rows, tables=tables, limits=limits, notes=notes)


def _sample(data: Any) -> dict[str, list[Any]]:
    """Every column name with values that are not missing, spread over the whole column: few or none may be filled."""
    import pyarrow.compute

    columns: dict[str, list[Any]] = {}
    for name in data.column_names:
        column = data.data.column(name)
        if pyarrow.types.is_string_view(column.type):  # which few functions of pyarrow take
            column = column.cast(pyarrow.large_string())
        present = pyarrow.compute.drop_null(column)
        if pyarrow.types.is_list(present.type) or pyarrow.types.is_large_list(present.type):
            present = present.filter(pyarrow.compute.greater(pyarrow.compute.list_value_length(present), 0))
        elif pyarrow.types.is_string(present.type) or pyarrow.types.is_large_string(present.type):
            present = present.filter(pyarrow.compute.greater(pyarrow.compute.binary_length(present), 0))
        # Of columns with images a few values are enough: each is as large as an image.
        count = SAMPLE if not pyarrow.types.is_struct(present.type) and not _is_binary(present.type) else 8
        chosen = present.take(np.arange(0, len(present), max(1, len(present) // count)))
        columns[name] = [value for value in chosen.to_pylist() if not is_missing(value)]
    return columns


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


class ArrowSource:
    """Rows that hold their images, read from the memory-mapped copy one by one."""

    def __init__(
        self,
        data: Any,
        *,
        name: str,
        found: Found,
        rows: np.ndarray,
        tables: Tables,
        limits: ImageLimits,
        notes: list[str],
    ):
        """``rows`` are the numbers that the rows of ``data`` have in all ``tables`` together."""
        self.name, self.notes = name, notes
        self._rows, self._tables = rows, tables
        self.has_images, self.has_captions = True, bool(found.captions)
        self._found, self._limits = found, limits
        self._images = data.select_columns([found.image])
        # Apart from the images: a row read together with its image would copy the image's bytes.
        self._captions = data.select_columns(list(found.captions)) if found.captions else None
        self._labels = data.select_columns([found.label]) if found.label else None

    def __len__(self) -> int:
        return len(self._images)

    def key(self, i: int) -> str:
        return f"row {range(len(self))[i]}"

    def captions(self, i: int) -> list[str]:
        row = self._captions[i] if self._captions is not None else {}
        return [text for column in self._found.captions for text in captions_of(row[column])]

    def file(self, i: int) -> Path | bytes:
        value = self._images[i][self._found.image]
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return self._tables.of(int(self._rows[i])).parent / value["path"]
        return bytes(data or b"")

    def image(self, i: int, size: int) -> np.ndarray:
        file = self.file(i)
        name = None if isinstance(file, Path) else f"{self.name}: {self.key(i)}"
        return decode(file, size, name=name, limits=self._limits)

    def label(self, i: int) -> str | None:
        if self._labels is None:
            return None
        return _class_name(self._labels.features[self._found.label], self._labels[i][self._found.label])


def _class_name(feature: Any, value: Any) -> str | None:
    """The label as text: of a ClassLabel the name of its number, None for -1, which means unlabelled."""
    if value is None or not hasattr(feature, "int2str"):
        return label_of(value)
    return feature.int2str(value) if value >= 0 else None
