"""Parquet files and data sets of the hub, through the `datasets` library.

`datasets` keeps a memory-mapped copy of what it reads in its cache folder (HF_HOME). It can therefore read any row
without holding the others, and makes a new copy when the time or size of a file has changed.
"""

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.sources.columns import Columns, Found, captions_of, find_columns
from diptych.data.sources.decode import ImageLimits, decode
from diptych.data.sources.table import TableSource, from_rows, sample_columns, select_split, unknown_split
from diptych.errors import UserError


def open_parquet(
    paths: Sequence[Path], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "ArrowSource | TableSource":
    """One source from one or more parquet files. Raises UserError for a file that is damaged or holds no rows."""
    import datasets

    for path in paths:
        _check(path)
    files = [glob.escape(str(path)) for path in paths]  # `datasets` takes every name for a pattern
    try:
        with _quietly():
            data = datasets.load_dataset("parquet", data_files=files, split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"{name}: is not readable as parquet ({_reason(error)})") from None
    return _from_dataset(data, name=name, folder=paths[0].parent, columns=columns, split=split, limits=limits)


def _check(path: Path) -> None:
    """Read the footer of a file alone: its errors name the file and the reason, which those of `datasets` do not."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not readable as parquet ({_reason(error)})") from None
    if not rows:
        raise UserError(f"{path}: holds no rows")


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
    return _from_dataset(data, name=name, folder=Path(), columns=columns, split=None, limits=limits)


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
    data: Any, *, name: str, folder: Path, columns: Columns, split: str | None, limits: ImageLimits
) -> "ArrowSource | TableSource":
    import datasets

    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):  # bytes, so that `limits` hold
            data = data.cast_column(column, datasets.Image(decode=False))
    if not len(data):
        raise UserError(f"{name}: holds no rows")
    rows = data.select(range(min(len(data), 8))).to_list()
    found = find_columns(sample_columns(rows), wanted=columns, source=name)
    if not found.embedded:
        kept = [column for column in (found.image, *found.captions, found.label, found.split) if column]
        rows = data.select_columns(kept).to_list()
        for row in rows if found.label else ():
            row[found.label] = _class_name(data.features[found.label], row[found.label])
        wanted = Columns(image=found.image, caption=",".join(found.captions) or None, label=found.label)
        return from_rows(rows, folders=[folder] * len(rows), name=name, columns=wanted, split=split, limits=limits)
    if split is not None:
        values = data[found.split][:] if found.split else [None] * len(data)
        data = data.select(select_split(values, split, source=name))
    return ArrowSource(data, name=name, found=found, limits=limits)


class ArrowSource:
    """Rows that hold their images, read from the memory-mapped copy one by one."""

    def __init__(self, data: Any, *, name: str, found: Found, limits: ImageLimits):
        self.name = name
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

    def image(self, i: int, size: int) -> np.ndarray:
        value = self._images[i][self._found.image]
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return decode(Path(value["path"]), size, limits=self._limits)
        return decode(bytes(data or b""), size, name=f"{self.name}: {self.key(i)}", limits=self._limits)

    def label(self, i: int) -> str | None:
        if self._labels is None:
            return None
        return _class_name(self._labels.features[self._found.label], self._labels[i][self._found.label])


def _class_name(feature: Any, value: Any) -> str | None:
    """The label as text: of a ClassLabel the name of its number, None for -1, which means unlabelled."""
    if value is None or not hasattr(feature, "int2str"):
        return None if value is None else str(value)
    return feature.int2str(value) if value >= 0 else None
