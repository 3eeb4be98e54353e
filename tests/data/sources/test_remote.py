"""Sources behind an address: what is read over a network with faults, what is kept of it, and what is refused.

`flaky://` is a file system in memory with faults and needs no package; `https://` and `s3://` are read from servers of
this process where their packages are installed (aiohttp; s3fs and moto).
"""

import http.client
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from diptych.data.check import content_digest
from diptych.data.pixels import SkippedItems, pixel_stream, shard_order
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source, remote
from diptych.data.splits import Subset
from diptych.data.store import DataTokenizers, encode
from diptych.data.streams import BatchSampler
from diptych.errors import UserError

SHARDS, ITEMS = 4, 12


def png(number):
    """An image of some 10 kB, noise around one grey that tells its number."""
    pixels = np.random.Generator(np.random.PCG64(number)).integers(0, 3, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels + np.uint8(4 * number)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"shard-{shard:03}.tar", "w") as tar:
            for number in range(shard * ITEMS, (shard + 1) * ITEMS):
                for name, data in ((f"{number:04}.png", png(number)), (f"{number:04}.txt", b"photo %d" % number)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A cache of its own, short pauses and small requests."""
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_WAIT", 0.01)
    monkeypatch.setattr(remote, "_CHUNK", 50_000)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Faults:
    """What goes wrong: the first tries of every request, all of one file, or nothing. Counts requests that succeed."""

    def __init__(self):
        self.first: tuple[str, ...] = ()
        self.always: dict[str, str] = {}
        self.tried, self.answered = Counter(), Counter()
        self.lock = threading.Lock()

    def of(self, name, what):
        with self.lock:
            number = self.tried[name, what]
            self.tried[name, what] += 1
            fault = self.always.get(name, "")
            fault = "" if what == "head" and fault not in ("missing", "refused") else fault
            fault = fault or (self.first[number] if number < len(self.first) else "")
            self.answered[name] += not fault and what != "head"
        return fault


class Flaky(MemoryFileSystem):
    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    faults = Faults()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def unstrip_protocol(self, name):
        return "flaky:/" + name

    def _fail(self, path, what):
        match self.faults.of(path.rpartition("/")[2], what):
            case "missing":
                raise FileNotFoundError(path)
            case "refused":
                raise PermissionError(path)
            case "cut":
                return True
            case "":
                return False
        raise ConnectionError("the server is busy")

    def info(self, path, **kwargs):
        self._fail(path, "head")
        return super().info(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        cut = self._fail(path, (start, end))
        data = super().cat_file(path, start=start, end=end, **kwargs)
        return data[: len(data) // 2] if cut else data


class Handler(BaseHTTPRequestHandler):
    """Serves files by range, or hands requests on to the server `behind`; either with faults."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _handle(self):
        faults, behind = self.server.faults, self.server.behind
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name = self.path.partition("?")[0].rpartition("/")[2]
        asked = self.headers.get("Range")
        fault = faults.of(name, "head" if self.command == "HEAD" else asked) if self.command in ("GET", "HEAD") else ""
        if fault == "slow":
            time.sleep(self.server.delay)
        if fault in ("500", "missing", "refused"):
            return self._send({"500": 500, "missing": 404, "refused": 403}[fault], {}, b"")
        if behind:
            connection = http.client.HTTPConnection(*behind)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")}
            return self._send(answer.status, headers, answer.read(), cut=fault == "cut")
        data = self.server.files.get(name)
        if data is None:
            return self._send(404, {}, b"")
        headers = {"ETag": f'"{hash(data)}"', "Accept-Ranges": "bytes"}
        if asked and self.server.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", asked)):
            start, end = int(match[1]), int(match[2]) + 1
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return self._send(206, headers, data[start:end], cut=fault == "cut")
        return self._send(200, headers, data, cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = _handle

    def _send(self, status, headers, data, *, cut=False):
        self.send_response(status)
        length = headers.pop("Content-Length", headers.pop("content-length", None)) if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in ("content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if cut:
            self.close_connection = True
        if self.command != "HEAD":
            try:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            except ConnectionError:
                self.close_connection = True


@pytest.fixture
def serve():
    servers = []

    def start(files, faults, *, behind=None):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.delay, server.ranges = True, 1.5 * remote._TIMEOUT, True
        server.files, server.faults, server.behind = files, faults, behind
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def flaky(shards, monkeypatch):
    """The shards at `flaky://data/`, without faults."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "store", {})
    monkeypatch.setattr(Flaky, "faults", Faults())
    system = fsspec.filesystem("flaky")
    for path in sorted(shards.iterdir()):
        system.pipe_file(f"/data/{path.name}", path.read_bytes())
    return Flaky.faults


@pytest.fixture(params=["flaky", "https", "s3"])
def place(request, shards, serve, tmp_path, monkeypatch):
    """The address of the folder of shards, and the faults of its server."""
    if request.param == "flaky":
        yield "flaky://data", request.getfixturevalue("flaky"), ("cut", "busy")
        return
    pytest.importorskip("aiohttp")
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    monkeypatch.setattr(remote, "_TIMEOUT", 0.5 if request.param == "https" else 2.0)
    if request.param == "https":
        server = serve(files, Faults())
        yield f"http://127.0.0.1:{server.server_port}/data", server.faults, ("cut", "500", "slow")
        return
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # they remember the server of an earlier test
    moto = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    server = serve({}, Faults(), behind=moto.get_host_and_port())
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    bucket = tmp_path.name.lower().replace("_", "-")[-40:].strip("-")  # moto keeps buckets from test to test
    system.mkdir(bucket)
    for name, data in files.items():
        system.pipe_file(f"{bucket}/data/{name}", data)
    yield f"s3://{bucket}/data", server.faults, ("cut", "500", "slow")
    moto.stop()


def encoded(spec, out):
    """Arrays and keys of the store that the source becomes."""

    def tokens(pixels_B3HW):
        return pixels_B3HW.flatten(1).long()

    def ids(texts):
        return torch.tensor([[int(text.split()[1]) + 1, 1] for text in texts])

    tokenizers = DataTokenizers(image_size=8, tokenize_images=tokens, tokenize_texts=ids, fingerprint="one")
    encode(open_source(spec), out, tokenizers, workers=3)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "store.json"}


def numbers(source, items):
    """The number that each image of the items tells."""
    return [round(float(source.image(int(i), 64).mean() - 1) / 4) for i in items]


def used(tmp_path):
    return sum(path.stat().st_size for path in (tmp_path / "cache" / "tars").iterdir())


def test_faults_lose_and_double_nothing(place, shards, tmp_path):
    address, faults, kinds = place
    faults.first = kinds
    found = encoded(f"{address}/shard-{{000..003}}.tar", tmp_path / "far")
    assert found == encoded(f"{shards}/shard-{{000..003}}.tar", tmp_path / "near")
    assert found["keys.txt"].decode().split() == [f"shard-{i // ITEMS:03}/{i:04}" for i in range(SHARDS * ITEMS)]
    assert max(faults.tried.values()) > len(kinds)


def test_a_missing_shard_is_named(place, tmp_path):
    address, faults, _ = place
    with pytest.raises(UserError, match=f"{address}/shard-004.tar: does not exist"):
        open_source(f"{address}/shard-{{000..004}}.tar")
    faults.always["shard-002.tar"] = "refused"
    with pytest.raises(UserError, match=f"{address}/shard-002.tar: access is refused .*: check your credentials"):
        open_source(f"{address}/shard-{{000..003}}.tar")


def test_a_shard_that_fails_stops_the_command_which_goes_on_later(place, shards, tmp_path, monkeypatch):
    address, faults, kinds = place
    monkeypatch.setattr("diptych.data.store._CHUNK", 5)
    monkeypatch.setattr(remote, "_TRIES", 3)
    spec = f"{address}/shard-{{000..003}}.tar"
    open_source(spec)
    for copy in (tmp_path / "cache" / "tars").iterdir():
        copy.unlink()
    faults.always["shard-002.tar"] = kinds[0]
    reason = re.escape(f"{address}/shard-002.tar: cannot be read, tried 3 times (")
    with pytest.raises(UserError, match=reason + ".*: the same command goes on"):
        encoded(spec, tmp_path / "far")
    assert (tmp_path / ".far.partial" / "progress.json").is_file()
    faults.always.clear()
    assert encoded(spec, tmp_path / "far") == encoded(f"{shards}/shard-{{000..003}}.tar", tmp_path / "near")


def test_servers_without_ranges(shards, serve, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    server = serve({path.name: path.read_bytes() for path in shards.iterdir()}, Faults())
    server.ranges = False
    source = open_source(f"http://127.0.0.1:{server.server_port}/shard-000.tar")
    assert numbers(source, range(ITEMS)) == list(range(ITEMS))
    (copy,) = (tmp_path / "cache" / "tars").iterdir()
    copy.unlink()
    monkeypatch.setattr(remote.Cache, "is_worth_a_copy", lambda self, file: False)
    assert numbers(source, range(ITEMS)) == list(range(ITEMS)), "one by one"


def test_captions_need_no_network_once_a_tar_is_indexed(flaky):
    open_source("flaky://data/*.tar")
    before = flaky.answered.copy()
    source = open_source("flaky://data/*.tar")
    assert [source.captions(i) for i in range(len(source))] == [[f"photo {i}"] for i in range(SHARDS * ITEMS)]
    assert numbers(source, range(len(source))) == list(range(SHARDS * ITEMS)), "the copies are still there"
    assert flaky.answered == before


def test_the_cache_is_bounded_and_reads_what_it_does_not_hold_by_range(flaky, shards, tmp_path, monkeypatch):
    size = (shards / "shard-000.tar").stat().st_size
    monkeypatch.setenv("DIPTYCH_CACHE_GB", str(2.5 * size / 1e9))
    source = open_source("flaky://data/*.tar")
    assert used(tmp_path) <= 2.5 * size
    before = flaky.answered.total()
    order = np.arange(SHARDS * ITEMS).reshape(SHARDS, ITEMS).T.ravel()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda i: numbers(source, [i])[0], order)) == order.tolist()
    assert used(tmp_path) <= 2.5 * size
    assert flaky.answered.total() > before
    monkeypatch.setenv("DIPTYCH_CACHE_GB", "0.00001")
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "small"))
    with pytest.raises(UserError, match=r"more than the cache may hold .*: raise DIPTYCH_CACHE_GB"):
        open_source("flaky://data/*.tar")


def test_a_tar_that_is_read_in_order_is_copied_and_one_of_many_is_not(flaky, shards, tmp_path, monkeypatch):
    size = (shards / "shard-000.tar").stat().st_size
    monkeypatch.setenv("DIPTYCH_CACHE_GB", str(1.5 * size / 1e9))
    monkeypatch.setattr(remote, "_RECENT", 12)
    source = open_source("flaky://data/*.tar")
    (copy,) = (tmp_path / "cache" / "tars").iterdir()
    held = next(shard for shard in range(SHARDS) if f"shard-{shard:03}" in copy.name)
    others = [shard for shard in range(SHARDS) if shard != held]
    numbers(source, [shard * ITEMS + i for i in range(7) for shard in others])
    assert copy.is_file(), "seven reads of each of three tars are by range"
    numbers(source, range(others[0] * ITEMS, (others[0] + 1) * ITEMS))
    (copy,) = (tmp_path / "cache" / "tars").iterdir()
    assert f"shard-{others[0]:03}" in copy.name


def test_processes_share_the_cache(shards, serve, tmp_path):
    pytest.importorskip("aiohttp")
    server = serve({path.name: path.read_bytes() for path in shards.iterdir()}, Faults())
    size = (shards / "shard-000.tar").stat().st_size
    script = f"""
from diptych.data.sources import open_source
source = open_source("http://127.0.0.1:{server.server_port}/shard-{{000..003}}.tar")
for turn in range(2):
    print([round(float(source.image(i, 64).mean() - 1) / 4) for i in range({SHARDS * ITEMS})])
"""
    surroundings = os.environ | {"DIPTYCH_CACHE_GB": str(1.2 * size / 1e9)}
    running = [
        subprocess.Popen([sys.executable, "-c", script], env=surroundings, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        told, _ = process.communicate(timeout=120)
        assert told.splitlines() == [str(list(range(SHARDS * ITEMS)))] * 2
    assert used(tmp_path) <= 1.2 * size
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_stream_over_some_tars_at_a_time_copies_each_once_an_epoch(flaky, shards, tmp_path, monkeypatch):
    size = (shards / "shard-000.tar").stat().st_size
    monkeypatch.setenv("DIPTYCH_CACHE_GB", str(2.2 * size / 1e9))
    source = open_source("flaky://data/*.tar")
    flaky.answered.clear()
    everything = [Subset(source, np.arange(len(source)))]
    stream = pixel_stream(everything, size=64, skipped=SkippedItems(), flip=False, seed=0, shards_together=2)
    batches = BatchSampler({"images": stream}, multiples={"images": 1}, batch_size=8, seed=0)
    shown = []
    for step in range(SHARDS * ITEMS // 8):
        pixels_B3HW = batches(step)["images"].pixels_B3HW
        shown += [round((float(pixels.float().mean()) - 1) / 4) for pixels in pixels_B3HW]
    assert sorted(shown) == list(range(SHARDS * ITEMS))
    for half in (shown[:24], shown[24:]):
        assert len({number // ITEMS for number in half}) == 2
    chunks = -(-size // 50_000)
    assert max(flaky.answered.values()) <= chunks + remote._OFTEN, "once, after a few reads by range"
    with pytest.raises(UserError, match="shards-together is for tars"):
        shard_order([Subset(ScenesSource(count=4), np.arange(4))], 2)


def test_what_a_killed_process_left_is_removed(flaky, tmp_path):
    tars = tmp_path / "cache" / "tars"
    tars.mkdir(parents=True)
    (tars / "dead.tar.part").write_bytes(b"")
    os.utime(tars / "dead.tar.part", (0, 0))
    (tars / "alive.tar.part").write_bytes(b"")
    open_source("flaky://data/shard-000.tar")
    assert sorted(path.name for path in tars.glob("*.part")) == ["alive.tar.part"]


def test_a_file_that_changed_is_read_anew(flaky, shards):
    source = open_source("flaky://data/shard-000.tar")
    before = content_digest(source)
    system = fsspec.filesystem("flaky")
    system.pipe_file("/data/shard-000.tar", (shards / "shard-001.tar").read_bytes())
    again = open_source("flaky://data/shard-000.tar")
    assert numbers(again, [0]) == [ITEMS]
    assert content_digest(again) != before


def test_a_file_that_is_replaced_while_it_is_copied_is_refused(flaky, shards, monkeypatch):
    whole = Flaky.cat_file

    def replaced(self, path, **kwargs):
        data = whole(self, path, **kwargs)
        self.pipe_file(path, (shards / "shard-001.tar").read_bytes())
        return data

    monkeypatch.setattr(Flaky, "cat_file", replaced)
    with pytest.raises(UserError, match=r"shard-000\.tar: was replaced while it was read: start again"):
        open_source("flaky://data/shard-000.tar")


def test_tables_and_texts(flaky):
    system = fsspec.filesystem("flaky")
    system.pipe_file("/data/texts.txt", b"one\ntwo\n")
    system.pipe_file("/data/more.csv", b"caption,split\nthree dogs,train\nfour cats,test\n")
    system.pipe_file("/data/images.csv", b"file_name,caption\na.jpg,a cat\nb.jpg,a dog\n")
    texts = open_source("flaky://data/texts.txt")
    assert [texts.captions(i) for i in range(len(texts))] == [["one"], ["two"]]
    table = open_source("flaky://data/more.csv?split=train")
    assert [table.captions(i) for i in range(len(table))] == [["three dogs"]]
    with pytest.raises(UserError, match=r"images\.csv: images beside a table are not fetched: put them into tars"):
        open_source("flaky://data/images.csv")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flaky://data", "flaky://data: is a folder: put its images into tars"),
        ("flaky://data/*.txt", r"flaky://data/\*\.txt: matches no file"),
        ("flaky://data/shard-000.tar,/tmp/near.tar", "/tmp/near.tar: files of this machine and addresses"),
        ("flaky://data/shard-000.tar?splt=train", "no option 'splt'"),
        ("nothing://data/a.tar", "nothing://data/a.tar: cannot be opened .*nothing"),
    ],
)
def test_what_cannot_be(flaky, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_https_lists_no_files():
    pytest.importorskip("aiohttp")
    with pytest.raises(UserError, match=r"cannot list its files: number them"):
        open_source("https://example.org/*.tar")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"gs://bucket/a\.tar: needs a package .*gcsfs"):
        open_source("gs://bucket/a.tar")
