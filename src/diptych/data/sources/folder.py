"""Folders of images: captions in `name.txt` beside `name.jpg` or in a metadata file, labels and splits as folders."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from diptych.data.sources.columns import IMAGE_NAMES, Columns, find_image, usual
from diptych.data.sources.decode import SUFFIXES, ImageLimits, decode
from diptych.data.sources.paths import folder_labels, splits_of
from diptych.data.sources.rows import TABLE_SUFFIXES, read_rows
from diptych.data.sources.samples import (
    TEXT_SUFFIXES,
    SampleSource,
    group,
    is_hidden,
    unused_notes,
)
from diptych.data.sources.table import (
    TableSource,
    counted,
    file_block,
    from_rows,
    sample_columns,
    some,
    split_notes,
    unknown_split,
)
from diptych.errors import UserError

_OTHER_KINDS = (".tar", *TABLE_SUFFIXES)


def open_folder(
    root: Path, *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "FolderSource | TableSource":
    """A folder with all its sub-folders; as a table where it holds metadata files.

    Raises UserError for a folder without images, for an unknown split, and for a text that could belong to several
    images.
    """
    files = sorted(_walk(root))
    tables = _metadata(root, files)
    if tables:
        return _open_metadata(root, files, tables, name=name, columns=columns, split=split, limits=limits)
    return FolderSource(root, files, name=name, columns=columns, split=split, limits=limits)


def _metadata(root: Path, files: list[str]) -> list[str]:
    """The metadata files, one of each folder. JSON that is no table, as some albums have, is none."""
    found: dict[str, str] = {}
    for file in files:
        stem, _, suffix = PurePosixPath(file).name.lower().removesuffix(".gz").partition(".")
        is_table = f".{suffix}" in TABLE_SUFFIXES
        if stem == "metadata" and is_table and (suffix != "json" or _is_table(root / file)):
            found.setdefault(os.path.dirname(file), file)
    return list(found.values())


def _is_table(file: Path) -> bool:
    try:
        sample = sample_columns(read_rows(file))
        return find_image(sample, None, str(file)) is not None or any(usual(name, IMAGE_NAMES) for name in sample)
    except UserError:
        return False


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all files except hidden ones. Links to folders are followed; each folder is read once."""
    waiting, seen = [""], set()
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if not is_hidden(entry.name):
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir():
                            waiting.append(path)
                        else:
                            yield path
        except OSError as error:
            raise UserError(f"{os.path.join(root, folder)}: cannot be read ({error.strerror})") from None


def _open_metadata(
    root: Path,
    files: list[str],
    tables: list[str],
    *,
    name: str,
    columns: Columns,
    split: str | None,
    limits: ImageLimits,
) -> TableSource:
    """A table of metadata files as in the ImageFolder of `datasets`: one for all, or one in each split's folder.

    Where the tables have no column of splits, the folders of the images say them.
    """
    notes: list[str] = []
    by_folder = splits_of(tables)
    if split is not None and any(by_folder):
        if split not in by_folder:
            raise unknown_split(split, {each for each in by_folder if each}, source=name)
        chosen = split
        tables, split = [table for table, each in zip(tables, by_folder, strict=True) if each == split], None
        files = [file for file, each in zip(files, splits_of(files), strict=True) if each == chosen]
    elif split is None:
        notes = split_notes(by_folder)
    rows, of_table = [], []
    for table in tables:
        found = read_rows(root / table, notes=notes)
        rows += found
        of_table += [root / table] * len(found)
    source = from_rows(rows, tables=of_table, name=name, columns=columns, split=split, limits=limits, root=root)
    notes += notes_on_class_folders(source, tables[0], root)
    listed = {source.key(i) for i in range(len(source))} if source.has_images and split is None else None
    if listed is not None:
        unlisted = [
            file
            for file in files
            if os.path.splitext(file)[1].lower() in SUFFIXES and os.path.normpath(root / file) not in listed
        ]
        if unlisted:
            notes.append(
                f"{counted(len(unlisted), 'image')} not listed in {tables[0]} not used: {some(unlisted, len(unlisted))}"
            )
    unread = [file for file in files if file not in tables and _is_caption_file(file)]
    if unread:
        notes.append(
            f"{counted(len(unread), 'file')} beside the images not used, as {tables[0]} is read: "
            + some(unread, len(unread))
        )
    source.notes += [note for note in notes if note not in source.notes]
    return source


def notes_on_class_folders(source: TableSource, table: str, root: Path) -> list[str]:
    """A note on folders below ``root`` that could be classes, where the rows of a table have no labels."""
    if not source.has_images or any(source.label(i) for i in range(len(source))):
        return []
    places = [os.path.relpath(source.key(i), root) for i in range(len(source))]
    folder = next((label for label in folder_labels(places)[0] if label), None)
    return [f"folders such as {folder} are no classes beside {table}; add a column label"] if folder else []


def _is_caption_file(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in (*TEXT_SUFFIXES, *TABLE_SUFFIXES)


class FolderSource(SampleSource):
    """Images found under a folder, with the side-cars beside them."""

    def __init__(
        self, root: Path, files: list[str], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
    ):
        self._root, self._files = root, files
        groups = group(files, columns, source=name)
        if not groups.keys:
            raise UserError(f"{name}: holds no images{_hint(root, files)}")
        images = [files[slots[0]] for slots in groups.slots]
        labels, nested = folder_labels(images, _shards(files))
        super().__init__(
            images,
            np.array(groups.slots),
            name=name,
            labels=labels,
            splits=splits_of(images),
            columns=columns,
            split=split,
            limits=limits,
            texts_named=groups.texts_named,
            notes=nested
            + unused_notes(
                *([files[i] for i in part] for part in (groups.lone, groups.second, groups.unused, groups.masks)),
                packed=False,
            ),
        )

    def _read(self, member: int) -> bytes:
        path = self._root / self._files[member]
        try:
            if not path.is_file():  # a pipe would be waited for
                raise UserError(f"{path}: is not a file")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def block(self, i: int) -> tuple[int, bytes]:
        return file_block(self.file(i))

    def _place(self, i: int, kind: int) -> str:
        return str(self._root / self._files[self._slots[i, kind]])

    def file(self, i: int) -> Path:
        return self._root / self._keys[i]

    def image(self, i: int, size: int) -> np.ndarray:
        return decode(self.file(i), size, limits=self._limits)


def _shards(files: list[str]) -> frozenset[str]:
    """The folders that img2dataset numbered: each has a file of the same name beside it."""
    names = {name.partition(".")[0].removesuffix("_stats") for name in files if "/" not in name}
    return frozenset(name for name in names if name.isdecimal())


def _hint(root: Path, files: list[str]) -> str:
    if any(file.endswith(".arrow") for file in files):
        return ": it is what save_to_disk of datasets writes; save the data set with to_parquet"
    if packed := [file for file in files if file.lower().endswith((".zip", ".7z", ".rar", ".tar.gz", ".tgz"))]:
        return f", but {packed[0]}; unpack it first"
    for suffix in _OTHER_KINDS:
        others = [file for file in files if file.lower().endswith(suffix)]
        if others:
            more = f", or all {len(others)} of them, e.g. '{(root / others[0]).parent}/*{suffix}'"
            return f", but {others[0]}; give that file itself as the source{more if len(others) > 1 else ''}"
    if texts := [file for file in files if file.lower().endswith(TEXT_SUFFIXES[0])]:
        folder = (root / texts[0]).parent
        return (
            f", but {counted(len(texts), 'text')}; give them as a source of texts, a text a line, e.g. '{folder}/*.txt'"
        )
    return " (searched in its sub-folders too)" if files else "; it is empty"
