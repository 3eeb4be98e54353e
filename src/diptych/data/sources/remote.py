"""Files behind an address (`s3://`, `gs://`, `hf://`, `https://` ...), through `fsspec` and a cache on disk.

Texts and tables are kept whole. Of a tar its index is kept, with all its small members but the images, so that captions
need no network. Images come from the tar itself: from a copy in the cache, which is bounded and forgets what was not
used for longest, or by range where many tars are read in turn that do not fit there. Files of the cache are named after
address, size and stamp, appear whole, and may be shared by any number of processes.

`DIPTYCH_CACHE` names the folder of the cache, `DIPTYCH_CACHE_GB` bounds its copies of tars. Credentials and addresses
of servers are those of the `fsspec` backend (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `HF_TOKEN` ...).
"""

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, TypeVar

from diptych.errors import UserError, first_line
from diptych.io import write_bytes

_ADDRESS = re.compile(r"[a-z][a-z0-9+]*://", re.IGNORECASE)
_CHUNK = 4 * 2**20
"""Bytes of a request."""
_TIMEOUT = 60.0
"""Seconds that a request may take."""
_TRIES, _WAIT = 6, 0.5
"""How often a request is tried, and the seconds before the second time; they double each time."""
_AT_ONCE = 8
"""Requests at a time while a source is opened."""
_SMALL = 2**16
"""Largest member of a tar, in bytes, that is kept beside its index."""
_RECENT, _OFTEN = 64, 8
"""A tar is copied once so many of the last reads were of it: they are then in order, or shuffled over few tars."""
_ABANDONED = 600.0
"""Seconds after which a copy that does not grow is that of a killed process."""
_STAMPS = ("ETag", "etag", "blob_id", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created")

_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Entry = tuple[str, int, int]
"""Name of a member of a tar, the byte where its content begins, and its size; see `RemoteFile.index`."""


def is_remote(place: str) -> bool:
    """Whether a source is an address or a list of them."""
    return _ADDRESS.match(place) is not None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file behind an address, as it was when its source was opened."""

    url: str
    size: int
    stamp: str
    """What its server says that changes with the content: an ETag, else a date; empty where there is neither."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.url).stem

    @property
    def identity(self) -> str:
        """Differs for other content, wherever it lies."""
        return f"{self.size}:{self.stamp}"

    @property
    def id(self) -> str:
        """Its name in the cache."""
        return f"{hashlib.sha256(f'{self.url}:{self.identity}'.encode()).hexdigest()[:24]}-{self.name}"

    def kept(self) -> Path:
        """The whole file on disk, where nothing removes it. Raises UserError."""
        folder = _cache().folder / "files"
        if not (folder / self.id).is_file():
            _cache().copied(self, folder).close()
        return folder / self.id

    def index(self, scan: Callable[[int], Iterable[Entry]], *, is_large: Callable[[str], bool]) -> list[Entry]:
        """The members of a tar, which ``scan`` finds the first time, given the descriptor of its copy.

        Small members that are not ``is_large`` by their name are kept: instead of byte b of the tar they have -1 - p,
        where p is their place among what is kept.
        """
        cached = _cache()
        listing, content = (cached.folder / "index" / (self.id + suffix) for suffix in (".json", ".bin"))
        if not listing.is_file():
            entries, kept = [], bytearray()
            with cached.opened(self) as tar:
                for name, offset, size in scan(tar.fileno()):
                    if size <= _SMALL and not is_large(name):
                        found = os.pread(tar.fileno(), size, offset)
                        offset = -1 - len(kept)
                        kept += found
                    entries.append((name, offset, size))
            write_bytes(content, bytes(kept))
            write_bytes(listing, json.dumps(entries).encode())
        return [(name, offset, size) for name, offset, size in json.loads(listing.read_bytes())]

    def read(self, offset: int, size: int) -> bytes:
        """The content of a member, by its numbers of the index. Raises UserError."""
        cached = _cache()
        if offset < 0:
            try:
                with open(cached.folder / "index" / f"{self.id}.bin", "rb") as file:
                    return os.pread(file.fileno(), size, -1 - offset)
            except OSError as error:
                raise UserError(f"{self}: its index can no longer be read ({error.strerror}): start again") from None
        if cached.has(self) or cached.is_worth_a_copy(self):
            with cached.opened(self) as tar:
                return os.pread(tar.fileno(), size, offset)
        return self.range(offset, offset + size)[:size]

    def range(self, start: int, end: int) -> bytes:
        """Bytes of the file by one request. All bytes of it where its server knows no ranges and ``start`` is 0.

        Raises UserError after the last try.
        """

        def ask() -> bytes:
            system, path = _filesystem(self.url)
            found = _call(system, "cat_file", path, start=start, end=end)
            if len(found) == self.size > end - start:
                return found[start:] if start else found
            if len(found) != end - start:
                raise OSError(f"{len(found):,} of {end - start:,} bytes came")
            return found

        return _tried(self.url, ask) if end > start else b""

    def ask_again(self) -> None:
        """Raise UserError where the file was replaced since its source was opened."""
        if _found(self.url) != self:
            raise UserError(f"{self}: was replaced while it was read: start again")


def find_remote(patterns: Sequence[str]) -> list[RemoteFile]:
    """The files behind addresses, in order; `*` and `[...]` stand for names where the server can list them.

    Raises UserError for one that is missing, cannot be reached, or needs a package.
    """
    if local := next((pattern for pattern in patterns if not is_remote(pattern)), None):
        raise UserError(f"{local}: files of this machine and addresses cannot be one source")
    for one in {pattern.partition("://")[0]: pattern for pattern in patterns}.values():
        _filesystem(one)[0].invalidate_cache()  # what it listed before may be out of date
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        urls = [url for found in threads.map(_matches, patterns) for url in found]
        return list(threads.map(_found, dict.fromkeys(urls)))


def _matches(pattern: str) -> list[str]:
    if not re.search(r"[*\[]", pattern):
        return [pattern]
    if pattern.lower().startswith("http"):
        raise UserError(f"{pattern}: an https server cannot list its files: number them, as in shard-{{000..012}}.tar")
    system, path = _filesystem(pattern)
    found = _tried(pattern, lambda: _call(system, "glob", path))
    if not found:
        raise UserError(f"{pattern}: matches no file")
    return [system.unstrip_protocol(each) for each in sorted(found)]


def _found(url: str) -> RemoteFile:
    system, path = _filesystem(url)
    info = _tried(url, lambda: _call(system, "info", path))
    if info.get("type") == "directory":
        raise UserError(
            f"{url}: is a folder: put its images into tars, or name its files, as in {url.rstrip('/')}/*.tar"
        )
    if info.get("size") is None:
        raise UserError(f"{url}: its server does not say how large it is: copy it to this machine")
    stamp = next((str(info[name]) for name in _STAMPS if info.get(name)), "")
    return RemoteFile(url, int(info["size"]), stamp)


def index_all(files: Sequence[RemoteFile], index: Callable[[RemoteFile], Any]) -> None:
    """Call ``index`` of several tars at a time, and say first what has to be read for it."""
    new = [each for each in files if not (_cache().folder / "index" / f"{each.id}.json").is_file()]
    if not new:
        return
    size = sum(each.size for each in new) / 1e9
    tars = f"{new[0]} is" if len(new) == 1 else f"{new[0]} and {len(new) - 1:,} more are"
    _log.warning("%s", f"{tars} read once, for the index ({size:,.1f} GB)")
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(index, new))


def _filesystem(url: str) -> tuple[Any, str]:
    """The `fsspec` file system of an address, and what it calls the file."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: needs a package ({first_line(error)}): pip install 'diptych[remote]'") from None
    except Exception as error:
        raise UserError(f"{url}: cannot be opened ({first_line(error)})") from None


def _call(system: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    if not system.async_impl:
        return getattr(system, method)(*args, **kwargs)
    from fsspec.asyn import sync

    return sync(system.loop, getattr(system, f"_{method}"), *args, timeout=_TIMEOUT, **kwargs)


def _tried(url: str, ask: Callable[[], Answer]) -> Answer:
    """What ``ask`` returns, tried again after a pause where the connection, not the request, is at fault."""
    for attempt in range(_TRIES):
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:  # each backend has classes of its own
            status = _status(error)
            if status in (401, 403) or (status is None and isinstance(error, PermissionError)):
                raise UserError(f"{url}: access is refused ({first_line(error)}): check your credentials") from None
            if _is_missing(error, status):
                raise UserError(f"{url}: does not exist") from None
            if attempt == _TRIES - 1:
                slow = isinstance(error, TimeoutError)
                reason = f"no answer in {_TIMEOUT:g} seconds" if slow else first_line(error)
                raise UserError(
                    f"{url}: cannot be read, tried {_TRIES} times ({reason}): the same command goes on"
                ) from None
        time.sleep(_WAIT * 2**attempt)
    raise AssertionError


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore or httpx, or behind what caused it."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for status in (getattr(each, "status", None), getattr(response, "status_code", None)):
            if isinstance(status, int):
                return status
    return None


def _is_missing(error: BaseException, status: int | None) -> bool:
    if status is not None:
        return status in (404, 410)
    # fsspec calls a file of https missing, too, where the connection was cut.
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or isinstance(cause, FileNotFoundError))


@dataclass(slots=True)
class Cache:
    """A folder: `files/` whole files, `index/` of tars, `tars/` copies of tars, of which the last used are kept."""

    folder: Path
    limit: int
    """Bytes of all copies of tars."""
    _recent: deque[str] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _lock: Lock = field(default_factory=Lock)

    @property
    def _tars(self) -> Path:
        return self.folder / "tars"

    def has(self, file: RemoteFile) -> bool:
        return (self._tars / file.id).is_file()

    def is_worth_a_copy(self, file: RemoteFile) -> bool:
        """Note that ``file`` is read, and say whether to copy it: it is read often, or there is room for it."""
        with self._lock:
            self._recent.append(file.id)
            often = self._recent.count(file.id) >= _OFTEN
        return file.size <= self.limit and (often or self._used() + file.size <= self.limit)

    def opened(self, file: RemoteFile) -> BinaryIO:
        """The copy of a tar, opened to read, made first if need be. Raises UserError."""
        path = self._tars / file.id
        try:
            opened: BinaryIO = open(path, "rb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            return self.copied(file, self._tars)
        if (now := time.time()) - os.fstat(opened.fileno()).st_atime > 1:
            self._touch(path, now)
        return opened

    def copied(self, file: RemoteFile, folder: Path) -> BinaryIO:
        """The file in ``folder``, opened to read: copied there, unless another process has done so meanwhile.

        What is open can be read even when another process removes it. Raises UserError.
        """
        from filelock import FileLock

        path, partial = folder / file.id, folder / f"{file.id}.part"
        if folder == self._tars and file.size > self.limit:
            raise UserError(
                f"{file}: has {file.size / 1e9:.1f} GB, more than the cache may hold ({self.limit / 1e9:.1f} GB): "
                "raise DIPTYCH_CACHE_GB"
            )
        try:
            for each in (folder, self.folder / "locks"):
                each.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "locks" / f"{file.id}.lock"):
                if path.is_file():
                    return open(path, "rb")
                while not self._reserved(file.size, partial):
                    time.sleep(0.1)
                try:
                    self._copy(file, partial)
                    opened: BinaryIO = open(partial, "rb")  # noqa: SIM115 - the caller closes it
                    os.replace(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
                self._touch(path, time.time())
                return opened
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            mend = "name a folder with room by DIPTYCH_CACHE" + (", or lower DIPTYCH_CACHE_GB" if full else "")
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}): {mend}") from None

    def _reserved(self, size: int, partial: Path) -> bool:
        """Whether there is room for a file, which is then taken by ``partial``; else others have to end first."""
        from filelock import FileLock

        with FileLock(self.folder / "locks" / "room.lock"):
            if partial.parent == self._tars and not self._make_room(size):
                return False
            with open(partial, "wb") as out:
                os.truncate(out.fileno(), size)
        return True

    def _copy(self, file: RemoteFile, partial: Path) -> None:
        with open(partial, "r+b") as out:
            while (done := out.tell()) < file.size:
                out.write(file.range(done, min(done + _CHUNK, file.size)))
        file.ask_again()

    def _touch(self, path: Path, now: float) -> None:
        """Note the use of a file by its access time. The other time, by which other libraries know it, stays."""
        try:
            os.utime(path, (now, 1e9))
        except FileNotFoundError:
            return

    def _used(self) -> int:
        return sum(size for size, *_ in self._copies())

    def _copies(self) -> list[tuple[int, float, float, Path]]:
        """Size, time of the last use and of the last change, and path of every copy and every one in the making."""
        found = []
        for path in self._tars.glob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_size, status.st_atime, status.st_mtime, path))
        return found

    def _make_room(self, size: int) -> bool:
        """Remove what was not used for longest. False where copies in the making leave no room."""
        used, now = self._used(), time.time()
        for each, _, changed, path in sorted(self._copies(), key=lambda copy: copy[1]):
            in_the_making = path.suffix == ".part"
            if in_the_making and now - changed < _ABANDONED:
                continue
            if in_the_making or used + size > self.limit:
                path.unlink(missing_ok=True)
                used -= each
        return used + size <= self.limit


def _cache() -> Cache:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "remote"
    size = os.environ.get("DIPTYCH_CACHE_GB", "50")
    try:
        limit = int(float(size) * 1e9)
    except ValueError:
        raise UserError(f"DIPTYCH_CACHE_GB is {size!r}; it must be a number of GB") from None
    return _cache_of(Path(os.environ.get("DIPTYCH_CACHE") or default), limit)


_cache_of = cache(Cache)
