"""WebDataset tars: members that share a name up to its first dot are a sample (key.jpg, key.txt, key.json, key.cls)."""

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data import tar_index
from diptych.data.columns import Columns, Found, captions_of, find_fields
from diptych.data.images import SUFFIXES, ImageLimits, UnreadableImage, decode
from diptych.data.tables import sample_columns, select_split
from diptych.data.texts import clean, decode_text
from diptych.errors import UserError

_IMAGE, _TEXT, _JSON, _CLASS = range(4)
_TEXTS = ("txt", "text", "caption")
_NOTHING = (-1, 0, 0)


class WebDatasetSource:
    """An index of (shard, offset, size) per member: 96 bytes a sample. Everything else is read when asked for."""

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
        """The json fields that hold captions, label and split. A text member goes before a field that is not asked
        for: key.json often repeats key.txt."""
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
        return None if shard < 0 else tar_index.read(self._paths[shard], offset, size)

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
        """`key.cls`, else the json field of the label, else the folder of the key."""
        if (data := self._read(i, _CLASS)) is not None:
            return clean(decode_text(data, name=f"{self.name}: {self._keys[i]}.cls"))
        if self._found and self._found.label and (value := self._json(i).get(self._found.label)) is not None:
            return str(value)
        return os.path.basename(os.path.dirname(self._keys[i])) or None


def _index(paths: Sequence[Path], keys: list[str], columns: Columns, *, source: str) -> array:
    """Four (shard, offset, size) per sample, end to end; fills ``keys``. Samples never span shards."""
    index = array("q")
    for shard, path in enumerate(paths):
        samples: dict[str, list[tuple[int, int, int]]] = {}
        for member in tar_index.members(path):
            folder, base = os.path.split(member.name.removeprefix("./"))
            stem, _, extension = base.partition(".")
            kind = _kind(extension.lower(), columns)
            if not stem or kind is None:
                continue
            key = f"{folder}/{stem}" if folder else stem
            sample = samples.setdefault(key, [_NOTHING] * 4)
            if sample[kind] != _NOTHING:
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
    # A json field that is asked for goes before a text member.
    return _TEXT if extension in ((named,) if named else () if columns.caption else _TEXTS) else None
