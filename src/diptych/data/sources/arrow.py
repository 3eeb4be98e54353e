"""Parquet files and data sets of the hub, through the `datasets` library.

`datasets` keeps a memory-mapped copy of what it reads in its cache folder (HF_HOME). It can therefore read any row
without holding the others, and makes a new copy when the time or size of a file has changed.
"""

import glob
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.sources.columns import (
    Columns,
    Found,
    find_columns,
    label_of,
    notes_on_labels,
)
from diptych.data.sources.decode import ImageLimits, decode
from diptych.data.sources.table import (
    SAMPLE,
    TableSource,
    counted,
    file_split_notes,
    from_rows,
    note_on_two_labels,
    select_split,
    some,
    split_notes,
    unknown_split,
    unlabelled_notes,
    unsplit_notes,
)
from diptych.data.sources.text import NULLS, captions_of, is_missing, why_unreadable
from diptych.errors import UserError

_BLOCKS, _BLOCK = 16, 64
"""Number of blocks of an image by which it is first compared with others of its size, and bytes of a block."""


def open_parquet(
    paths: Sequence[Path], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "ArrowSource | TableSource":
    """One source from one or more parquet files. Raises UserError for a file that is damaged or holds no rows."""
    import datasets

    counts, names = zip(*map(_rows_and_columns, paths), strict=True)
    shared = [column for column in names[0] if all(column in each for each in names)]
    others = sorted(set().union(*names) - set(shared))
    if not shared:
        raise UserError(f"{name}: {paths[0].name} and another file have no column in common; give one kind of them")
    files = [glob.escape(str(path)) for path in paths]  # `datasets` takes every name for a pattern
    try:
        with _quietly():
            # Unlike `load_dataset`, it does not report the opening of a file to the hub.
            data = datasets.Dataset.from_parquet(files, columns=shared if others else None)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"{name}: is not readable as parquet ({_reason(error)})") from None
    tables = Tables(tuple(paths), tuple(accumulate(counts)))
    source = _from_dataset(data, name=name, tables=tables, columns=columns, split=split, limits=limits)
    if others:
        source.notes.append(f"columns not used, as some files lack them: {some(others, len(others))}")
    return source


@dataclass(frozen=True, slots=True)
class Tables:
    """The files that the rows of a data set come from."""

    paths: tuple[Path, ...]
    ends: tuple[int, ...]
    """Number of rows of each file and all before it."""

    def of(self, row: int) -> Path:
        """The file of a row."""
        return self.paths[bisect_right(self.ends, row)]


def _rows_and_columns(path: Path) -> tuple[int, list[str]]:
    """Read the footer of a file alone: its errors name the file and the reason, which those of `datasets` do not."""
    import pyarrow
    import pyarrow.parquet

    try:
        footer = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(why_unreadable(path, "parquet", error)) from None
    if not footer.num_rows:
        raise UserError(f"{path}: holds no rows")
    return footer.num_rows, footer.schema.to_arrow_schema().names


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

    data = _without_lists(data)
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
        source = from_rows(rows, tables=of, name=name, columns=wanted, split=split, limits=limits)
        source.notes[:] = dict.fromkeys([*found.notes, *source.notes])
        return source
    rows, whole = np.arange(len(data)), data
    values: list[Any] = data[found.split][:] if found.split else [None] * len(data)
    if found.split and hasattr(data.features[found.split], "int2str"):
        values = [_class_name(data.features[found.split], value) for value in values]
    if split is not None:
        rows = np.array(select_split(values, split, source=name))
        data = data.select(rows)
    notes = list(found.notes)
    if split is None:
        notes += split_notes(values) or file_split_notes(tables.paths)
    notes += unsplit_notes(values, split)
    failed = _failed_downloads(whole, found.image)[rows]
    if failed.any() and not failed.all():
        rows = rows[~failed]
        data = whole.select(rows)
        notes.append(f"{counted(int(failed.sum()), 'row')} that img2dataset could not download not used")
    notes += _null_notes(whole, found, rows)
    # Without captions, rows of one image have nothing to join.
    groups = _same_images(whole.data.column(found.image), rows, tables) if found.captions else None
    return ArrowSource(
        data, name=name, found=found, rows=rows, tables=tables, limits=limits, notes=notes, groups=groups
    )


def _without_lists(data: Any) -> Any:
    """The same data with each column of lists of one image as a column of images, as chat formats have them."""
    import datasets
    import pyarrow
    import pyarrow.compute

    table, features = data.data.table, data.features.copy()
    for name in data.column_names:
        column, kind = table.column(name), table.column(name).type
        if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
            continue
        of_images = _is_binary(kind.value_type) or (
            pyarrow.types.is_struct(kind.value_type) and kind.value_type.get_field_index("bytes") >= 0
        )
        if (
            of_images
            and pyarrow.compute.all(pyarrow.compute.equal(pyarrow.compute.list_value_length(column), 1)).as_py()
        ):
            table = table.set_column(table.schema.get_field_index(name), name, pyarrow.compute.list_flatten(column))
            features[name] = features[name].feature
    if features == data.features:
        return data
    whole = datasets.table.InMemoryTable(table.replace_schema_metadata(None))
    return datasets.Dataset(whole, info=datasets.DatasetInfo(features=features))


def _failed_downloads(data: Any, image: str | None) -> np.ndarray:
    """Which rows img2dataset marks as failed: they have a status that is not `success`, and no image."""
    import pyarrow.compute

    if "status" not in data.column_names:
        return np.zeros(len(data), bool)
    no_image = pyarrow.compute.is_null(data.data.column(image)).to_numpy()
    return no_image & np.array([status != "success" for status in data["status"][:]], bool)


def _null_notes(data: Any, found: Found, rows: np.ndarray) -> list[str]:
    """Notes on the captions that say nan or null, and on the labels that are -1."""
    import pyarrow
    import pyarrow.compute

    words = pyarrow.array(sorted(NULLS))
    nulls = 0
    for name in found.captions:
        column = _column(data, name).take(pyarrow.array(rows))
        if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            column = pyarrow.compute.list_flatten(column)
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            trimmed = pyarrow.compute.utf8_trim_whitespace(column.cast(pyarrow.string()))
            nulls += pyarrow.compute.sum(pyarrow.compute.is_in(trimmed, value_set=words)).as_py() or 0
    labels = _column(data, found.label).take(pyarrow.array(rows)).to_pylist() if found.label else []
    no_labels = [value for value in labels if not is_missing(value) and label_of(value) is None]
    notes = [f"{counted(nulls, 'caption')} such as nan or null taken for missing"] if nulls else []
    return (
        notes
        + unlabelled_notes(no_labels)
        + notes_on_labels([label for value in labels if (label := label_of(value)) is not None])
    )


def _same_images(column: Any, rows: np.ndarray, tables: Tables) -> list[list[int]]:
    """Places in ``rows`` by the image that they hold, byte for byte; images without bytes by their path.

    Only images of equal length are compared, and only those whose blocks are equal are read whole.
    """
    import pyarrow
    import pyarrow.compute

    data, paths = column, None
    if pyarrow.types.is_struct(column.type):
        fields = {column.type.field(i).name for i in range(column.type.num_fields)}
        data = pyarrow.compute.struct_field(column, "bytes")
        paths = pyarrow.compute.struct_field(column, "path") if "path" in fields else None
    if pyarrow.types.is_null(data.type):  # paths alone
        data = data.cast(pyarrow.binary())
    lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(data), 0).to_numpy()
    alike: dict[int | str, list[int]] = defaultdict(list)
    groups: list[list[int]] = []
    for place, row in enumerate(rows.tolist()):
        path = paths[row].as_py() if paths is not None and not lengths[row] else None
        if lengths[row] or path:
            alike[str(tables.of(row).parent / path) if path else int(lengths[row])].append(place)
        else:
            groups.append([place])
    for key, places in alike.items():
        groups += _equal(data, rows, places) if len(places) > 1 and isinstance(key, int) else [places]
    return sorted(groups)


def _equal(data: Any, rows: np.ndarray, places: list[int]) -> list[list[int]]:
    """``places`` of images of one length, by their content."""

    def content(place: int) -> Any:
        return data[int(rows[place])].as_buffer()

    alike: dict[bytes, list[list[int]]] = defaultdict(list)
    for place in places:
        buffer = content(place)
        view = memoryview(buffer)
        step = max(_BLOCK, len(view) // _BLOCKS)
        groups = alike[b"".join(view[start : start + _BLOCK] for start in range(0, len(view), step))]
        for group in groups:
            if content(group[0]).equals(buffer):
                group.append(place)
                break
        else:
            groups.append([place])
    return [group for groups in alike.values() for group in groups]


def _sample(data: Any) -> dict[str, list[Any]]:
    """Every column name with values that are not missing, spread over the whole column: few or none may be filled."""
    import pyarrow.compute

    columns: dict[str, list[Any]] = {}
    for name in data.column_names:
        present = pyarrow.compute.drop_null(_column(data, name))
        if pyarrow.types.is_list(present.type) or pyarrow.types.is_large_list(present.type):
            present = present.filter(pyarrow.compute.greater(pyarrow.compute.list_value_length(present), 0))
        elif pyarrow.types.is_string(present.type) or pyarrow.types.is_large_string(present.type):
            present = present.filter(pyarrow.compute.greater(pyarrow.compute.binary_length(present), 0))
        # Of columns with images a few values are enough: each is as large as an image.
        count = SAMPLE if not pyarrow.types.is_struct(present.type) and not _is_binary(present.type) else 8
        chosen = present.take(np.arange(0, len(present), max(1, len(present) // count)))
        columns[name] = [value for value in chosen.to_pylist() if not is_missing(value)]
    return columns


def _column(data: Any, name: str) -> Any:
    """A column of the whole table, in a type that the functions of pyarrow take."""
    import pyarrow

    column = data.data.column(name)
    return column.cast(pyarrow.large_string()) if pyarrow.types.is_string_view(column.type) else column


def _is_binary(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


class ArrowSource:
    """Rows that hold their images, read from the memory-mapped copy one by one.

    Rows with the same image are one item with all their captions, as in a table of paths.
    """

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
        groups: list[list[int]] | None = None,
    ):
        """``rows`` are the numbers that the rows of ``data`` have in all ``tables`` together; ``groups`` are the rows
        of each item, by default one each."""
        self.name, self.notes = name, notes
        self._rows, self._tables = rows, tables
        self.has_images, self.has_captions = True, bool(found.captions)
        self._found, self._limits = found, limits
        self._images = data.select_columns([found.image])
        # Apart from the images: a row read together with its image would copy the image's bytes.
        self._captions = data.select_columns(list(found.captions)) if found.captions else None
        self._labels = data.select_columns([found.label]) if found.label else None
        self._groups: Sequence[Sequence[int]] = groups or [(row,) for row in range(len(data))]
        several = [i for i, group in enumerate(self._groups) if len(group) > 1] if found.label else []
        other = [self.key(i) for i in several if len(set(self._labels_of(i))) > 1]
        self.notes += note_on_two_labels(other, len(other))

    def __len__(self) -> int:
        return len(self._groups)

    def key(self, i: int) -> str:
        return f"row {self._groups[i][0]}"

    def captions(self, i: int) -> list[str]:
        rows = [self._captions[row] for row in self._groups[i]] if self._captions is not None else []
        return [text for row in rows for column in self._found.captions for text in captions_of(row[column])]

    def file(self, i: int) -> Path | bytes:
        first = self._groups[i][0]
        value = self._images[first][self._found.image]
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None and isinstance(value, dict) and value.get("path"):
            return self._tables.of(int(self._rows[first])).parent / value["path"]
        return bytes(data or b"")

    def image(self, i: int, size: int) -> np.ndarray:
        file = self.file(i)
        name = None if isinstance(file, Path) else f"{self.name}: {self.key(i)}"
        return decode(file, size, name=name, limits=self._limits)

    def label(self, i: int) -> str | None:
        return next(iter(self._labels_of(i)), None)

    def _labels_of(self, i: int) -> list[str]:
        """The labels of the rows of an item, without those that are missing."""
        if self._labels is None:
            return []
        feature = self._labels.features[self._found.label]
        found = (_class_name(feature, self._labels[row][self._found.label]) for row in self._groups[i])
        return [label for label in found if label is not None]


def _class_name(feature: Any, value: Any) -> str | None:
    """The label as text: of a ClassLabel the name of its number, None for -1, which means unlabelled."""
    if value is None or not hasattr(feature, "int2str"):
        return label_of(value)
    return feature.int2str(value) if value >= 0 else None
