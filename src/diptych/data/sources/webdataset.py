"""WebDataset tars: members that share a name up to its first dot are a sample (key.jpg, key.txt, key.json, key.cls).

Opening a tar reads only the headers of its members, about ten times quicker than `tarfile`. After that each member is
read alone, with a seek, when it is asked for. Nothing is ever unpacked to disk, so names cannot escape.
"""

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from diptych.data.sources.columns import Columns, Found, captions_of, find_fields
from diptych.data.sources.decode import SUFFIXES, ImageLimits, UnreadableImage, decode
from diptych.data.sources.table import sample_columns, select_split
from diptych.data.sources.text import clean, decode_text
from diptych.errors import UserError

_IMAGE, _TEXT, _JSON, _CLASS = range(4)
"""The kinds of members that a sample may have, one of each."""
_TEXTS = ("txt", "text", "caption")
_NO_MEMBER = (-1, 0, 0)

_BLOCK = 512
_FILES = (b"0", b"\0", b"7")
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}


class WebDatasetSource:
    """Samples of one or several tars, of which only an index is held in memory: 96 bytes a sample and the keys."""

    def __init__(self, paths: Sequence[Path], *, name: str, columns: Columns, split: str | None, limits: ImageLimits):
        self.name = name
        self._paths, self._limits = list(paths), limits
        self._keys: list[str] = []
        index = _index(self._paths, self._keys, columns, source=name)
        self._samples = np.frombuffer(index, dtype=np.int64).reshape(-1, 4, 3)
        if not self._keys:
            raise UserError(
                f"{name}: holds no images (key.jpg, key.png, key.webp ...) and no texts (key.txt, key.json)"
            )
        self._found = self._fields(columns)
        if split is not None:
            self._keep(split)
        self.has_images = self._any(_IMAGE)
        self.has_captions = self._any(_TEXT) or bool(self._found and self._found.captions)
        if not self.has_images and not self.has_captions:
            raise UserError(f"{name}: holds no images and no captions")

    def _any(self, kind: int) -> bool:
        return bool(np.any(self._samples[:, kind, 0] >= 0))

    def _fields(self, columns: Columns) -> Found | None:
        """The json fields that hold captions, label and split.

        Where there are text members, no json field is taken for captions unless it is named: key.json often repeats
        key.txt.
        """
        if self._any(_TEXT) and columns.caption in (None, *_TEXTS):
            columns = replace(columns, caption="")
        having = np.flatnonzero(self._samples[:, _JSON, 0] >= 0)
        if not len(having) and not columns.caption:
            return None
        table = sample_columns([self._json(int(i)) for i in having[:: max(1, len(having) // 64)]])
        return find_fields(table, wanted=columns, source=f"{self.name} (fields of its .json members)")

    def _keep(self, split: str) -> None:
        field = self._found.split if self._found else None
        values = [self._json(i).get(field) if field else None for i in range(len(self))]
        chosen = select_split(values, split, source=self.name)
        self._keys = [self._keys[i] for i in chosen]
        self._samples = self._samples[chosen]

    def _read(self, i: int, kind: int) -> bytes | None:
        shard, offset, size = self._samples[i, kind].tolist()
        return None if shard < 0 else read(self._paths[shard], offset, size)

    def _json(self, i: int) -> dict[str, Any]:
        data = self._read(i, _JSON)
        if data is None:
            return {}
        place = f"{self.name}: {self._keys[i]}.json"
        try:
            fields = json.loads(decode_text(data, name=place))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place} is not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise UserError(f"{place} is not a JSON object {{...}}")
        return fields

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        if (data := self._read(i, _TEXT)) is not None:
            lines = decode_text(data, name=f"{self.name}: {self._keys[i]}.txt").split("\n")
            return [text for line in lines if (text := clean(line))]
        if not self._found or not self._found.captions:
            return []
        fields = self._json(i)
        return [text for field in self._found.captions for text in captions_of(fields.get(field))]

    def image(self, i: int, size: int) -> np.ndarray:
        if not self.has_images:
            raise UserError(f"{self.name}: holds no images")
        name = f"{self.name}: {self._keys[i]}"
        data = self._read(i, _IMAGE)
        if data is None:
            raise UnreadableImage(f"{name}: has no image, only texts")
        return decode(data, size, name=name, limits=self._limits)

    def label(self, i: int) -> str | None:
        """The content of `key.cls`, else the json field of the label, else the folder of the key."""
        if (data := self._read(i, _CLASS)) is not None:
            return clean(decode_text(data, name=f"{self.name}: {self._keys[i]}.cls"))
        if self._found and self._found.label and (value := self._json(i).get(self._found.label)) is not None:
            return str(value)
        return os.path.basename(os.path.dirname(self._keys[i])) or None


def _index(paths: Sequence[Path], keys: list[str], columns: Columns, *, source: str) -> array:
    """(shard, offset, size) of each of the four kinds of members, sample after sample, end to end.

    Appends the key of each sample to ``keys``. A sample never spans shards.
    Raises UserError for two members of one kind.
    """
    index = array("q")
    for shard, path in enumerate(paths):
        samples: dict[str, list[tuple[int, int, int]]] = {}
        for member in members(path):
            folder, base = os.path.split(PurePosixPath(member.name))
            stem, _, extension = base.partition(".")
            kind = _kind(extension.lower(), columns)
            if not stem or kind is None:
                continue
            key = f"{folder}/{stem}" if folder else stem
            sample = samples.setdefault(key, [_NO_MEMBER] * 4)
            if sample[kind] != _NO_MEMBER:
                raise UserError(
                    f"{path}: sample {key} has several members such as {base}; rename them, or choose the image with "
                    "--data.columns.image EXTENSION (the key ends at the first dot of a name)"
                )
            sample[kind] = (shard, member.offset, member.size)
        shown = f"{path.stem}/" if len(paths) > 1 else ""
        keys.extend(shown + key for key in samples)
        index.extend(number for sample in samples.values() for member in sample for number in member)
    return index


def _kind(extension: str, columns: Columns) -> int | None:
    """What a member of this extension holds; None for what is not read."""
    if columns.image:
        if extension == columns.image.lower().removeprefix("."):
            return _IMAGE
    elif os.path.splitext(f".{extension}" if "." in extension else f"x.{extension}")[1] in SUFFIXES:
        return _IMAGE
    if extension == "json":
        return _JSON
    if extension in ("cls", "class"):
        return _CLASS
    named = columns.caption if columns.caption in _TEXTS else None
    # A json field that is named takes precedence over a text member.
    return _TEXT if extension in ((named,) if named else () if columns.caption else _TEXTS) else None


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file inside a tar."""

    name: str
    offset: int
    """Byte of the tar where its content begins."""
    size: int
    """Bytes of its content."""


def members(path: Path) -> Iterator[Member]:
    """The plain files of a tar (ustar, GNU long names, pax paths), in order. Raises UserError when it is cut short."""
    try:
        with open(path, "rb", buffering=_BLOCK) as file:
            yield from _members(file.fileno(), path, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read(path: Path, offset: int, size: int) -> bytes:
    """The bytes of a member. Opens the file anew: safe in any thread, and any number of shards is possible."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: can no longer be read ({error.strerror})") from None


def _members(descriptor: int, path: Path, end: int) -> Iterator[Member]:
    position, long_name = 0, None
    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if len(header) == _BLOCK and not any(header):
            return
        size = _size(header, path, position, end)
        start, kind = position + _BLOCK, header[156:157]
        position = start + -(-size // _BLOCK) * _BLOCK
        if kind in (b"L", b"x", b"g"):
            body = os.pread(descriptor, size, start)
            long_name = _long_name(body, kind) or long_name
            continue
        if kind in _FILES:
            yield Member(long_name or _short_name(header), start, size)
        long_name = None


def _size(header: bytes, path: Path, position: int, end: int) -> int:
    """The size of the member in bytes. Raises UserError where the header is damaged or the member is cut short."""
    if len(header) < _BLOCK:
        if position == 0:
            raise UserError(f"{path}: is not a tar file ({end} bytes)")
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
        what = "is not a tar file" if position == 0 else f"is damaged at byte {position}; copy it again"
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
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _long_name(body: bytes, kind: bytes) -> str | None:
    """The path in a GNU long-name member or a pax header of records `LENGTH key=value\\n`."""
    if kind == b"L":
        return body.rstrip(b"\0").decode("utf-8", "replace")
    while kind == b"x" and body:
        length, _, rest = body.partition(b" ")
        count = int(length) if length.isdigit() else 0
        if count <= len(length) + 1:
            return None
        key, _, value = rest[: count - len(length) - 2].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "replace")
        body = body[count:]
    return None
