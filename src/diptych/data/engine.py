"""Work on the items of a data set, block by block: in this process, or by the workers of a Ray cluster.

    Engine                     who works on the blocks
    ResumableArrayWriter       writes the rows of the blocks to arrays on disk

A result comes once for each block and in the order of the blocks, whichever worker made it. So what is written from the
results has the same bytes with either engine, and a command that was stopped may be resumed with either.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from diptych.errors import UserError, first_line
from diptych.io import replace_folder, write_bytes

if TYPE_CHECKING:  # torch takes a second to import, and mistakes in a command are answered without it
    import torch

    from diptych.data.pixels import SkippedItems
    from diptych.data.sources import Source

logger = logging.getLogger(__name__)

EngineName = Literal["local", "ray"]
_AHEAD = 2
"""Blocks queued at a worker, the running one included."""
_WINDOW = 4
"""Blocks in flight or waiting to be yielded, per worker; bounds memory."""
_DIGESTED = 2**20
"""Numbers of items that are digested at once."""
_DEATHS = 3
"""Number of workers that may die on one block before the command stops."""
_OBJECT_STORE = 512 * 2**20
"""Bytes of shared memory for blocks and results of a cluster that is started here; Ray puts more on disk."""


KEYS_ENCODING: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names may be any bytes
"""How keys.txt is read and written."""

Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The result of a block of items."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Rows to append to the arrays of these names."""
    keys: Sequence[str] = ()
    """A name for each row."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Key of each item that was left out -> the reason."""


class ResumableArrayWriter:
    """Writes a folder ``out`` of arrays that grow along their first axis.

    The arrays grow in a hidden folder, which takes the name ``out`` when everything is there. While they grow, its
    ``progress.json`` holds what an interrupted run needs to go on after its last finished chunk.
    """

    def __init__(self, out: Path, made_by: Mapping[str, Any] | None) -> None:
        """Go on with what an interrupted writer left if it was given the same ``made_by``; else begin anew.

        Args:
            out: Folder to write.
            made_by: Everything that decides the content, as JSON can hold it. None begins anew in any case.
        """
        self.out, self.folder = out, out.with_name(f".{out.name}.partial")
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
        for file in self.folder.glob("*.npy"):  # an array may have begun in the chunk that was interrupted
            if file.name not in sizes:
                file.unlink()
        for name, size in sizes.items():
            os.truncate(self.folder / name, size)

    @property
    def done(self) -> int:
        """How far the caller has come, as it last told `append`."""
        return self.state["done"]

    @property
    def items(self) -> int:
        """Number of keys written so far."""
        return self.state["items"]

    @property
    def skipped(self) -> dict[str, str]:
        """Key of each item that was left out -> the reason. The caller fills it."""
        return self.state["skipped"]

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """``shape`` and ``dtype`` of each array so far."""
        return self.state["arrays"]

    def append(self, arrays: Mapping[str, np.ndarray], *, keys: Iterable[str] = (), done: int | None = None) -> None:
        """Append rows to each of ``arrays`` and names to the keys.

        ``done`` marks the end of a chunk: an interrupted writer goes on after the last one, with that number.
        """
        self._append_keys(keys)
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            known = self.arrays.setdefault(name, {"shape": [0, *array.shape[1:]], "dtype": _little_endian(array)})
            found = ([*array.shape[1:]], _little_endian(array))
            assert (known["shape"][1:], known["dtype"]) == found, (name, known, array)
            with (self.folder / f"{name}.npy").open("ab") as file:
                if file.tell() == 0:
                    file.write(_header(known))
                file.write(array.astype(known["dtype"], copy=False).data)
            known["shape"][0] += len(array)
        if done is not None:
            self.state["done"] = done
            _write_json(self.folder / "progress.json", self.state)

    def finish(self, manifest: str, content: Any, opened: Callable[[Path], Opened]) -> Opened:
        """Write ``content`` as JSON to the file ``manifest``, give the folder its name and return ``opened(out)``.

        ``opened`` is first tried on the hidden folder, so that a folder that cannot be opened replaces nothing.
        """
        for name, array in self.arrays.items():
            with (self.folder / f"{name}.npy").open("r+b") as file:
                file.write(_header(array))
        if self.skipped:
            from diptych.data.pixels import SkippedItems

            SkippedItems(reasons=self.skipped).write(self.folder / "skipped.jsonl")
        _write_json(self.folder / manifest, content)
        (self.folder / "progress.json").unlink(missing_ok=True)
        opened(self.folder)
        replace_folder(self.folder, self.out)
        return opened(self.out)

    def read(self) -> dict[str, np.ndarray]:
        """The arrays so far, in memory."""
        found = {}
        for name, array in self.arrays.items():
            file, begin = self.folder / f"{name}.npy", len(_header(array))
            found[name] = np.fromfile(file, array["dtype"], offset=begin).reshape(array["shape"])
        return found

    def map(self, name: str) -> np.ndarray:
        """An array so far, mapped into memory. The header in its file may tell of fewer rows."""
        array = self.arrays[name]
        file, shape = self.folder / f"{name}.npy", tuple(array["shape"])
        return np.memmap(file, array["dtype"], "r", offset=len(_header(array)), shape=shape)

    def discard(self) -> None:
        """Remove the hidden folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append_keys(self, keys: Iterable[str]) -> None:
        names = [" ".join(key.splitlines()) for key in keys]
        lines = "".join(f"{name}\n" for name in names).encode(**KEYS_ENCODING)
        with (self.folder / "keys.txt").open("ab") as file:
            file.write(lines)
        self.state["key_bytes"] += len(lines)
        self.state["items"] += len(names)

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Name of each file that grows, and its bytes at the end of the last finished chunk."""
        for name, array in self.arrays.items():
            yield f"{name}.npy", npy_bytes(array)
        if self.done:
            yield "keys.txt", self.state["key_bytes"]


def _header(array: Mapping[str, Any]) -> bytes:
    """The header of the ``.npy`` file. NumPy pads it, so that its length stays the same while rows are added."""
    header = BytesIO()
    description = {"descr": array["dtype"], "fortran_order": False, "shape": tuple(array["shape"])}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def npy_bytes(array: Mapping[str, Any]) -> int:
    """Bytes of the ``.npy`` file of an array of this ``shape`` and ``dtype``."""
    return len(_header(array)) + int(np.prod(array["shape"])) * np.dtype(array["dtype"]).itemsize


def _little_endian(array: np.ndarray) -> str:
    return array.dtype.newbyteorder("<").str


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Who works on the blocks."""

    name: EngineName = "local"
    address: str | None = None
    """Of a Ray cluster that runs. Default: that of the variable RAY_ADDRESS, else one is started on this machine."""
    device: str = "auto"
    """What the workers compute on. Unless it is the CPU, each has a GPU of its own where the cluster has any."""
    reopen: Callable[[], Any] | None = None
    """Picklable function that opens `tools` in a Ray worker; use `functools.partial` of a module-level function."""
    keep: Path | None = None
    """Folder in which :meth:`gather` keeps finished blocks, for a command that is stopped and repeated."""

    @property
    def cluster(self) -> str:
        return self.address or os.environ.get("RAY_ADDRESS") or "local"

    def check(self) -> None:
        """Raise UserError where Ray is wanted and not installed or not there, and for an address without it."""
        if self.name == "ray":
            _import_ray()
            host, _, port = self.cluster.removeprefix("ray://").rpartition(":")
            if port.isdecimal():  # Ray itself would try for many minutes
                try:
                    socket.create_connection((host, int(port)), timeout=10).close()
                except OSError as error:
                    raise UserError(f"--ray-address {self.cluster}: nothing answers there ({error})") from error
        elif self.address is not None:
            raise UserError(f"--ray-address {self.address}: goes with --engine ray")

    def map(self, work: Callable[[Any, Any], Any], tools: Any, blocks: Iterable[Any]) -> Iterator[Any]:
        """``work(tools, block)`` of each block, in their order.

        ``tools`` is what the work needs opened: networks, a source. A worker of Ray opens its own by ``reopen``, and
        ``work`` and blocks are pickled. A block whose worker died is done again by another one.
        """
        if self.name == "local":
            return (work(tools, block) for block in blocks)
        assert self.reopen is not None
        return _map_on_ray(partial(_opened, self.reopen, work), blocks, engine=self)

    def write(
        self,
        writer: ResumableArrayWriter,
        work: Callable[[Any, Any], Rows],
        tools: Any,
        items: np.ndarray | range,
        *,
        rows: int,
        skipped: "SkippedItems",
        payload: Callable[[np.ndarray], Any] = lambda block: block,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Append the rows of all ``items`` that the writer has not had to its arrays, ``rows`` items per block.

        Args:
            writer: What is written; its ``done`` counts the items.
            work: As for :meth:`map`.
            tools: As for :meth:`map`.
            items: Numbers of the items.
            rows: Number of items of a block.
            skipped: Where items that were left out are counted. Raises UserError when they are too many.
            payload: What ``work`` receives for a block of item numbers.
            advance: Called after each block with the numbers of items done and of items in all.
        """
        skipped.reasons.update(writer.skipped)
        starts = range(writer.done, len(items), rows)
        blocks = (payload(np.asarray(items[start : start + rows])) for start in starts)
        for start, found in zip(starts, self.map(work, tools, blocks), strict=True):
            for reasons in (skipped.reasons, writer.skipped):
                reasons.update(found.skipped)
            skipped.check(len(items))
            end = min(start + rows, len(items))
            writer.append(found.arrays, keys=found.keys, done=end)
            advance(end, len(items))

    def gather(
        self,
        name: str,
        work: Callable[[Any, Any], Rows],
        tools: Any,
        items: np.ndarray,
        *,
        source: "Source",
        network: "torch.nn.Module | None" = None,
        rows: int,
        skipped: "SkippedItems",
        payload: Callable[[np.ndarray], Any] = lambda block: block,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, np.ndarray]:
        """The arrays of all ``items`` in memory, as :meth:`write` makes them.

        With ``keep``, finished blocks lie there under ``name`` and are not made again for the same items, content of
        the ``source`` and weights of the ``network``.
        """
        with tempfile.TemporaryDirectory() as spare:
            made_by = None if self.keep is None else _identity(items, source, network, rows)
            writer = ResumableArrayWriter((self.keep or Path(spare)) / name, made_by)
            self.write(writer, work, tools, items, rows=rows, skipped=skipped, payload=payload, advance=advance)
            return writer.read()


LOCAL = Engine()


def items_digest(items: np.ndarray | range) -> str:
    """16 hexadecimal digits that differ for other numbers or another order of them."""
    digest = hashlib.sha256()
    for begin in range(0, len(items), _DIGESTED):
        digest.update(np.asarray(items[begin : begin + _DIGESTED], "<i8").tobytes())
    return digest.hexdigest()[:16]


def _identity(
    items: np.ndarray, source: "Source", network: "torch.nn.Module | None", rows: int
) -> dict[str, str | int]:
    """What the rows of the items depend on."""
    from diptych.data.check import content_digest
    from diptych.io import weights_digest

    return {
        "source": source.name,
        "content": content_digest(source),
        "items": items_digest(items),
        "weights": "" if network is None else weights_digest(network),
        "rows": rows,
    }


class _Worker:
    """What a process of Ray does."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]], folder: str) -> None:
        self._make, self._folder = make, folder
        self._run: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Returns when the process has begun."""

    def run(self, block: Any) -> Any:
        if self._run is None:  # not in the constructor, where a UserError would be lost
            if os.path.isdir(self._folder):
                os.chdir(self._folder)  # paths are relative to where the command was given
            self._run = self._make()
        return self._run(block)


def _opened(reopen: Callable[[], Any], work: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return partial(work, reopen())


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers about each cluster
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # and print twenty lines on stdout when a worker dies
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--engine ray needs ray ({first_line(error)}): pip install 'diptych[ray]'") from error
    return ray


def _map_on_ray(make: Callable[[], Callable[[Any], Any]], blocks: Iterable[Any], *, engine: Engine) -> Iterator[Any]:
    """What the function that ``make`` returns in a worker gives for each block, in their order."""
    numbered = iter(enumerate(blocks))
    upcoming = next(numbered, None)
    if upcoming is None:
        return
    ray = _import_ray()
    started = _connect(ray, engine.cluster)
    pool = _Pool(ray, make, device=engine.device)
    found: dict[int, Any] = {}
    next_number = 0
    try:
        while upcoming is not None or pool.unfinished:
            while upcoming is not None and len(pool.unfinished) + len(found) < _WINDOW * pool.size:
                pool.give(*upcoming)
                upcoming = next(numbered, None)
            if pool.unfinished:
                number, result = pool.take()
                found[number] = result
            while next_number in found:
                yield found.pop(next_number)
                next_number += 1
    finally:
        pool.end()
        if started:
            ray.shutdown()


class _Pool:
    """Workers of Ray, one for each GPU or else CPU of the cluster; one that dies is replaced."""

    def __init__(self, ray: Any, make: Callable[[], Callable[[Any], Any]], *, device: str) -> None:
        self.unfinished: dict[int, Any] = {}
        """Blocks that were given and whose result was not taken, by their numbers."""
        self._ray, self._make = ray, make
        self._waiting: deque[int] = deque()  # of the unfinished, those that no worker has
        self._idle: deque[Any] = deque()  # a worker is in it once for each block that it could take
        self._living: list[Any] = []
        self._running: dict[Any, tuple[Any, int | None]] = {}
        self._deaths: Counter[int | None] = Counter()
        resources = ray.cluster_resources()
        gpus = 0 if device in ("cpu", "mps") else int(resources.get("GPU", 0))
        self._kind = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(_Worker)
        self.size = gpus or max(1, int(resources.get("CPU", 1)))
        for _ in range(self.size):
            self._start_worker()

    def _start_worker(self) -> None:
        """Another worker. It takes blocks when it has begun, which is when the cluster has room for it."""
        worker = self._kind.remote(self._make, os.getcwd())
        self._living.append(worker)
        self._running[worker.ready.remote()] = worker, None

    def give(self, number: int, block: Any) -> None:
        self.unfinished[number] = block
        self._waiting.append(number)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            number, worker = self._waiting.popleft(), self._idle.popleft()
            self._running[worker.run.remote(self.unfinished[number])] = worker, number

    def take(self) -> tuple[int, Any]:
        """The number and the result of a block that is finished next."""
        while True:
            [finished], _ = self._ray.wait(list(self._running))
            worker, number = self._running.pop(finished)
            try:
                result = self._ray.get(finished)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError) else error from None
            except self._ray.exceptions.RayError as error:  # its process or machine is gone, perhaps with the result
                self._replace(worker, number, error)
                continue
            self._deaths.pop(number, None)
            self._rest(worker, _AHEAD if number is None else 1)
            self._dispatch()
            if number is not None:
                del self.unfinished[number]
                return number, result

    def _rest(self, worker: Any, blocks: int) -> None:
        """A worker can take so many blocks more. Those that have none come first."""
        has_none = all(each != worker for each, _ in self._running.values())
        self._idle.extend([worker] * (blocks - has_none))
        self._idle.extendleft([worker] * has_none)

    def _replace(self, worker: Any, number: int | None, error: Exception) -> None:
        """Another worker in the place of a dead one, and its block to whoever is free next."""
        self._deaths[number] += 1
        if self._deaths[number] >= _DEATHS:
            last = str(error).strip().splitlines()[-1]  # of a traceback, such as that Diptych is not installed there
            where = f"when they began: {last}" if number is None else f"at the same block of items: {first_line(error)}"
            raise UserError(f"{_DEATHS} workers of Ray died {where}") from error
        if number is not None:
            self._waiting.appendleft(number)
        if worker in self._living:
            logger.warning("a worker of Ray died, and another one takes its place: %s", first_line(error))
            self._living.remove(worker)
            self._idle = deque(each for each in self._idle if each != worker)
            self._ray.kill(worker)
            self._start_worker()
        self._dispatch()

    def end(self) -> None:
        for worker in self._living:
            self._ray.kill(worker)


def _connect(ray: Any, address: str) -> bool:
    """Join the cluster at ``address``, or start one.

    Returns True if this call connected, so that the caller must shut down.
    """
    if ray.is_initialized():
        return False
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    try:
        ray.init(address, log_to_driver=False, logging_level="warning", **(own if address == "local" else {}))
    except (OSError, RuntimeError, ValueError) as error:  # a ConnectionError is an OSError
        raise UserError(
            f"--ray-address {address}: no Ray cluster lets us in there ({first_line(error)}); "
            "a cluster with a token needs RAY_AUTH_MODE=token and the token here too"
        ) from error
    return True
