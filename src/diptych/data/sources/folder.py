"""Folders of images: captions in `name.txt` beside `name.jpg` or in a metadata file, labels and splits as folders.

`SampleSource` is what folders and tars of images with side-cars have in common.
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diptych.data.sources.columns import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    Columns,
    Found,
    find_fields,
    find_image,
    label_of,
    notes_on_labels,
    usual,
)
from diptych.data.sources.decode import SUFFIXES, ImageLimits, decode
from diptych.data.sources.paths import folder_labels, splits_of
from diptych.data.sources.rows import TABLE_SUFFIXES, read_rows
from diptych.data.sources.samples import CLASS, IMAGE, JSON, TEXT, TEXT_SUFFIXES, group, is_hidden, unused_notes
from diptych.data.sources.table import (
    TableSource,
    counted,
    file_block,
    from_rows,
    sample_columns,
    select_split,
    some,
    split_notes,
    unknown_split,
    unlabelled_notes,
    unsplit_notes,
)
from diptych.data.sources.text import (
    captions_of,
    clean,
    decode_text,
    is_missing,
    notes_on_lines,
    notes_on_texts,
    says_missing,
    written_captions,
)
from diptych.errors import UserError

_OTHER_KINDS = (".tar", *TABLE_SUFFIXES)
_SHOWN = {TEXT: "txt", JSON: "json", CLASS: "cls"}
_BOXES = re.compile(r"(\s*\d+(\s+-?[\d.]+){4,}\s*)+")
"""Lines of a class and a box, as detectors have them."""
_SAMPLE = 64
"""Number of samples whose texts and json are read when a source is opened."""
_MANY = 100_000
"""Largest number of .json files that are read in search of captions when a source is opened."""


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


@dataclass(frozen=True, slots=True)
class _SideCars:
    """What the side-cars of an item hold."""

    item: int
    fields: dict[str, Any]
    text: str
    label: Any
    """The class of the image: of its own file, else of the json."""


def _lines_of(text: str) -> list[str]:
    written = written_captions(text)
    return [line for line in map(clean, text.split("\n")) if line] if written is None else written


class SampleSource(ABC):
    """Images with side-cars. Where they lie, in a folder or in tars, is what the two subclasses know."""

    def __init__(
        self,
        keys: list[str],
        slots: np.ndarray,
        *,
        name: str,
        labels: list[str | None],
        splits: Sequence[str | None],
        columns: Columns,
        split: str | None,
        limits: ImageLimits,
        notes: list[str],
        texts_named: bool,
    ):
        """``slots`` [N, 4] are as in `Groups`; ``labels`` and ``splits`` are what the folders of the samples say."""
        self.name, self.notes = name, notes
        self._limits, self._keys, self._slots, self._labels = limits, keys, slots, labels
        self.notes += notes_on_labels([label for label in labels if label is not None])
        self._drop_boxes()
        self._by_text = columns.caption is None or texts_named
        self._found = self._fields(columns)
        if columns.caption == "" or (self._found and not self._by_text):  # a field that is named, or none at all
            self._slots[:, TEXT] = -1
        elif not self._found:
            self._by_text = True  # the name is that of a column of another source
        self.has_images = self._any(IMAGE)
        self.has_captions = self._any(TEXT) or bool(self._found and self._found.captions)
        self._take_split(split, splits)
        self.notes += self._notes_on_side_cars() + self._notes_on_names()

    def _notes_on_names(self) -> list[str]:
        """A note on images without side-cars that are called like others, which have some: they may be copies."""
        having = np.any(self._slots[:, TEXT:] >= 0, axis=1)
        if having.all() or not having.any():
            return []
        stems = [os.path.splitext(os.path.basename(key))[0] for key in self._keys]
        known = {stem for stem, has_some in zip(stems, having, strict=True) if has_some}
        found = [self._keys[i] for i in np.flatnonzero(~having) if stems[i] in known]
        return (
            [f"{counted(len(found), 'image')} without a text called like one that has it: {some(found, len(found))}"]
            if found
            else []
        )

    @abstractmethod
    def block(self, i: int) -> tuple[int, bytes]:
        """As `HasBlocks.block`."""

    @abstractmethod
    def _read(self, member: int) -> bytes:
        """The content of a file by its number in the groups."""

    def _any(self, kind: int) -> bool:
        return bool(np.any(self._slots[:, kind] >= 0))

    def _drop_boxes(self) -> None:
        """Take no texts for captions that hold boxes, as those of detectors do."""
        having = np.flatnonzero(self._slots[:, TEXT] >= 0)
        some_items = having[:: max(1, len(having) // 16)]
        contents = [self._read(int(self._slots[i, TEXT])) for i in some_items]
        written = [content.decode("utf-8", "replace") for content in contents if content.strip()]
        if written and all(map(_BOXES.fullmatch, written)):
            self._slots[:, TEXT] = -1
            self.notes.append(f"{counted(len(having), 'text')} with boxes not used: they hold no captions")

    def _fields(self, columns: Columns) -> Found | None:
        """The json fields that hold captions, label and split; captions only of samples that have no text."""
        having = np.flatnonzero(self._slots[:, JSON] >= 0)
        if not len(having):
            return None
        wanted = columns
        textless = having[self._slots[having, TEXT] < 0]
        if self._by_text:
            wanted = replace(columns, caption=None if len(textless) else "")
            having = textless if len(textless) else having
        spread = [self._json(int(i)) for i in having[:: max(1, len(having) // _SAMPLE)]]
        source = f"{self.name} (fields of its .json members)"
        found = find_fields(sample_columns(spread), wanted=wanted, source=source)
        if wanted.caption is None and not found.captions and len(having) > len(spread):
            every = [self._json(int(i)) for i in having[:: max(1, len(having) // _MANY)]]
            found = find_fields(sample_columns(every), wanted=wanted, source=source)
        self.notes += found.notes
        if not (found.captions or found.label or found.split) and not (columns.caption == columns.label == ""):
            names = sorted({name for fields in spread for name in fields})
            if textless.size:
                self.notes.append(f".json without captions and labels: their fields are {some(names, len(names))}")
        return found

    def _notes_on_side_cars(self) -> list[str]:
        """What a sample of the side-cars says that is not used: other captions in the json, nan for a caption, -1."""
        having = np.flatnonzero((self._slots[:, TEXT:] >= 0).any(1))
        chosen = [int(i) for i in having[:: max(1, len(having) // _SAMPLE)]]
        of = f"of {len(chosen):,} that were looked at"
        seen = self._seen(chosen)
        blank = sum(bool(self._slots[each.item, TEXT] >= 0) and not each.text.strip() for each in seen)
        nulls = sum(says_missing(line) for each in seen for line in each.text.split("\n"))
        names = self._found.captions if self._found else ()
        nulls += sum(says_missing(each.fields.get(name)) for each in seen for name in names)
        lines = [_lines_of(each.text) for each in seen]
        notes = [f"{counted(blank, 'text')} {of} {'is' if blank == 1 else 'are'} empty"] if blank else []
        notes += self._notes_on_other_captions(seen)
        if nulls:
            notes.append(f"{counted(nulls, 'caption')} such as nan or null {of} taken for missing")
        notes += notes_on_texts([line for each in lines for line in each]) + notes_on_lines(lines)
        return notes + self._notes_on_two_labels(seen, of)

    def _seen(self, items: Sequence[int]) -> list["_SideCars"]:
        """The side-cars of these items, but of those that cannot be read: the error is raised where they are used."""
        seen = []
        for i in items:
            try:
                fields, text = self._json(i), self._text(i)
                label: Any = self._class(i)
            except UserError:
                continue
            if self._found:
                label = label or fields.get(self._found.label or "", "")
            seen.append(_SideCars(i, fields, text, label))
        return seen

    def _notes_on_other_captions(self, seen: Sequence["_SideCars"]) -> list[str]:
        """A note where texts are used and the json beside them have captions that are none of these."""
        both, other = 0, []
        for each in seen:
            said = {name: captions_of(value) for name, value in each.fields.items() if usual(name, CAPTION_NAMES)}
            if self._by_text and each.text.strip() and any(said.values()):
                both += 1
                captions = set(self.captions(each.item))
                if not any(captions & set(values) for values in said.values()):
                    other.append(next(name for name, values in said.items() if values))
        if not other:
            return []
        return [
            f"{len(other):,} of {both:,} .json that were looked at have other captions than the text beside them, "
            f"which is used; choose with ?caption={other[0]}"
        ]

    def _notes_on_two_labels(self, seen: Sequence["_SideCars"], of: str) -> list[str]:
        """Notes on labels that are none, and on those that differ from the class that the folder says."""
        folders = set(self._labels)
        labelled = [each for each in seen if not is_missing(each.label)]
        no_labels = [each.label for each in labelled if label_of(each.label) is None]
        notes = [f"{note} ({of})" for note in unlabelled_notes(no_labels)]
        two_labels = [
            f"{self._keys[each.item]} ({label}, {self._labels[each.item]})"
            for each in labelled
            if (label := label_of(each.label)) not in (None, self._labels[each.item]) and label in folders
        ]
        if two_labels:
            shown = some(two_labels, len(two_labels))
            notes.append(
                f"{counted(len(two_labels), 'image')} {of} with two labels, the first of its own file: {shown}"
            )
        return notes

    def _take_split(self, split: str | None, folders: Sequence[str | None]) -> None:
        field = self._found.split if self._found else None
        if split is None:
            some_items = range(0, len(self), max(1, len(self) // 64))
            self.notes += split_notes([self._json(i).get(field) for i in some_items] if field else folders)
            self.notes += [] if field else unsplit_notes(folders)
            return
        values = [self._json(i).get(field) for i in range(len(self))] if field else folders
        chosen = select_split(values, split, source=self.name)
        self.notes += unsplit_notes(values, split)
        self._keys = [self._keys[i] for i in chosen]
        self._labels = [self._labels[i] for i in chosen]
        self._slots = self._slots[chosen]

    def _json(self, i: int) -> dict[str, Any]:
        member = int(self._slots[i, JSON])
        if member < 0:
            return {}
        place = self._place(i, JSON)
        try:
            fields = json.loads(decode_text(self._read(member), name=place))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place} is not JSON ({error})") from None
        if isinstance(fields, str | list):
            fields = {"captions": fields}
        if not isinstance(fields, dict):
            raise UserError(f"{place} is not a JSON object {{...}}")
        return fields

    def _text(self, i: int) -> str:
        """The content of the text; empty where there is none."""
        member = int(self._slots[i, TEXT])
        return decode_text(self._read(member), name=self._place(i, TEXT)) if member >= 0 else ""

    def _class(self, i: int) -> str:
        """The content of the class; empty where there is none."""
        member = int(self._slots[i, CLASS])
        return clean(decode_text(self._read(member), name=self._place(i, CLASS))) if member >= 0 else ""

    def _place(self, i: int, kind: int) -> str:
        """What messages call a side-car."""
        return f"{self.name}: {self._keys[i]}.{_SHOWN[kind]}"

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        """A caption per line of the text; else what the fields of the json say.

        A text of several lines that the json repeats as one caption, as img2dataset writes both, is one caption.
        """
        if self._slots[i, TEXT] >= 0:
            content = self._text(i)
            if (written := written_captions(content)) is not None:
                return written
            lines = [text for line in content.split("\n") if (text := clean(line)) and not says_missing(text)]
            if len(lines) > 1 and self._slots[i, JSON] >= 0:
                whole = clean(content)
                if whole in [text for value in self._json(i).values() for text in captions_of(value)]:
                    return [whole]
            if lines:
                return lines
        fields = self._json(i)
        names = [name for name in (self._found.captions if self._found else ()) if not is_missing(fields.get(name))]
        if not names and self._by_text:  # a json unlike the others, or one beside an empty text
            names = [name for name in fields if usual(name, CAPTION_NAMES)][:1]
        return [text for name in names for text in captions_of(fields[name])]

    def file(self, i: int) -> Path | bytes:
        return self._read(int(self._slots[i, IMAGE]))

    def image(self, i: int, size: int) -> np.ndarray:
        if not self.has_images:
            raise UserError(f"{self.name}: holds no images")
        return decode(self.file(i), size, name=f"{self.name}: {self._keys[i]}", limits=self._limits)

    def label(self, i: int) -> str | None:
        """The content of `key.cls`, else the json field of the label, else the folder of the image."""
        if self._slots[i, CLASS] >= 0:
            return label_of(self._class(i))
        if self._found and self._found.label:
            label = label_of(self._json(i).get(self._found.label))
            if label is not None:
                return label
        return self._labels[i]


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
