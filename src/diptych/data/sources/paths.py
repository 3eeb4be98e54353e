"""Paths of images: which file a table means by one, and which split and class the folders of one say."""

import os
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diptych.data.sources.columns import is_split
from diptych.data.sources.decode import SUFFIXES, is_image_path, without_number
from diptych.errors import UserError

_BESIDE = frozenset({"annotations", "annotation", "captions", "labels", "metadata", "splits"})
"""Folders of tables whose images lie beside the folder, as in COCO."""
_LONGEST, _DEEPEST = 4096, 100
"""Number of characters, and of folders, of the longest path that is looked for."""
_FOLDERS = 300
"""Number of folders in which images are looked for that do not lie where their table says."""
_LAST_NUMBER = re.compile(r"\d+$")
_FOLDER = re.compile(r"[/\\]")
_WINDOWS = re.compile(r"\\(?!x[0-9a-f]{2})")
_UPLOADED = re.compile(r"(?:^|/)upload/\d+/([0-9a-f]{6,8}-(.+))$")
_LOCAL_FILES = re.compile(r"/local-files/\?d=(.+)$")
"""How Label Studio calls files: uploaded ones, and those of a folder of the server."""
_SPLITS_OF = re.compile(r"(.+[-_ ])(train|training|test|testing|val|valid|validation|dev|pred)", re.IGNORECASE)
_SHARD = re.compile(r"(images?|img|part|chunk|batch|data|shard|split)[-_]?\d+", re.IGNORECASE)
_REPEATS = re.compile(r"[1-9]\d?_\D")
"""How folders for kohya's scripts begin: with the number of times that their images are seen in an epoch."""
_DATE = re.compile(r"(19|20)\d\d([ ._-]?\d\d?)*")
_VIEWS = frozenset(
    {"a", "b", "left", "right", "input", "output", "target", "source", "before", "after", "original", "edited"}
    | {"hr", "lr", "high", "low", "gt", "rgb", "ir", "nir", "thermal", "depth", "photo", "sketch", "image", "condition"}
)
"""Folders that hold one thing in several forms, and no classes."""
_PLAIN = frozenset({"..", "image", "images", "img", "imgs", "jpegimages"})
"""Folders that are no class, wherever they are."""


class ImagePaths:
    """Finds the file that a table means by a path. Each folder is listed once."""

    def __init__(self) -> None:
        self._listings: dict[str, _Listing] = {}

    def find(self, folder: Path, value: str) -> tuple[str, bool]:
        """The path of an image relative to ``folder``, and whether there is such a file.

        Also found are files and folders whose accents Unicode writes in the other way, or that no other differs from
        but in capitals, paths with backslashes, names that lack their suffix, numbers for the names that end in them
        (`42` for `COCO_val2014_000000000042.jpg`), names as addresses write them (`my%20cat.jpg`), and what Label
        Studio makes of the name of a file that was uploaded to it.
        """
        if len(value) > _LONGEST or value.count("/") > _DEEPEST:
            return value, False
        value = unquote(value.strip()[7:]) if value.strip().startswith("file://") else value.strip()
        value = without_number(value) if is_image_path(value) else value
        for spelling in dict.fromkeys((value, value.replace("\\", "/"), unquote(value), *_before_upload(value))):
            head, base = os.path.split(os.path.normpath(os.path.join(folder, spelling)))
            listing = self._listing(head)
            if (name := listing.named(base) or listing.without_suffix(base)) is not None:
                return os.path.join(listing.path, name), True
        path = os.path.normpath(os.path.join(folder, value))
        return (path, True) if os.path.isfile(path) else (without_number(path), False)

    def near(self, path: str) -> str:
        """A file that is called like the missing ``path`` but for the suffix, in words for a message; else nothing."""
        folder, base = os.path.split(path)
        same = self._listing(folder).stems.get(_composed(os.path.splitext(base)[0]))
        return f", but {same[0]} does; write the names as the files have them" if same else ""

    def _listing(self, folder: str) -> "_Listing":
        if folder not in self._listings:
            self._listings[folder] = _Listing(self._real(folder))
        return self._listings[folder]

    def _real(self, folder: str) -> str:
        """The path that a folder really has; ``folder`` itself where there is none."""
        head, base = os.path.split(folder)
        if os.path.isdir(folder or ".") or head == folder:
            return folder
        outer = self._listing(head)
        name = outer.named(base)
        return folder if name is None else os.path.join(outer.path, name)

    def roots(self, table: Path, values: Sequence[str]) -> "Roots":
        """The folders that the paths in a table are relative to: its own, else the one near it that has the images,
        else several that share them.

        Raises UserError where two folders qualify.
        """
        values = list(dict.fromkeys(values))
        if not values or any(self.find(table.parent, value)[1] for value in _few(values)):
            return Roots((table.parent,))
        for begin in ("", *_beginnings(values)):
            rest = [value[len(begin) :] for value in values]
            # Of a path of another machine at least one folder must be that of a file here.
            called = "" if not begin or all(map(_FOLDER.search, rest)) else _FOLDER.split(begin)[-2]
            if found := self._folders(table, rest, called=called):
                return Roots(found, begin)
        return Roots((table.parent,))

    def _folders(self, table: Path, values: Sequence[str], *, called: str) -> tuple[Path, ...]:
        """The folders near a table, ``called`` so if given, that have most images of a sample; none if none does."""
        sample = _few(values)
        nears = [table.parent]
        if table.absolute().parent.name.lower() in _BESIDE:
            nears.append(Path(os.path.normpath(table.parent / "..")))
        for near in nears:
            having: dict[Path, set[str]] = {}
            for folder in folders_below(near):
                if not called or folder.absolute().name.casefold() == called.casefold():
                    having[folder] = {value for value in sample if self.find(folder, value)[1]}
            most = max(map(len, having.values()), default=0)
            found = len(set().union(*having.values()))
            if 4 * most <= 3 * found and found == sum(map(len, having.values())) >= max(1, len(sample) // 2):
                return tuple(
                    folder
                    for folder, some_values in having.items()
                    if some_values or any(self.find(folder, value)[1] for value in _few(values, 1024))
                )
            if most < max(1, len(sample) // 2):
                continue
            best = [folder for folder in having if len(having[folder]) == most]
            best = [folder for folder in best if folder.name and folder.name in table.stem] or best
            if len(best) > 1:
                raise UserError(
                    f"{table}: its images may be those in {best[0]} or in {best[1]}; write the folder into the paths"
                )
            return (best[0],)
        return ()

    def find_in(self, roots: "Roots", value: str) -> tuple[str, bool]:
        """As `find`, in several folders. Raises UserError where two have the image."""
        value = value[len(roots.without) :]
        if len(roots.folders) > 1:  # for a plain name one look is enough in each
            having = [folder for folder in roots.folders if value in self._listing(str(folder)).names]
            if len(having) == 1:
                return os.path.join(having[0], self._listing(str(having[0])).names[value]), True
        found = [self.find(folder, value) for folder in roots.folders]
        there = [each for each in found if each[1]]
        if len(there) > 1:
            raise UserError(f"{there[0][0]}: lies in {there[1][0]} too; write the folder into the paths")
        return there[0] if there else found[0]


class _Listing:
    """The names in a folder, by the ways in which a table may write them."""

    def __init__(self, path: str) -> None:
        """A ``path`` that cannot be listed counts as an empty folder."""
        self.path = path
        try:
            found = os.listdir(path or ".")
        except OSError:
            found = []
        self.names = {_composed(name): name for name in found}

    def named(self, base: str) -> str | None:
        """The name that a file or folder really has; None if it is not there."""
        base = _composed(base)
        if base in self.names:
            return self.names[base]
        same = self._small.get(base.lower(), ())
        return same[0] if len(same) == 1 else None

    def without_suffix(self, base: str) -> str | None:
        """The one image that is called ``base`` but for its suffix, or that ends in the number ``base``."""
        if is_image_path(base):
            return None
        same = self.stems.get(_composed(base), ())
        if not same and base.isdecimal():
            same = self._numbers.get(int(base), ())
        return same[0] if len(same) == 1 else None

    @cached_property
    def stems(self) -> dict[str, list[str]]:
        """The images by their names without suffix."""
        found: dict[str, list[str]] = {}
        for composed, name in self.names.items():
            stem, suffix = os.path.splitext(composed)
            if suffix.lower() in SUFFIXES:
                found.setdefault(stem, []).append(name)
        return found

    @cached_property
    def _numbers(self) -> dict[int, list[str]]:
        """The images by the numbers that their stems end in."""
        found: dict[int, list[str]] = {}
        for stem, names in self.stems.items():
            if digits := _LAST_NUMBER.search(stem):
                found.setdefault(int(digits[0]), []).extend(names)
        return found

    @cached_property
    def _small(self) -> dict[str, list[str]]:
        """All names by their small letters. They are not case-folded: ss is another spelling than sharp s."""
        found: dict[str, list[str]] = {}
        for composed, name in self.names.items():
            found.setdefault(composed.lower(), []).append(name)
        return found


def _composed(name: str) -> str:
    """The name with each accent in one character with its letter, as most systems write it."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass(frozen=True, slots=True)
class Roots:
    """Where the images of a table lie."""

    folders: tuple[Path, ...]
    """Folders that its paths are relative to; each image is in one."""
    without: str = ""
    """What all of its paths begin with that is not here: folders of another machine."""


def _beginnings(values: Sequence[str]) -> list[str]:
    """The folders that all of these paths begin with, the outermost first: `/`, `/a/` and `/a/b/` of `/a/b/c.jpg`."""
    first, last = min(values), max(values)
    shared = next((first[:i] for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), first)
    return [shared[: mark.end()] for mark in _FOLDER.finditer(shared)]


def _few(values: Sequence[str], count: int = 8) -> Sequence[str]:
    return values[:: max(1, len(values) // count)]


def _before_upload(value: str) -> list[str]:
    """The names of a file, with its folders and without, before Label Studio gave it a path of its own."""
    if (local := _LOCAL_FILES.search(value)) is not None:
        place = unquote(local[1])
        return [place, os.path.basename(place)]
    found = _UPLOADED.search(value)
    return [] if found is None else [unquote(found[1]), unquote(found[2])]


def folders_below(folder: Path, depth: int = 3) -> list[Path]:
    """``folder`` and the folders in it, ``depth`` deep, at most 300."""
    found, level = [folder], [folder]
    for _ in range(depth):
        inner: list[Path] = []
        for parent in level:
            try:
                with os.scandir(parent) as entries:
                    names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            except OSError:
                continue
            inner += [parent / name for name in names]
        found, level = (found + inner)[:_FOLDERS], inner[:_FOLDERS]
    return found


def files_of_addresses(folder: Path, addresses: Sequence[str]) -> tuple[str, Sequence[str | None]]:
    """How the files near a table are called, and the path of each address, relative to ``folder``."""
    files: dict[str, list[str]] = {}
    for place in folders_below(folder):
        for file in os.listdir(place) if place.is_dir() else ():
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in SUFFIXES or re.fullmatch(r"\d+_\d+", file):
                stem = stem if suffix else file
                files.setdefault(stem, []).append(os.path.relpath(place / file, folder))
    one = {stem: found[0] for stem, found in files.items() if len(found) == 1}  # of a name in two folders neither is
    numbers = {int(stem): path for stem, path in one.items() if stem.isdecimal()}
    first = 1 if len(addresses) in numbers and 0 not in numbers else 0
    if numbers and max(numbers) >= first + len(addresses):
        numbers = {}  # they number something else
    ends = [os.path.splitext(unquote(urlsplit(address).path).rpartition("/")[2])[0] for address in addresses]
    often = Counter(ends)
    checked = [f"{number}_{zlib.crc32(address.encode())}" for number, address in enumerate(addresses)]
    ways = {
        "row number and checksum of the address": [one.get(name) for name in checked],
        f"row numbers, counted from {first}": [numbers.get(number + first) for number in range(len(addresses))],
        "the end of the address": [one.get(end) if end and often[end] == 1 else None for end in ends],
    }
    return max(ways.items(), key=lambda way: sum(map(bool, way[1])))


def splits_of(names: Sequence[str]) -> list[str | None]:
    """Of each relative path the outermost folder that is called like a split."""
    also = split_folders(names)
    return [
        next((folder for folder in with_slashes(name).split("/")[:-1] if is_split(folder) or folder in also), None)
        for name in names
    ]


def split_folders(names: Iterable[str]) -> frozenset[str]:
    """The folders of these paths that are splits of one name, such as `seg_train` and `seg_test`."""
    of_name: dict[str, set[str]] = {}
    paths = {os.path.dirname(with_slashes(name)) for name in names}
    for folder in {folder for path in paths for folder in path.split("/")}:
        if found := _SPLITS_OF.fullmatch(folder):
            of_name.setdefault(found[1].casefold(), set()).add(folder)
    parts = [each for each in of_name.values() if len(each) > 1 and any("train" in part.lower() for part in each)]
    return frozenset[str]().union(*parts)


def with_slashes(name: str) -> str:
    """The name of a file that was packed on Windows, with slashes. What stands for a byte that is no UTF-8 stays."""
    return _WINDOWS.sub("/", name) if "\\" in name else name


def folder_labels(names: Sequence[str], shards: frozenset[str] = frozenset()) -> tuple[list[str | None], list[str]]:
    """The outermost folder of each file as its class, as torchvision has it; splits and ``shards`` are none.

    A folder that holds all files says nothing about them, and is no class either. Also returned is a note where folders
    of classes hold folders that could be meant for classes too.
    """
    paths = _class_folders(names, shards)
    labels = [path[0] if path else None for path in paths]
    if len(set(labels)) < 2:
        return [None] * len(labels), []
    nested = next(((name, path[0]) for name, path in zip(names, paths, strict=True) if len(path) > 1), None)
    notes = [f"classes are the outermost folders, such as {nested[1]!r} for {nested[0]}"] if nested else []
    return labels, notes + _doubts([name for name, label in zip(names, labels, strict=True) if label], labels)


def _doubts(names: Sequence[str], labels: Sequence[str | None]) -> list[str]:
    """A note where folders that are taken for classes may be something else: two views, such as `A` and `B`, or
    numbered videos."""
    inside: dict[str, set[str]] = defaultdict(set)
    for name, label in zip(names, filter(None, labels), strict=True):
        inside[label].add(os.path.splitext(name)[0].partition(f"{label}/")[2])
    first, *others = inside or [""]
    unnumbered = {_LAST_NUMBER.sub("", label) for label in inside}
    why = ""
    if len(inside[first]) > 1 and all(inside[other] == inside[first] for other in others):
        why = "though they hold files of the same names"
    elif len(unnumbered) == 1 and not unnumbered & {"", "n"}:  # numbers alone and WordNet's are codes of classes
        why = "though they are numbered alike"
    elif all(label.lower() in _VIEWS or _DATE.fullmatch(label) for label in inside):
        why = "though they are called like views or dates"
    elif all(map(_REPEATS.match, inside)):
        why = "and numbers of repeats, if these are some, are not read"
    return [f"folders such as {first} and {others[0]} are taken for classes, {why}"] if why and others else []


def _class_folders(names: Sequence[str], shards: frozenset[str]) -> list[list[str]]:
    """The folders of each file that may be classes, without those that hold all files."""
    splits = split_folders(names)

    def may_be_class(folder: str) -> bool:
        plain = folder.lower() in _PLAIN or _SHARD.fullmatch(folder) is not None
        return not plain and not is_split(folder) and folder not in splits

    paths = []
    for name in names:
        folders = with_slashes(name).lstrip("/").split("/")[:-1]
        known = ["/".join(folders[: i + 1]) in shards for i in range(len(folders))]
        paths.append([each for each, shard in zip(folders, known, strict=True) if not shard and may_be_class(each)])
    shared = 0
    while len({tuple(path[: shared + 1]) for path in paths}) == 1 and len(paths[0]) > shared:
        shared += 1
    return [path[shared:] for path in paths]
