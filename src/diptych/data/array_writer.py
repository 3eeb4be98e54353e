"""Arrays that grow on disk in a hidden folder, which takes its name when all is there.

Beside them lie ``keys.txt``, a name for each item, and while they grow ``progress.json``: what an interrupted maker
needs to go on after its last finished chunk.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from diptych.data.skipped import SkippedItems
from diptych.io import write_bytes

Format = Literal["bin", "npy"]
"""Of an array's file: bare numbers, or with NumPy's header."""
Opened = TypeVar("Opened")


class ResumableArrayWriter:
    """The folder ``out`` in the making."""

    def __init__(self, out: Path, made_by: Mapping[str, Any] | None, *, format: Format = "bin") -> None:
        """Goes on with what an earlier maker left, if that has the same ``made_by``; None never goes on."""
        self.out, self.folder, self.format = out, out.with_name(f".{out.name}.partial"), format
        self.state: dict[str, Any] = {"made_by": made_by, "arrays": {}, "skipped": {}}
        self.state |= {"done": 0, "items": 0, "key_bytes": 0}
        progress = self.folder / "progress.json"
        if made_by is not None and progress.is_file():
            found = json.loads(progress.read_text())
            if found["made_by"] == made_by:
                self.state = found
        if self.done == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = dict(self._sizes())
        for file in self.folder.glob(f"*.{format}"):  # an array may have begun in the chunk that was interrupted
            if file.name not in sizes:
                file.unlink()
        for name, size in sizes.items():
            os.truncate(self.folder / name, size)

    @property
    def done(self) -> int:
        """How far the maker has come, in its own count."""
        return self.state["done"]

    @property
    def items(self) -> int:
        """Keys so far."""
        return self.state["items"]

    @property
    def skipped(self) -> dict[str, str]:
        """Key of each item left out -> why; the maker fills it."""
        return self.state["skipped"]

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """Shape and type of each array so far."""
        return self.state["arrays"]

    def append(self, arrays: Mapping[str, np.ndarray], *, keys: Iterable[str] = (), done: int | None = None) -> None:
        """Rows to the end of each array. With ``done`` they are what a resume finds."""
        self._append_keys(keys)
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            known = self.arrays.setdefault(name, {"shape": [0, *array.shape[1:]], "dtype": _little(array)})
            assert (known["shape"][1:], known["dtype"]) == ([*array.shape[1:]], _little(array)), (name, known, array)
            with (self.folder / f"{name}.{self.format}").open("ab") as file:
                if known["shape"][0] == 0:
                    file.write(self._header(known))
                file.write(array.astype(known["dtype"], copy=False).data)
            known["shape"][0] += len(array)
        if done is not None:
            self.state["done"] = done
            _write_json(self.folder / "progress.json", self.state)

    def finish(self, manifest: str, content: Any, opened: Callable[[Path], Opened]) -> Opened:
        """Write ``content`` to the file ``manifest``, see that the folder can be opened, and give it its name."""
        for name, array in self.arrays.items():
            with (self.folder / f"{name}.{self.format}").open("r+b") as file:
                file.write(self._header(array))
        if self.skipped:
            SkippedItems(reasons=self.skipped).write(self.folder / "skipped.jsonl")
        _write_json(self.folder / manifest, content)
        (self.folder / "progress.json").unlink(missing_ok=True)
        opened(self.folder)  # before anything is replaced
        if self.out.exists():
            shutil.rmtree(self.out)
        os.replace(self.folder, self.out)
        return opened(self.out)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append_keys(self, keys: Iterable[str]) -> None:
        names = [" ".join(key.splitlines()) for key in keys]
        told = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")  # file names may be any bytes
        with (self.folder / "keys.txt").open("ab") as file:
            file.write(told)
        self.state["key_bytes"] += len(told)
        self.state["items"] += len(names)

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for name, array in self.arrays.items():
            numbers = int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize
            yield f"{name}.{self.format}", len(self._header(array)) + numbers
        if self.done:
            yield "keys.txt", self.state["key_bytes"]

    def _header(self, array: dict[str, Any]) -> bytes:
        """NumPy pads its header so that the number of rows may grow."""
        if self.format == "bin":
            return b""
        header = BytesIO()
        description = {"descr": array["dtype"], "fortran_order": False, "shape": tuple(array["shape"])}
        np.lib.format.write_array_header_1_0(header, description)
        return header.getvalue()


def _little(array: np.ndarray) -> str:
    return array.dtype.newbyteorder("<").str


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value).encode())
