"""Folders of images: captions in `name.txt` beside `name.jpg` or in a metadata file, labels and splits as folders."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import SUFFIXES, ImageLimits, decode
from diptych.data.sources.table import TableSource, from_rows, read_rows, unknown_split
from diptych.data.sources.text import clean, read_text
from diptych.errors import UserError

SPLITS = frozenset(["train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"])
_METADATA = ("metadata.csv", "metadata.jsonl")
_NOTES = frozenset({"readme", "license", "licence", "notes", "classes", "labels"})
_OTHER_KINDS = (".tar", ".parquet", ".csv", ".tsv", ".json", ".jsonl")


def open_folder(
    root: Path, *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> "FolderSource | TableSource":
    """A folder with all its sub-folders; as a table where it holds metadata files.

    Raises UserError for a folder without images, for an unknown split, and for a text beside images that belongs to
    none of them.
    """
    files = sorted(_walk(root))
    tables = [file for file in files if PurePosixPath(file).name in _METADATA]
    if tables:
        return _open_metadata(root, tables, name=name, columns=columns, split=split, limits=limits)
    return FolderSource(root, _of_split(files, split, source=name), name=name, limits=limits)


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
                    if not entry.name.startswith("."):
                        path = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.is_dir():
                            waiting.append(path)
                        else:
                            yield path
        except OSError as error:
            raise UserError(f"{os.path.join(root, folder)}: cannot be read ({error.strerror})") from None


def _split_of(file: str) -> str | None:
    top, _, rest = file.partition("/")
    return top if rest and top in SPLITS else None


def _of_split(files: list[str], split: str | None, *, source: str) -> list[str]:
    if split is None:
        return files
    found = {name for file in files if (name := _split_of(file))}
    if split not in found:
        raise unknown_split(split, found, source=source)
    return [file for file in files if _split_of(file) == split]


def _open_metadata(
    root: Path, tables: list[str], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> TableSource:
    """A table of metadata files as in the ImageFolder of `datasets`: one for all, or one in each split's folder."""
    if split is not None and any(_split_of(table) for table in tables):
        tables, split = _of_split(tables, split, source=name), None
    rows, folders = [], []
    for table in tables:
        found = read_rows(root / table)
        rows += found
        folders += [(root / table).parent] * len(found)
    return from_rows(rows, folders=folders, name=name, columns=columns, split=split, limits=limits)


class FolderSource:
    """Images found under a folder. An image without a caption file beside it has no caption."""

    has_images = True

    def __init__(self, root: Path, files: list[str], *, name: str, limits: ImageLimits):
        self.name = name
        self._root, self._limits = root, limits
        self._files = [file for file in files if PurePosixPath(file).suffix.lower() in SUFFIXES]
        if not self._files:
            raise UserError(f"{name}: holds no images{_hint(files)}")
        self._texts = self._caption_files(files)
        self.has_captions = bool(self._texts)

    def _caption_files(self, files: list[str]) -> set[str]:
        """The paths, without suffix, of the images that have a caption file.

        A text among images that belongs to none of them raises UserError: its caption would be lost in silence.
        """
        images = {os.path.splitext(file)[0] for file in self._files}
        folders = {os.path.dirname(file) for file in self._files}
        texts = {file[:-4] for file in files if file.endswith(".txt")}
        for text in sorted(texts - images):
            if os.path.dirname(text) in folders and os.path.basename(text).lower() not in _NOTES:
                raise UserError(
                    f"{self._root / text}.txt: no image of that name lies beside it; add it or move the text"
                )
        return texts & images

    def __len__(self) -> int:
        return len(self._files)

    def key(self, i: int) -> str:
        return self._files[i]

    def captions(self, i: int) -> list[str]:
        stem = os.path.splitext(self._files[i])[0]
        if stem not in self._texts:
            return []
        lines = read_text(self._root / f"{stem}.txt").split("\n")
        return [text for line in lines if (text := clean(line))]

    def image(self, i: int, size: int) -> np.ndarray:
        return decode(self._root / self._files[i], size, limits=self._limits)

    def label(self, i: int) -> str | None:
        """The name of the folder that holds the image, unless that is the root or the folder of a split."""
        folder = PurePosixPath(self._files[i]).parent
        return folder.name if folder.name and str(folder) not in SPLITS else None


def _hint(files: list[str]) -> str:
    for suffix in _OTHER_KINDS:
        for file in files:
            if file.endswith(suffix):
                return f", but {file}; give that file itself as the source"
    return " (searched in its sub-folders too)" if files else "; it is empty"
