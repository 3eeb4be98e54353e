"""Vectors of many items on disk, memory-mapped: embeddings to search, features to learn from.

    vectors.npy     [items, width] or [items, length, width], float32 or float16
    NAME.npy        [items, ...]: further arrays, e.g. `labels`, `lengths`
    keys.txt        a name for each item
    manifest.json   what the maker wants to be remembered, e.g. the digest of the model

The arrays are ordinary NumPy files; `numpy.load` reads them too.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.array_writer import ResumableArrayWriter
from diptych.errors import UserError

MANIFEST = "manifest.json"
_ENCODING: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names may be any bytes


@dataclass(frozen=True, slots=True)
class VectorStore:
    """A folder of vectors."""

    folder: Path
    keys: list[str]
    manifest: dict[str, Any]
    _arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path) -> "VectorStore":
        """Maps the arrays and reads none of them. Raises UserError for a folder that holds none, or not all of it."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of vectors")
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            keys = (folder / "keys.txt").read_text(**_ENCODING).split("\n")[:-1]
            arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
            if "vectors" not in arrays:
                raise ValueError("it has no vectors.npy")
            for name, array in arrays.items():
                if len(array) != len(keys):
                    raise ValueError(f"{name}.npy has {len(array)} rows for {len(keys)} keys")
        except (OSError, EOFError, ValueError, TypeError) as error:  # JSON's and Unicode's errors are ValueErrors
            raise UserError(f"{folder}: not a complete store of vectors ({error}): make it again") from error
        return cls(folder, keys, manifest, arrays)

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        return (Path(folder) / MANIFEST).is_file() and (Path(folder) / "vectors.npy").is_file()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def vectors(self) -> np.ndarray:
        return self._arrays["vectors"]

    @property
    def further(self) -> dict[str, np.ndarray]:
        """All arrays but the vectors, by name."""
        return {name: array for name, array in self._arrays.items() if name != "vectors"}

    def array(self, name: str) -> np.ndarray | None:
        """A further array, or None if the store has none of that name."""
        return self._arrays.get(name)


def write_vectors(
    folder: Path,
    batches: Iterable[np.ndarray | Mapping[str, np.ndarray]],
    *,
    keys: Iterable[str],
    manifest: Mapping[str, Any],
) -> VectorStore:
    """Write a store batch by batch; the folder appears when it is complete. An earlier store there is replaced.

    Args:
        folder: Where to. Raises UserError when it holds anything but a store.
        batches: Arrays [B, ...] of vectors, or several arrays by name with ``vectors`` among them.
        keys: A name for each item. Like ``manifest`` it is read after the last batch, so that a generator of batches
            may still fill both.
        manifest: Anything that JSON can hold.
    """
    check_free(folder)
    writer = ResumableArrayWriter(folder, None, format="npy")
    try:
        for batch in batches:
            writer.append(batch if isinstance(batch, Mapping) else {"vectors": batch})
        writer.append({}, keys=keys)
        return finish_vectors(writer, manifest)
    finally:
        writer.discard()


def finish_vectors(writer: ResumableArrayWriter, manifest: Mapping[str, Any]) -> VectorStore:
    """The store that has grown: for makers of many vectors, which want to go on where they were interrupted."""
    if not writer.arrays:
        raise UserError(f"{writer.out.name}: nothing to write")
    return writer.finish(MANIFEST, manifest, VectorStore.open)


def check_free(folder: Path) -> None:
    """Raises UserError when ``folder`` holds anything but a store: for a check before hours of work."""
    if folder.exists() and not VectorStore.is_one(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and holds no vectors: choose another folder")
