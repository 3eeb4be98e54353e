"""Sources that are tables: what their columns mean, and where the images lie. `rows.py` reads the formats of files."""

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.sources.columns import (
    STEM_NAMES,
    Columns,
    Found,
    find_columns,
    find_image,
    is_address,
    is_split,
    label_of,
    notes_on_labels,
    plain_name,
)
from diptych.data.sources.decode import ImageLimits, decode, is_image_path
from diptych.data.sources.paths import ImagePaths, Roots, files_of_addresses, folders_below, splits_of
from diptych.data.sources.remote import RemoteFile, is_remote
from diptych.data.sources.rows import read_rows
from diptych.data.sources.text import captions_of, is_missing, says_missing
from diptych.errors import UserError

__all__ = ["TableSource", "from_rows", "open_tables"]

BLOCK = 64
"""Bytes from the middle of an image file by which it is first compared with others of its size."""
SAMPLE = 256
"""Values of a column, spread over the table, that decide what it holds."""

_ABSOLUTE = re.compile(r"/|\\\\|[A-Za-z]:[\\/]")

Row = Mapping[str, Any]


def open_tables(
    paths: Sequence[Path], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "TableSource":
    """One source from one or more files with the same columns."""
    rows: list[dict[str, Any]] = []
    tables: list[Path] = []
    notes: list[str] = []
    for path in paths:
        found = read_rows(path, notes=notes)
        rows += found
        tables += [path] * len(found)
    source = from_rows(rows, tables=tables, name=name, columns=columns, split=split, limits=limits)
    source.notes += notes
    return source


def from_rows(
    rows: Sequence[Row],
    *,
    tables: Sequence[Path],
    name: str,
    columns: Columns,
    split: str | None,
    limits: ImageLimits,
    root: Path | None = None,
) -> "TableSource":
    """A source from rows in memory. Raises UserError.

    Image paths of row i are relative to the folder of ``tables[i]``. Where no column says the splits, the folders of
    the images do, as the paths say them, and below ``root`` the folders of the tables.
    """
    sample = sample_columns(rows)
    notes: list[str] = []
    downloads: list[str] = []
    if (addresses := _column_of_addresses(sample, columns.image, name)) is not None:
        rows, tables, downloads = _downloaded(rows, tables, addresses)
        sample = sample_columns(rows)
        columns = replace(columns, image=addresses) if downloads else columns  # the files may have no suffix
    if columns.image is None and find_image(sample, None, name) is None:
        columns = replace(columns, image=_column_of_stems(sample, tables[0]))
        notes = [f"images are those that column {columns.image!r} names"] if columns.image else []
    found = find_columns(sample, wanted=columns, source=name)
    if found.image is None and columns.image is None and not any("no images" in note for note in found.notes):
        notes = [f"no images: no column names those beside it, such as {near}" for near in _images_near(tables[0])]
    found = replace(found, notes=(*notes, *found.notes))
    if found.embedded:
        raise UserError(f"{name}: images inside a {Path(name).suffix} table are not read; store their paths")
    if found.split or not found.image:
        splits = [row.get(found.split) if found.split else None for row in rows]
    else:
        paths = [_path_of(row, found).replace("\\", "/") for row in rows]
        below = {table: os.path.relpath(table.parent, root) if root else "" for table in dict.fromkeys(tables)}
        splits = splits_of([f"{below[table]}/{path}" for table, path in zip(tables, paths, strict=True)])
    chosen = select_split(splits, split, source=name)
    source = TableSource([(tables[i], rows[i]) for i in chosen], name=name, found=found, limits=limits)
    if split is None:
        source.notes += split_notes(splits) or file_split_notes(dict.fromkeys(tables))
    source.notes += unsplit_notes(splits, split)
    if found.split and found.image and len(set(map(str, splits))) > 1:
        source.notes += _notes_on_shared_images(rows, splits, found)
    source.notes += downloads + _tables_without_captions(rows, tables, found)
    return source


def _notes_on_shared_images(rows: Sequence[Row], splits: Sequence[Any], found: Found) -> list[str]:
    """A note on images that rows of several splits name: a run would be scored on what it has learned."""
    first: dict[str, str] = {}
    shared: dict[str, str] = {}
    for row, split in zip(rows, splits, strict=True):
        path = os.path.normpath(_path_of(row, found))
        if path == "." or is_missing(split) or split != split:
            continue
        one, other = first.setdefault(path, str(split).strip()), str(split).strip()
        if one.casefold() != other.casefold():
            shared.setdefault(path, f"{path} ({one}, {other})")
    return (
        [f"{counted(len(shared), 'image')} in several splits: {some(shared.values(), len(shared))}"] if shared else []
    )


def _column_of_addresses(sample: Mapping[str, Sequence[Any]], wanted: str | None, source: str) -> str | None:
    """The column of web addresses, if there is one and no column of images beside it."""
    found = [name for name, values in sample.items() if values and all(map(is_address, values))]
    if wanted is not None:
        return wanted if wanted in found else None
    return found[0] if len(found) == 1 and find_image(sample, None, source) is None else None


def _downloaded(
    rows: Sequence[Row], tables: Sequence[Path], column: str
) -> tuple[Sequence[Row], Sequence[Path], list[str]]:
    """The rows whose address has been downloaded to a file near its table, with the path of that in its place.

    A file is that of a row if it is called like the address ends, like the number of the row, or like both the number
    and the checksum of the address, as downloaders for CC3M do. Of these three, the one that most rows of a table fit
    is taken for all. Nothing is changed where no file fits.
    """
    paths: list[str | None] = [None] * len(rows)
    notes = []
    for table in dict.fromkeys(tables):
        places = [place for place, of_row in enumerate(tables) if of_row == table]
        addresses = [str(rows[place].get(column) or "").strip() for place in places]
        how, found = files_of_addresses(table.parent, addresses)
        for place, path in zip(places, found, strict=True):
            paths[place] = path
        if left_out := len(found) - sum(map(bool, found)):
            how += f"; {counted(left_out, 'row')} of {len(found):,} without a file not used"
        notes.append(f"images of {table.name} are the files that are called like {how}")
    if not any(paths):
        return rows, tables, []
    kept = [place for place, path in enumerate(paths) if path]
    return [{**rows[place], column: paths[place]} for place in kept], [tables[place] for place in kept], notes


def _tables_without_captions(rows: Sequence[Row], tables: Sequence[Path], found: Found) -> list[str]:
    """A note on the tables, of several, that have no value in any column of captions: theirs may have other names."""
    every = list(dict.fromkeys(tables))
    if len(every) == 1 or not found.captions:
        return []
    having = {
        path for path, row in zip(tables, rows, strict=True) if any(captions_of(row.get(c)) for c in found.captions)
    }
    without = [path.name for path in every if path not in having]
    if not without:
        return []
    return [f"no captions in {some(without, len(without))}: there is no column {' or '.join(found.captions)}"]


def _images_near(table: Path) -> list[str]:
    """An image in the folder of a table or in one just below it; nothing if there is none."""
    for folder in folders_below(table.parent, depth=1) if table.is_file() else ():  # a data set of the hub is none
        for name in os.listdir(folder) if os.access(folder, os.R_OK) else ():
            if is_image_path(name):
                return [str(folder / name)]
    return []


def _column_of_stems(sample: Mapping[str, Sequence[Any]], table: Path) -> str | None:
    """The column, if any, that names image files near the table without their suffix."""
    paths = ImagePaths()
    names = {plain_name(name): name for name in sample}
    for name in (names[each] for each in STEM_NAMES if each in names):
        values = sample[name]
        stems = [str(value).strip() for value in values[:: max(1, len(values) // 8)]]
        if stems and all(isinstance(value, str | int) for value in values):
            roots = paths.roots(table, stems)
            if 2 * sum(paths.find_in(roots, stem)[1] for stem in stems) > len(stems):
                return name
    return None


def sample_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Every column name with up to 256 of its values that are not missing, spread over the table."""
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            values = columns.setdefault(str(name), [])
            if not is_missing(value):
                values.append(value)
    return {name: values[:: max(1, len(values) // SAMPLE)] for name, values in columns.items()}


def select_split(values: Sequence[Any], split: str | None, *, source: str) -> list[int]:
    """Indices of the rows of ``split``, such as `train` or `train+restval`; of all rows when it is None."""
    if split is None:
        return list(range(len(values)))
    found = {str(value).strip() for value in values if not is_missing(value)}
    wanted = {split} if split in found else set(split.split("+"))
    for each in sorted(wanted - found):
        raise unknown_split(each, found, source=source)
    same = {each.casefold() for each in wanted}  # `Train` in some rows is a slip, not another split
    return [i for i, value in enumerate(values) if not is_missing(value) and str(value).strip().casefold() in same]


def unknown_split(split: str, found: Iterable[str], *, source: str) -> UserError:
    listed = ", ".join(sorted(found)[:20])
    hint = "it is not divided in splits; where its files are, give those of one split as the source"
    return UserError(f"{source}: no split {split!r}; " + (f"it has {listed}" if listed else hint))


def file_split_notes(paths: Iterable[Path | RemoteFile]) -> list[str]:
    """As `split_notes`, by the names of files such as `train-00000-of-00002.parquet`."""
    names = (re.split(r"[-_.\d]", path.name)[0] for path in paths)
    found = sorted({name for name in names if is_split(name)})
    return (
        [f"files of the splits {', '.join(found)} are used together; give those of one as the source"]
        if len(found) > 1
        else []
    )


def split_notes(values: Iterable[Any]) -> list[str]:
    """A note where a source is divided in splits and all of them are used."""
    found = sorted({str(value).strip() for value in values if not is_missing(value)})
    if len(found) < 2:
        return []
    return [f"the splits {', '.join(found[:6])} are used together; choose one, e.g. ?split={found[-1]}"]


def unsplit_notes(values: Sequence[Any], split: str | None = None) -> list[str]:
    """A note on the items without a split beside those of several, or of the one that is chosen: none takes them."""
    found = {str(value).strip() for value in values if not is_missing(value)}
    without = sum(map(is_missing, values))
    if not without or len(found) < (2 if split is None else 1):
        return []
    return [f"{counted(without, 'item')} without a split: no ?split= takes {'it' if without == 1 else 'them'}"]


def unlabelled_notes(values: Sequence[Any]) -> list[str]:
    """A note on ``values`` that could be labels and are none, such as -1, None as a word, and lists."""
    if not values:
        return []
    shown = str(values[0])[:60]
    return [f"{counted(len(values), 'label')} of {shown} taken for missing; a class needs a name of its own"]


def note_on_two_labels(shown: Iterable[str], count: int) -> list[str]:
    """A note on ``count`` images whose rows say two labels."""
    return [f"{counted(count, 'image')} with two labels, of which the first is used: {some(shown, count)}"] * bool(
        count
    )


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 file`, `2,000 files`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def on_one_line(name: str) -> str:
    """The name of a file as a message shows it: without line ends, and with `\\udcff` for a byte that is no UTF-8."""
    return " ".join(name.splitlines()).encode(errors="backslashreplace").decode()


def some(names: Iterable[str], count: int) -> str:
    """The first three of ``count`` names, as a list for a message."""
    shown = [on_one_line(name) for name, _ in zip(names, range(3), strict=False)]
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


def file_block(path: Path) -> tuple[int, bytes]:
    """As `HasBlocks.block`, of a file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return 0, b""
        with open(path, "rb", buffering=0) as file:
            file.seek(status.st_size // 2)
            return status.st_size, file.read(BLOCK)
    except OSError:  # it is named where it is used
        return 0, b""


def _is_several(cell: Any) -> bool:
    parts = cell if isinstance(cell, list) else re.split(r"[;,|]", cell) if isinstance(cell, str) else ()
    return len(parts) > 1 and (isinstance(cell, list) or all(map(is_image_path, parts)))


def _path_of(row: Row, found: Found) -> str:
    """The path in a row, or a number that is the name of a file; empty for anything else."""
    cell = row.get(found.image or "")
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if is_missing(cell) or not isinstance(cell, str | int) or says_missing(cell) or _is_several(cell):
        return ""
    place = row.get(found.folder) if found.folder is not None else None
    return os.path.join(place.strip(), str(cell).strip()) if isinstance(place, str) else str(cell).strip()


class _Cells:
    """Reads the cells of rows, and keeps for the notes what cannot be used of them."""

    def __init__(self, found: Found, *, name: str) -> None:
        """``name`` is what messages call the table."""
        self._found, self._name = found, name
        self.pathless: list[str] = []
        """Rows without the path of an image, and below those with several."""
        self.several: list[str] = []
        self.textless = 0
        """Number of rows of a table of texts that hold none."""
        self._nulls = 0
        self._strange: list[Any] = []
        self._no_labels: list[Any] = []

    def captions(self, row: Row) -> tuple[str, ...]:
        cells = [row.get(column) for column in self._found.captions]
        texts = [captions_of(cell) for cell in cells]
        self._nulls += sum(map(says_missing, cells))
        for cell, found in zip(cells, texts, strict=True):
            if not found and not isinstance(cell, str) and not is_missing(cell):
                self._strange.append(cell)
        return tuple(text for found in texts for text in found)

    def label(self, row: Row) -> str | None:
        if not self._found.label:
            return None
        cell = row.get(self._found.label)
        label = label_of(cell)
        if label is None and not is_missing(cell):
            self._no_labels.append(cell)
        return label

    def path(self, row: Row, number: int) -> str:
        """The path of the image of row ``number``; empty where it has none or several."""
        path = _path_of(row, self._found)
        if not path:
            several = _is_several(row.get(self._found.image or ""))
            (self.several if several else self.pathless).append(f"row {number} of {self._name}")
        return path

    def notes_on_rows(self) -> list[str]:
        notes = []
        if several := self.several:
            shown = some(several, len(several))
            notes.append(
                f"{counted(len(several), 'row')} with several images not used: {shown}; write a row for each image"
            )
        if rows := self.pathless:
            notes.append(f"{counted(len(rows), 'row')} without an image path not used: {some(rows, len(rows))}")
        return notes

    def notes_on_cells(self) -> list[str]:
        notes = []
        if self.textless:
            notes.append(f"{counted(self.textless, 'row')} without a text not used")
        if self._nulls:
            notes.append(f"{counted(self._nulls, 'caption')} such as nan or null taken for missing")
        if strange := self._strange:
            notes.append(f"{counted(len(strange), 'cell')} of captions without a text, such as {str(strange[0])[:60]}")
        return notes + unlabelled_notes(self._no_labels)


class TableSource:
    """Rows in memory, images on disk.

    Rows that name the same image are one item with all their captions, so that a table with a row per caption cannot
    put one image into two streams.
    """

    def __init__(self, rows: Sequence[tuple[Path, Row]], *, name: str, found: Found, limits: ImageLimits):
        """``rows`` are pairs of the table's file and a row of it."""
        self.name, self.notes = name, list(found.notes)
        self.has_images, self.has_captions = found.image is not None, bool(found.captions)
        self._limits = limits
        self._keys: list[str] = []
        self._captions: list[tuple[str, ...]] = []
        self._labels: list[str | None] = []
        self._written: dict[str, str] = {}
        """How the table writes the paths of the images that do not exist."""
        self._two_labels: dict[str, str] = {}
        cells, paths = _Cells(found, name=name), ImagePaths()
        self._add_items(rows, found, cells, paths)
        self.missing = list(self._written)
        """Paths of the images that do not exist."""
        near = paths.near(self.missing[0]) if self.missing else ""
        self._check(found, cells, near)
        self.notes += cells.notes_on_rows() + self._notes_on_missing(near) + cells.notes_on_cells()
        self.notes += notes_on_labels([label for label in self._labels if label])
        self.notes += note_on_two_labels(self._two_labels.values(), len(self._two_labels))

    def _add_items(self, rows: Sequence[tuple[Path, Row]], found: Found, cells: _Cells, paths: ImagePaths) -> None:
        roots = self._roots(rows, found, paths)
        at: dict[str, int] = {}
        for number, (table, row) in enumerate(rows):
            captions, label = cells.captions(row), cells.label(row)
            if found.image is None:
                if captions:
                    self._add_item(f"row {number}", captions, label)
                else:
                    cells.textless += 1
            elif path := cells.path(row, number):
                key, exists = paths.find_in(roots[table], path)
                i = at.setdefault(os.path.abspath(key), len(self._keys))
                if i < len(self._keys):
                    self._join(i, key, captions, label)
                else:
                    self._add_item(key, captions, label)
                    if not exists:
                        self._written[key] = path

    def _add_item(self, key: str, captions: tuple[str, ...], label: str | None) -> None:
        self._keys.append(key)
        self._captions.append(captions)
        self._labels.append(label)

    def _join(self, i: int, key: str, captions: tuple[str, ...], label: str | None) -> None:
        """Add the captions of a further row to item ``i``, and its label where there is none yet."""
        self._captions[i] += captions
        if label is not None and self._labels[i] not in (None, label):
            self._two_labels.setdefault(key, f"{key} ({self._labels[i]}, {label})")
        self._labels[i] = self._labels[i] or label

    def _roots(self, rows: Sequence[tuple[Path, Row]], found: Found, paths: ImagePaths) -> dict[Path, Roots]:
        """Where the images of each table lie."""
        values: dict[Path, list[str]] = {}
        for table, row in rows:
            written = values.setdefault(table, [])
            if found.image is not None and (value := _path_of(row, found)):
                written.append(value)
        roots = {table: paths.roots(table, written) for table, written in values.items()}
        for table, root in roots.items():
            if root != Roots((table.parent,)):
                of_table = f" in {table}" if len(roots) > 1 else ""
                without = f", without {root.without}" if root.without else ""
                shown = some(map(str, root.folders), len(root.folders))
                self.notes.append(f"image paths{of_table} are taken relative to {shown}{without}")
        return roots

    def _check(self, found: Found, cells: _Cells, near: str) -> None:
        """Raise UserError where nothing is left, or where no image exists.

        Then the paths are relative to another folder, or they are absolute ones of another machine.
        """
        if not self._keys and cells.several:
            raise UserError(f"{cells.several[0]} (counted from 0) names several images; write a row for each image")
        if not self._keys and cells.pathless:
            raise UserError(
                f"{cells.pathless[0]} (counted from 0) has no image path in column {found.image!r}, nor has any other"
            )
        if not self._keys:
            raise UserError(f"{self.name}: holds no captions")
        if len(self.missing) < len(self._keys):
            return
        if is_remote(self.name):
            raise UserError(f"{self.name}: images beside a table are not fetched: put them into tars or into parquet")
        if absolute := next(filter(_ABSOLUTE.match, self._written.values()), None):
            raise UserError(f"{absolute}: does not exist here; write the paths in {self.name} relative to its folder")
        mend = near or f"; image paths in {self.name} are relative to its folder"
        raise UserError(f"{self.missing[0]}: does not exist{mend}")

    def _notes_on_missing(self, near: str) -> list[str]:
        """A note on images that do not exist; ``near`` is what `ImagePaths.near` says of the first."""
        if not self.missing:
            return []
        images, shown = counted(len(self._keys), "image"), some(self.missing, len(self.missing))
        more = near and f" ({os.path.basename(self.missing[0])} does not{near})"
        return [f"{len(self.missing):,} of {images} do not exist: {shown}{more}"]

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        return list(self._captions[i])

    def file(self, i: int) -> Path:
        return Path(self._keys[i])

    def block(self, i: int) -> tuple[int, bytes]:
        return file_block(self.file(i))

    def image(self, i: int, size: int) -> np.ndarray:
        if not self.has_images:
            raise UserError(f"{self.name}: holds no images")
        return decode(self.file(i), size, limits=self._limits)

    def label(self, i: int) -> str | None:
        return self._labels[i]
