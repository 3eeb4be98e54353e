import json
import os
import socket
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diptych.data.engine import LOCAL, Engine, ResumableArrayWriter, Rows
from diptych.data.pixels import SkippedItems
from diptych.data.scenes import ScenesSource
from diptych.errors import UserError

SOURCE = ScenesSource(count=20)
ITEMS = np.arange(20)


def squares(factor: int, block: np.ndarray) -> Rows:
    odd = block % 10 == 7
    arrays = {"squares": factor * block[~odd] ** 2, "pairs": np.stack([block, block], 1)}
    return Rows(arrays=arrays, skipped={str(item): "a seven" for item in block[odd]})


def gather(engine: Engine, work=squares, **changes) -> dict[str, np.ndarray]:
    given = {"source": SOURCE, "rows": 3, "skipped": SkippedItems(max_skipped_share=0.5), **changes}
    return engine.gather("squares", work, 2, ITEMS, **given)


def test_blocks_become_one_array_and_what_is_left_out_is_counted():
    skipped, told = SkippedItems(max_skipped_share=0.5), []
    found = gather(LOCAL, skipped=skipped, advance=lambda *done: told.append(done))
    np.testing.assert_array_equal(found["squares"], [2 * i * i for i in range(20) if i not in (7, 17)])
    np.testing.assert_array_equal(found["pairs"], np.stack([ITEMS, ITEMS], 1))
    assert skipped.reasons == {"7": "a seven", "17": "a seven"}
    assert told == [(done, 20) for done in (3, 6, 9, 12, 15, 18, 20)]
    with pytest.raises(UserError, match="2 of 20 items are unreadable"):
        gather(LOCAL, skipped=SkippedItems(max_skipped_share=0.09))


def test_what_is_kept_is_not_made_again(tmp_path):
    seen = []

    def stops(factor: int, block: np.ndarray) -> Rows:
        seen.extend(block.tolist())
        if len(seen) == 12:
            raise KeyboardInterrupt
        return squares(factor, block)

    engine = Engine(keep=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        gather(engine, stops)
    skipped = SkippedItems(max_skipped_share=0.5)
    found = gather(engine, stops, skipped=skipped)
    assert seen == [*range(12), *range(9, 20)]
    assert sorted(skipped.reasons) == ["17", "7"]
    for name, whole in gather(LOCAL).items():
        np.testing.assert_array_equal(found[name], whole)
    assert gather(engine, stops, source=ScenesSource(count=20, seed=1))["pairs"].shape == (20, 2)
    assert len(seen) == 23 + 20  # another source has another content


def test_what_is_missing_for_ray_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs ray .*: pip install 'diptych\[ray\]'"):
        Engine(name="ray").check()
    with pytest.raises(UserError, match=r"--ray-address here:1: goes with --engine ray"):
        Engine(address="here:1").check()
    LOCAL.check()
    monkeypatch.setitem(sys.modules, "ray", object())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--ray-address {address}: nothing answers there"):
            Engine(name="ray", address=address).check()


@pytest.fixture
def calls(tmp_path, ray_by_value) -> Path:
    """Folder with a file for each time that a worker was given a block, called by its first item and the number."""
    ray_by_value(sys.modules[__name__])
    (tmp_path / "calls").mkdir()
    return tmp_path / "calls"


def dies(calls: Path, deaths: int, factor: int, block: np.ndarray) -> Rows:
    before = len(list(calls.glob(f"{block[0]}-*")))
    (calls / f"{block[0]}-{before}").touch()
    if block[0] == 9 and before < deaths:
        os._exit(1)
    return squares(factor, block)


@pytest.mark.ray
def test_a_worker_that_dies_is_replaced_and_its_blocks_are_done_again(calls):
    engine = Engine(name="ray", reopen=partial(int, "2"))
    found = gather(engine, partial(dies, calls, 1))
    for name, whole in gather(LOCAL).items():
        np.testing.assert_array_equal(found[name], whole)
    once = {f"{start}-0" for start in range(0, 20, 3)}
    assert {file.name for file in calls.iterdir()} == once | {"9-1"}


@pytest.mark.ray
def test_a_block_that_kills_every_worker_ends_the_command(calls):
    with pytest.raises(UserError, match="3 workers of Ray died at the same block"):
        gather(Engine(name="ray", reopen=partial(int, "2")), partial(dies, calls, 9))


def mistaken(factor: int, block: np.ndarray) -> Rows:
    raise UserError(f"{block[0]}: not there")


@pytest.mark.ray
def test_a_mistake_that_a_worker_finds_is_told_as_here(calls):
    with pytest.raises(UserError, match=r"^\d+: not there$"):
        gather(Engine(name="ray", reopen=partial(int, "2")), mistaken)


# Arrays that grow


CHUNKS = [np.arange(6, dtype=np.float32).reshape(3, 2) + 10 * n for n in range(4)]


def opened(folder) -> np.ndarray:
    return np.load(folder / "vectors.npy")


def grow(out, *, made_by, chunks=CHUNKS, fail_at=None):
    writer = ResumableArrayWriter(out, made_by)
    began = writer.done
    for number in range(began, len(chunks)):
        if number == fail_at:
            writer.append({"vectors": chunks[number], "late": chunks[number]}, keys=["lost"])  # killed before its end
            return began
        writer.append({"vectors": chunks[number]}, keys=[f"{number}-{row}" for row in range(3)], done=number + 1)
    writer.skipped["bad"] = "no image"
    writer.finish("manifest.json", {"rows": writer.items}, opened)
    return began


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_an_interrupted_maker_goes_on_to_the_same_bytes(tmp_path, fail_at):
    grow(tmp_path / "whole", made_by={"n": 1})
    grow(tmp_path / "cut", made_by={"n": 1}, fail_at=fail_at)
    assert not (tmp_path / "cut").exists()
    assert grow(tmp_path / "cut", made_by={"n": 1}) == fail_at
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert not (tmp_path / ".cut.partial").exists()


def test_what_it_leaves(tmp_path):
    grow(tmp_path / "store", made_by={"n": 1})
    np.testing.assert_array_equal(opened(tmp_path / "store"), np.concatenate(CHUNKS))
    assert (tmp_path / "store/keys.txt").read_text().split()[3:5] == ["1-0", "1-1"]
    assert json.loads((tmp_path / "store/manifest.json").read_text()) == {"rows": 12}
    assert json.loads((tmp_path / "store/skipped.jsonl").read_text()) == {"key": "bad", "reason": "no image"}
    assert sorted(contents(tmp_path / "store")) == ["keys.txt", "manifest.json", "skipped.jsonl", "vectors.npy"]


@pytest.mark.parametrize("then", [{"n": 2}, None])
def test_another_makers_half_is_not_continued(tmp_path, then):
    grow(tmp_path / "store", made_by={"n": 1}, fail_at=2)
    assert grow(tmp_path / "store", made_by=then) == 0
    np.testing.assert_array_equal(opened(tmp_path / "store"), np.concatenate(CHUNKS))


def test_what_cannot_be_opened_replaces_nothing(tmp_path):
    grow(tmp_path / "store", made_by={"n": 1})
    before = contents(tmp_path / "store")
    writer = ResumableArrayWriter(tmp_path / "store", {"n": 2})
    writer.append({"other": CHUNKS[0]}, keys="abc", done=1)
    with pytest.raises(FileNotFoundError):
        writer.finish("manifest.json", {}, opened)
    assert contents(tmp_path / "store") == before


def test_arrays_may_begin_without_rows(tmp_path):
    writer = ResumableArrayWriter(tmp_path / "store", {"n": 1})
    writer.append({"late": np.empty((0, 3), np.float16), "never": np.empty((0, 2), np.int64)}, done=1)
    writer = ResumableArrayWriter(tmp_path / "store", {"n": 1})
    assert writer.done == 1
    writer.append({"late": np.empty((0, 3), np.float16)}, done=2)
    writer.append({"late": np.ones((2, 3), np.float16)}, done=3)
    folder = writer.finish("manifest.json", {}, lambda folder: folder)
    np.testing.assert_array_equal(np.load(folder / "late.npy", mmap_mode="r"), np.ones((2, 3)))
    never = np.load(folder / "never.npy", mmap_mode="r")
    assert (never.shape, never.dtype) == ((0, 2), np.int64)
