"""Encoded data: image tokens and text ids in memory-mapped files.

    store.json     shapes, types, where it came from and which tokenizers made it
    tokens.bin     [items, N]        image tokens, if there are images
    ids.bin        [captions, L]     text ids, if there are captions; those of an item lie together
    counts.bin     [items]           captions of each item
    features.bin   [captions, L, F]  features of the frozen text encoder, optional
    keys.txt       a name for each item

Shapes: B rows, N image tokens, L text tokens, F width of the text features.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.data.batch import ImageTokenExamples, PairExamples, TextExamples
from diptych.data.streams import Stream, choose
from diptych.errors import UserError

MANIFEST = "store.json"
_TRIM = 8
"""Texts of a batch are cut to its longest, rounded up to this: padding costs time and changes nothing."""


@dataclass(frozen=True)
class Store:
    """A folder of encoded data."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Raises UserError for a folder that is none, or whose files are not as long as they should be."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            for name, array in manifest["arrays"].items():
                expected = int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize
                found = (folder / f"{name}.bin").stat().st_size
                if found != expected:
                    raise UserError(f"{folder / name}.bin has {found} bytes, not {expected}: encode it again")
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: not a folder of encoded data ({error}): encode it again") from error
        return cls(folder, manifest)

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        return (Path(folder) / MANIFEST).is_file()

    def __len__(self) -> int:
        return self.manifest["items"]

    @property
    def has_images(self) -> bool:
        return "tokens" in self.manifest["arrays"]

    @property
    def has_captions(self) -> bool:
        return "ids" in self.manifest["arrays"]

    def array(self, name: str) -> np.ndarray | None:
        """A memory-mapped array, or None if the store has none of that name."""
        found = self.manifest["arrays"].get(name)
        if found is None:
            return None
        if 0 in found["shape"]:
            return np.empty(found["shape"], found["dtype"])
        return np.memmap(self.folder / f"{name}.bin", found["dtype"], "r", shape=tuple(found["shape"]))

    @cached_property
    def _tokens(self) -> np.ndarray | None:
        return self.array("tokens")

    @cached_property
    def _ids(self) -> np.ndarray | None:
        return self.array("ids")

    @cached_property
    def _features(self) -> np.ndarray | None:
        return self.array("features")

    @cached_property
    def starts(self) -> np.ndarray:
        """Row of ``ids`` where each item's captions begin, and the end: int64 [items + 1]."""
        counts = self.array("counts")
        assert counts is not None
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def pairs(self, items: np.ndarray, *, seed: int) -> Stream[PairExamples]:
        """Images with one of their captions, another one each epoch."""
        items = items[np.diff(self.starts)[items] > 0]

        def take(index: np.ndarray, epoch: np.ndarray) -> PairExamples:
            item = items[index]
            first, end = self.starts[item], self.starts[item + 1]
            ids, valid, features = self._read_texts(first + choose(end - first, item, epoch, seed))
            return PairExamples(tokens_BN=self._read_tokens(item), ids_BL=ids, valid_BL=valid, features_BLF=features)

        return Stream(size=len(items), take=take)

    def images(self, items: np.ndarray) -> Stream[ImageTokenExamples]:
        """Bare images."""
        return Stream(
            size=len(items), take=lambda index, _: ImageTokenExamples(tokens_BN=self._read_tokens(items[index]))
        )

    def texts(self, items: np.ndarray) -> Stream[TextExamples]:
        """Bare texts: every caption of the items is one."""
        counts = np.diff(self.starts)[items]
        rows = np.repeat(self.starts[items] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())

        def take(index: np.ndarray, epoch: np.ndarray) -> TextExamples:
            ids, valid, features = self._read_texts(rows[index])
            return TextExamples(ids_BL=ids, valid_BL=valid, features_BLF=features)

        return Stream(size=len(rows), take=take)

    def _read_tokens(self, items: np.ndarray) -> Tensor:
        assert self._tokens is not None
        return _to_torch(self._tokens[items])

    def _read_texts(self, captions: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, their validity and, where they are stored, their features."""
        assert self._ids is not None
        found = self._ids[captions]
        longest = int((found != 0).sum(1).max())
        length = min(found.shape[1], -(-longest // _TRIM) * _TRIM)
        ids = _to_torch(found[:, :length])
        features = None
        if self._features is not None:
            features = torch.from_numpy(self._features[captions, :length].astype(np.float32))
        return ids, ids != 0, features


def _to_torch(array: np.ndarray) -> Tensor:
    # Converted by NumPy: torch would start a team of OpenMP threads in each preparing thread, which then spin.
    return torch.from_numpy(array.astype(np.int64))
