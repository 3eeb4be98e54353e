"""Opening a source: a short text, the spec, names any kind of data, and `open_source` finds its items.

    folder/                                  images, with name.txt beside them or a metadata.csv / metadata.jsonl
    table.csv .tsv .json .jsonl .parquet     a row per image or text
    shards-{000..012}.tar                    WebDataset; also globs and lists with commas, as for every kind of file
    texts.txt                                a text per line
    s3://bucket/shard-{000..331}.tar         tars, tables and texts behind an address: also gs://, hf://, https://
    hub:owner/name[:split][?config]          a data set of the hub
    scenes:                                  the built-in world

Options follow a question mark: `photos.tar?split=train&caption=title`. Of every kind `keep=FILE` keeps the items that a
file lists, as `diptych audit` writes one. Files may end in .gz where they are text.

Shapes: S pixels of a side.
"""

import glob
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import SUFFIXES, ImageLimits
from diptych.data.sources.remote import RemoteFile, find_remote, is_remote
from diptych.data.sources.rows import TABLE_SUFFIXES, read_rows
from diptych.data.sources.table import open_tables, unknown_split
from diptych.data.sources.text import TextSource, captions_of
from diptych.errors import UserError

_OPTIONS = ("split", "image", "caption", "label")
_HUB_OPTIONS = (*_OPTIONS, "config", "revision")
_OTHER_TABLES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as csv in UTF-8"),
    **dict.fromkeys((".arrow", ".feather", ".pkl", ".pickle", ".h5", ".hdf5"), "save the table as parquet"),
    **dict.fromkeys((".bz2", ".xz", ".zst"), "unpack it, or pack it with gzip"),
}
"""What to do with tables that are not read, by their suffix."""
_LIMITS = ImageLimits()
_KEEP = re.compile(r"(?P<mark>[?&])keep=(?P<file>[^&]+)(?P<more>&|$)")
_log = logging.getLogger(__name__)
_logged: set[str] = set()


@runtime_checkable
class Source(Protocol):
    """Items that can be read in any order, from any thread. Pixels are decoded when asked for and never kept."""

    @property
    def name(self) -> str:
        """What messages and reports call the source."""

    @property
    def has_images(self) -> bool:
        """Whether any item has an image."""

    @property
    def has_captions(self) -> bool:
        """Whether any item may have a caption."""

    def __len__(self) -> int:
        """Number of items."""

    def key(self, i: int) -> str:
        """A name of item ``i`` for messages and lists, for example its path."""

    def captions(self, i: int) -> list[str]:
        """All captions, clean and not empty; an empty list for an item that has none."""

    def image(self, i: int, size: int) -> UInt8[np.ndarray, "S S 3"]:
        """The centre square, resized to ``size``. Raises UnreadableImage for an image that cannot be used."""

    def label(self, i: int) -> str | None:
        """The name of the class, where the source knows classes."""


@runtime_checkable
class HasNotes(Protocol):
    """A source that has something to say about itself."""

    @property
    def notes(self) -> Sequence[str]:
        """What is not used, or read otherwise than its owner may expect, a line each."""


@runtime_checkable
class HasFiles(Protocol):
    """A source whose images are files, of a disk or inside another file."""

    def file(self, i: int) -> Path | bytes:
        """The image file of item ``i``: its path, or its bytes where it lies inside another file."""


@runtime_checkable
class HasBlocks(Source, HasFiles, Protocol):
    """A source whose image files can be compared before they are read whole."""

    def block(self, i: int) -> tuple[int, bytes]:
        """Bytes of the image file of item ``i``, 0 where it should not be compared, and a few of them."""


@runtime_checkable
class HasShards(Protocol):
    """A source of several files that are read one after another with less effort than in turn."""

    @property
    def shards(self) -> np.ndarray:
        """Number of the file of each item, int64 [N], never falling."""


@runtime_checkable
class HasSides(Protocol):
    """What a `Source` and a `Store` of encoded data have in common."""

    @property
    def has_images(self) -> bool: ...

    @property
    def has_captions(self) -> bool: ...


def require_pairs(source: HasSides, name: str) -> None:
    """Raise UserError where the source or store ``name`` lacks images or captions."""
    if not (source.has_images and source.has_captions):
        lacks = "captions" if source.has_images else "images"
        raise UserError(f"{name}: pairs need images and captions, and it has no {lacks}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The parts of the text that names a source."""

    place: str
    """Path, glob, list of files or name at the hub."""
    options: dict[str, str]

    @classmethod
    def parse(cls, spec: str) -> "Spec":
        """Take a spec apart. Raises UserError for an unknown option.

        What follows a `?` is taken for options only where it looks like options: `?` is also a wildcard and may be in
        a name.
        """
        place, _, tail = spec.rpartition("?")
        allowed = _HUB_OPTIONS if spec.startswith("hub:") else _OPTIONS
        if spec.startswith("hub:") and re.fullmatch(r"[\w.-]+(&.*)?", tail):
            tail = f"config={tail}"
        if not place or os.path.exists(spec) or not re.fullmatch(r"\w+=[^&]*(&\w+=[^&]*)*", tail):
            return cls(place=spec, options={})
        options = dict(part.split("=", 1) for part in tail.split("&"))
        for name in options:
            if name not in allowed:
                raise UserError(f"{spec}: no option {name!r}; the options are {', '.join(allowed)}")
        return cls(place=place, options=options)


def open_source(
    spec: str, *, columns: Columns | None = None, split: str | None = None, limits: ImageLimits = _LIMITS
) -> Source:
    """Open a source: find its items and columns, and read no pixels.

    Its notes go to the logger of this module as warnings, each once in a process. Raises UserError, one line, for
    whatever is missing, empty, ambiguous or damaged.

    Args:
        spec: Names the source, as at the top of this file. Its options take precedence over the arguments.
        columns: Names of columns that cannot be guessed.
        split: The one split to use; by default all items are used.
        limits: Images beyond these are unreadable.
    """
    source = find_source(spec, columns=columns, split=split, limits=limits)
    for note in source.notes if isinstance(source, HasNotes) else ():
        if (line := f"{source.name}: {note}") not in _logged:
            _logged.add(line)
            _log.warning("%s", line)
    return source


def find_source(
    spec: str, *, columns: Columns | None = None, split: str | None = None, limits: ImageLimits = _LIMITS
) -> Source:
    """As `open_source`, but leaves the notes to the caller."""
    if keep := _KEEP.search(spec):
        rest = spec[: keep.start()] + (keep["mark"] if keep["more"] else "") + spec[keep.end() :]
        return kept(find_source(rest, columns=columns, split=split, limits=limits), Path(keep["file"]))
    if spec.startswith("scenes:"):
        from diptych.data.scenes import ScenesSource

        if split is not None and "split=" not in spec:
            spec += ("&" if "?" in spec else "?") + f"split={split}"
        return ScenesSource.from_spec(spec)
    parsed = Spec.parse(spec)
    options = parsed.options
    split = options.get("split", split) or None
    named = {name: value for name, value in options.items() if name in ("image", "caption", "label")}
    columns = replace(columns or Columns(), **named)
    if spec.startswith("hub:"):
        return _open_hub(parsed, columns=columns, split=split, limits=limits)
    paths = remote_files(parsed.place) if is_remote(parsed.place) else find_files(parsed.place)
    if _kind(paths[0]) == "text" and options:
        raise UserError(f"{spec}: a text file has no columns and no splits")
    return _open_files(paths, name=parsed.place, columns=columns, split=split, limits=limits)


def open_finite(spec: str, columns: Columns) -> Source:
    """Open a source that is gone through from end to end: of endless scenes the first 20,000."""
    return first_scenes(open_source(spec, columns=columns))


def first_scenes(source: Source) -> Source:
    """The source itself, but of endless scenes the first 20,000."""
    if not source.name.startswith("scenes:"):  # spare other sources the import of torch
        return source
    from diptych.data.scenes import ENDLESS, ScenesSource

    if isinstance(source, ScenesSource) and source.count == ENDLESS:
        return replace(source, count=20_000)
    return source


class KeptSource:
    """The items of another source that a file lists, with the captions that it gives them."""

    def __init__(self, source: Source, items: list[int], captions: list[list[str]], file: Path):
        self.source, self.items, self.keep_file = source, items, file
        self.name, self.has_images, self._captions = source.name, source.has_images, captions
        self.has_captions = any(captions)
        self.notes = list(source.notes) if isinstance(source, HasNotes) else []

    def __len__(self) -> int:
        return len(self.items)

    def key(self, i: int) -> str:
        return self.source.key(self.items[i])

    def captions(self, i: int) -> list[str]:
        return list(self._captions[i])

    def image(self, i: int, size: int) -> UInt8[np.ndarray, "S S 3"]:
        return self.source.image(self.items[i], size)

    def label(self, i: int) -> str | None:
        return self.source.label(self.items[i])


class KeptFiles(KeptSource):
    """The same of a source whose images are files."""

    source: Any

    def file(self, i: int) -> Path | bytes:
        return self.source.file(self.items[i])


class KeptBlocks(KeptFiles):
    """The same of a source whose image files can be compared."""

    def block(self, i: int) -> tuple[int, bytes]:
        return self.source.block(self.items[i])


def kept(source: Source, file: Path) -> KeptSource:
    """What `keep.jsonl` of `diptych audit` leaves of a source: a line {"key": ..., "captions": [...]} for each item.

    Without captions in a line, an item keeps all of its own. Raises UserError for a key that the source does not have.
    """
    at = {source.key(i): i for i in range(len(source))}
    items, captions = [], []
    for number, row in enumerate(read_rows(file), start=1):
        if (item := at.get(str(row.get("key")))) is None:
            raise UserError(f"{file}: row {number}: {source.name} has no item {row.get('key')!r}: audit it again")
        items.append(item)
        captions.append(captions_of(row["captions"]) if "captions" in row else source.captions(item))
    kind = KeptBlocks if isinstance(source, HasBlocks) else KeptFiles if isinstance(source, HasFiles) else KeptSource
    return kind(source, items, captions, file)


def _open_hub(spec: Spec, *, columns: Columns, split: str | None, limits: ImageLimits) -> Source:
    from diptych.data.sources.arrow import open_hub

    repository, _, inline = spec.place.removeprefix("hub:").partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise UserError(f"{spec.place}: a data set of the hub is written hub:owner/name[:split][?config]")
    return open_hub(
        repository,
        config=spec.options.get("config"),
        revision=spec.options.get("revision"),
        columns=columns,
        split=inline or split,
        limits=limits,
    )


def _open_files(
    found: Sequence[Path | RemoteFile], *, name: str, columns: Columns, split: str | None, limits: ImageLimits
) -> Source:
    kinds = {_kind(path) for path in found}
    if len(kinds) > 1:
        raise UserError(f"{name}: files of different kinds ({', '.join(sorted(kinds))}) cannot be one source")
    kind = kinds.pop()
    if kind == "tar":
        from diptych.data.sources.webdataset import WebDatasetSource

        return WebDatasetSource(found, name=name, columns=columns, split=split, limits=limits)
    paths = [path.kept() if isinstance(path, RemoteFile) else path for path in found]
    match kind:
        case "folder":
            from diptych.data.sources.folder import open_folder

            if len(paths) > 1:
                raise UserError(f"{name}: {len(paths)} folders; give the one folder that holds them")
            return open_folder(paths[0], name=name, columns=columns, split=split, limits=limits)
        case "parquet":
            from diptych.data.sources.arrow import open_parquet

            return open_parquet(paths, name=name, columns=columns, split=split, limits=limits)
        case "table":
            from diptych.data.sources.folder import notes_on_class_folders

            source = open_tables(paths, name=name, columns=columns, split=split, limits=limits)
            if not source.has_captions:
                source.notes += notes_on_class_folders(source, paths[0].name, paths[0].parent)
            return source
    if split is not None:
        raise unknown_split(split, (), source=name)
    return TextSource(list(paths), name=name)


def _kind(path: Path | RemoteFile) -> str:
    if isinstance(path, Path) and path.is_dir():
        return "folder"
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if name.endswith((".tar", ".parquet")):
        return name.rpartition(".")[2]
    if suffix in TABLE_SUFFIXES and suffix != ".parquet":  # which may not end in .gz
        return "table"
    if suffix == ".txt":
        return "text"
    if name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"{path}: a compressed tar allows no random access; gunzip it first")
    if suffix in SUFFIXES:
        raise UserError(f"{path}: is one image; give its folder")
    if suffix in (".zip", ".7z", ".rar"):
        raise UserError(f"{path}: is packed; unpack it, and give the folder")
    if suffix in _OTHER_TABLES:
        raise UserError(f"{path}: is not read; {_OTHER_TABLES[suffix]}")
    raise UserError(
        f"{path}: not a kind of source; give a folder of images, a .csv, .tsv, .json, .jsonl, .parquet, .tar or .txt "
        "file, hub:owner/name or scenes:"
    )


def find_files(place: str) -> list[Path]:
    """The files or the folder that a path, a glob, `{000..012}`, `{a,b}` or a list with commas stands for, in order."""
    place = os.path.expanduser(place)
    if os.path.exists(place):
        return [Path(place)]
    found: list[Path] = []
    for pattern in _patterns(place):
        if os.path.exists(pattern):
            matches = [pattern]
        else:
            matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []
        if not matches:
            raise UserError(f"{pattern or repr(place)}: {'matches no file' if '*' in pattern else 'does not exist'}")
        found += [Path(match) for match in matches]
    return list(dict.fromkeys(found))


def remote_files(place: str) -> list[RemoteFile]:
    """As `find_files`, of addresses. Asks their servers. Raises UserError for a file that is missing."""
    return find_remote(_patterns(place))


def _patterns(place: str) -> list[str]:
    parts = re.split(r",(?![^{}]*\})", place)
    return [pattern for part in parts for pattern in expand_braces(part.strip())]


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}.tar` and `a{x,y}.tar` as the shell expands them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    body = match.group(1)
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", body):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        if abs(int(last) - int(first)) > 1_000_000:
            raise UserError(f"{pattern}: stands for more than a million files")
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    elif "," in body:
        choices = body.split(",")
    else:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [whole for choice in choices for whole in expand_braces(head + choice + tail)]
