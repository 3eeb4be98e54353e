"""WebDataset tars: members of one name are a sample (key.jpg, key.txt, key.json, key.cls), as `samples.py` says.

Opening a tar reads only the headers of its members, about ten times quicker than `tarfile`. After that each member is
read alone, with a seek, when it is asked for. Nothing is ever unpacked to disk, so names cannot escape. A tar behind an
address is indexed once; `remote.py` says what is kept of it.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import SUFFIXES, ImageLimits
from diptych.data.sources.folder import SampleSource
from diptych.data.sources.paths import folder_labels, splits_of
from diptych.data.sources.remote import RemoteFile, index_all
from diptych.data.sources.samples import (
    IMAGE,
    Groups,
    group,
    group_texts,
    unused_notes,
)
from diptych.data.sources.table import BLOCK, counted, file_split_notes, some
from diptych.data.sources.text import what_begins
from diptych.errors import UserError

_BLOCK = 512
_FILES = (b"0", b"\0", b"7")
_LINKS, _SPARSE = (b"1", b"2"), b"S"
"""Hard and symbolic links, and files with holes, which are not read."""
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}


class WebDatasetSource(SampleSource):
    """Samples of one or several tars, of which only an index is held in memory: some 100 bytes a sample and the keys.

    A sample never spans shards.
    """

    def __init__(
        self,
        paths: Sequence[Path | RemoteFile],
        *,
        name: str,
        columns: Columns,
        split: str | None,
        limits: ImageLimits,
    ):
        self._paths = list(paths)
        index_all([path for path in paths if isinstance(path, RemoteFile)], _remote_members)
        index = _Index()
        for shard, path in enumerate(self._paths):
            index.add_shard(shard, path, columns)
        if not index.keys:
            index.add_texts()
        if not index.keys:
            raise UserError(
                f"{name}: holds no images (key.jpg, key.png, key.webp ...) and no texts (key.txt, key.json)"
            )
        self._places = np.frombuffer(index.places, dtype=np.int64).reshape(-1, 3)
        slots = np.array(index.slots, dtype=np.int64).reshape(-1, 4)
        labels, nested = folder_labels(index.keys)
        super().__init__(
            self._keys_over_shards(index.keys, slots),
            slots,
            name=name,
            labels=labels,
            splits=splits_of(index.keys),
            columns=columns,
            split=split,
            limits=limits,
            texts_named=index.texts_named,
            notes=index.notes(nested),
        )
        if split is None:
            self.notes += file_split_notes(self._paths)
        if not self.has_images and not self.has_captions:
            raise UserError(f"{name}: holds no images and no captions")

    def _keys_over_shards(self, keys: list[str], slots: np.ndarray) -> list[str]:
        """The keys, below the name of their tar where there are several."""
        if len(self._paths) == 1:
            return keys
        shards = self._places[slots.max(1), 0].tolist()
        return [f"{self._paths[shard].stem}/{key}" for shard, key in zip(shards, keys, strict=True)]

    @property
    def shards(self) -> np.ndarray:
        """Number of the tar of each item, int64 [N], never falling."""
        return self._places[self._slots.max(1), 0]

    def block(self, i: int) -> tuple[int, bytes]:
        shard, offset, size = self._places[self._slots[i, IMAGE]].tolist()
        path = self._paths[shard]
        if isinstance(path, RemoteFile):  # nothing is fetched to be compared
            return 0, b""
        return size, read(path, offset + size // 2, min(BLOCK, size - size // 2))

    def _read(self, member: int) -> bytes:
        shard, offset, size = self._places[member].tolist()
        return read(self._paths[shard], offset, size)


class _Index:
    """The samples of several tars, whose members are numbered through, and the names of what belongs to none."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.slots, self.places = array("q"), array("q")
        """As `Groups.slots`, end to end; and of each member its shard, its offset and its size."""
        self.texts_named = False
        self._lone: list[tuple[list[str], list[int]]] = []
        """Of each shard the names and the numbers of the side-cars without an image."""
        self._second: list[str] = []
        self._unused: list[str] = []
        self._masks: list[str] = []
        self._empty: list[str] = []
        self._replaced: list[str] = []

    def add_shard(self, shard: int, path: Path | RemoteFile, columns: Columns) -> None:
        found = list(members(path))
        if not found:
            self._empty.append(path.name)
        first = len(self.places) // 3
        for member in found:
            self.places.extend((shard, member.offset, member.size))
        names = self._last_versions([os.path.normpath(member.name) for member in found], path)
        groups = group(names, columns, source=str(path))
        self._add(groups, range(first, first + len(found)))
        self.texts_named |= groups.texts_named
        self._lone.append(([names[i] for i in groups.lone], [first + i for i in groups.lone]))
        self._second += [names[i] for i in groups.second]
        self._unused += [names[i] for i in groups.unused]
        self._masks += [names[i] for i in groups.masks]

    def _last_versions(self, names: list[str], path: Path | RemoteFile) -> list[str]:
        """The names of members, and `.` for those that later ones replace: `tar -r` adds a new version at the end."""
        last = {name: number for number, name in enumerate(names)}
        if count := len(names) - len(last):
            self._replaced.append(f"{counted(count, 'member')} of {path} replaced by later ones of the name")
        return [name if last[name] == number else "." for number, name in enumerate(names)]

    def add_texts(self) -> None:
        """Make samples of the side-cars without an image, for tars that hold texts alone."""
        for names, numbers in self._lone:
            groups = group_texts(names, range(len(names)))
            self._add(groups, numbers)
            self._second += [names[i] for i in groups.second]
        self._lone = []

    def _add(self, groups: Groups, numbers: Sequence[int]) -> None:
        """Add samples, given the numbers of the members that were grouped."""
        self.keys += groups.keys
        self.slots.extend(numbers[slot] if slot >= 0 else -1 for sample in groups.slots for slot in sample)

    def notes(self, nested: list[str]) -> list[str]:
        """Notes on the members that are not used; ``nested`` are those on folders, which stand in between."""
        empty = self._empty
        lone = [name for names, _ in self._lone for name in names]
        return [
            *self._replaced,
            *([f"{counted(len(empty), 'tar')} without a file: {some(empty, len(empty))}"] if empty else []),
            *nested,
            *unused_notes(lone, self._second, self._unused, self._masks, packed=True),
        ]


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file inside a tar."""

    name: str
    offset: int
    """Byte of the tar where its content begins; below 0 where the content is kept beside the index."""
    size: int
    """Bytes of its content."""


def members(path: Path | RemoteFile) -> Iterator[Member]:
    """The files of a tar (ustar, GNU long names, pax paths), in order, and those that links in it stand for.

    A link to what the tar does not hold is an empty file. Several tars that were joined end to end are read as one.
    Raises UserError when the tar is cut short.
    """
    if isinstance(path, RemoteFile):
        yield from _remote_members(path)
        return
    try:
        with open(path, "rb", buffering=_BLOCK) as file:
            yield from _members(file.fileno(), path, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _remote_members(tar: RemoteFile) -> list[Member]:
    def scan(descriptor: int) -> Iterator[tuple[str, int, int]]:
        for member in _members(descriptor, tar, tar.size):
            yield member.name, member.offset, member.size

    def is_image(name: str) -> bool:
        return os.path.splitext(name)[1].lower() in SUFFIXES

    return [Member(*entry) for entry in tar.index(scan, is_large=is_image)]


def read(path: Path | RemoteFile, offset: int, size: int) -> bytes:
    """The bytes of a member. Opens the file anew: safe in any thread, and any number of shards is possible."""
    if isinstance(path, RemoteFile):
        return path.read(offset, size)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: can no longer be read ({error.strerror})") from None


def _members(descriptor: int, path: Path | RemoteFile, end: int) -> Iterator[Member]:
    position, long_name = 0, None
    files: dict[str, Member] = {}
    links: list[tuple[str, str, int]] = []
    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if len(header) == _BLOCK and not any(header):
            if (following := _next_header(descriptor, position + _BLOCK)) is None:
                yield from (_linked(files, name, target, place) for name, target, place in links)
                return
            position = following
            continue
        size = _size(header, path, position, end)
        start, kind = position + _BLOCK, header[156:157]
        position = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"L", b"x", b"g"):
            body = os.pread(descriptor, size, start)
            long_name = _long_name(body, kind) or long_name
            continue
        name = long_name or _short_name(header)
        if kind in _FILES:
            member = files[os.path.normpath(name)] = Member(name, start, size)
            yield member
        elif kind in _LINKS:
            target = header[157:257].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
            folder = os.path.dirname(name) if kind == b"2" else ""
            links.append((name, os.path.normpath(os.path.join(folder, target)), start))
        elif kind == _SPARSE:
            yield Member(name, start, 0)
        long_name = None


def _next_header(descriptor: int, position: int) -> int | None:
    """Byte of the next block that is not all zeros; None where the file ends before one."""
    while data := os.pread(descriptor, 2**16, position):
        if any(data):
            offset = next(i for i, byte in enumerate(data) if byte)
            return position + offset // _BLOCK * _BLOCK
        position += len(data)
    return None


def _linked(files: dict[str, "Member"], name: str, target: str, place: int) -> "Member":
    found = files.get(target)
    return Member(name, found.offset, found.size) if found is not None else Member(name, place, 0)


def _size(header: bytes, path: Path | RemoteFile, position: int, end: int) -> int:
    """The size of the member in bytes. Raises UserError where the header is damaged or the member is cut short."""
    if len(header) < _BLOCK:
        if position == 0:
            raise UserError(f"{path}: {what_begins(header[:64]) or f'is not a tar file ({end} bytes)'}")
        raise UserError(
            f"{path}: is cut short: it ends at byte {end} without the end mark of a tar file; copy it again "
            "(if it is whole after all: head -c 1024 /dev/zero >> FILE)"
        )
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
        # The checksum counts its own eight bytes as spaces.
        if stated != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        unpack = next((tool for magic, tool in _COMPRESSED.items() if header.startswith(magic)), None)
        if position == 0 and unpack:
            raise UserError(f"{path}: is a compressed tar, which allows no random access; {unpack} it first") from None
        what = (
            what_begins(header[:64]) or "is not a tar file"
            if position == 0
            else f"is damaged at byte {position}; copy it again"
        )
        raise UserError(f"{path}: {what}") from None
    if position + _BLOCK + size > end:
        raise UserError(
            f"{path}: is cut short: {_short_name(header)} should reach byte {position + _BLOCK + size}, "
            f"but the file has {end}; copy it again"
        )
    return size


def _short_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def _long_name(body: bytes, kind: bytes) -> str | None:
    """The path in a GNU long-name member or a pax header of records `LENGTH key=value\\n`."""
    if kind == b"L":
        return body.rstrip(b"\0").decode("utf-8", "backslashreplace")
    while kind == b"x" and body:
        length, _, rest = body.partition(b" ")
        count = int(length) if length.isdigit() else 0
        if count <= len(length) + 1:
            return None
        key, _, value = rest[: count - len(length) - 2].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "backslashreplace")
        body = body[count:]
    return None
