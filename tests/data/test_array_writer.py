import json

import numpy as np
import pytest

from diptych.data.array_writer import ResumableArrayWriter

CHUNKS = [np.arange(6, dtype=np.float32).reshape(3, 2) + 10 * n for n in range(4)]


def opened(folder) -> np.ndarray:
    return np.load(folder / "vectors.npy")


def grow(out, *, made_by, chunks=CHUNKS, fail_at=None):
    writer = ResumableArrayWriter(out, made_by, format="npy")
    began = writer.done
    for number in range(began, len(chunks)):
        if number == fail_at:
            writer.append({"vectors": chunks[number], "late": chunks[number]}, keys=["lost"])  # killed before its end
            return began
        writer.append({"vectors": chunks[number]}, keys=[f"{number}-{row}" for row in range(3)], done=number + 1)
    writer.skipped["bad"] = "no picture"
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
    assert json.loads((tmp_path / "store/skipped.jsonl").read_text()) == {"key": "bad", "reason": "no picture"}
    assert sorted(contents(tmp_path / "store")) == ["keys.txt", "manifest.json", "skipped.jsonl", "vectors.npy"]


@pytest.mark.parametrize("then", [{"n": 2}, None])
def test_another_makers_half_is_not_continued(tmp_path, then):
    grow(tmp_path / "store", made_by={"n": 1}, fail_at=2)
    assert grow(tmp_path / "store", made_by=then) == 0
    np.testing.assert_array_equal(opened(tmp_path / "store"), np.concatenate(CHUNKS))


def test_what_cannot_be_opened_replaces_nothing(tmp_path):
    grow(tmp_path / "store", made_by={"n": 1})
    before = contents(tmp_path / "store")
    writer = ResumableArrayWriter(tmp_path / "store", {"n": 2}, format="npy")
    writer.append({"other": CHUNKS[0]}, keys="abc", done=1)
    with pytest.raises(FileNotFoundError):
        writer.finish("manifest.json", {}, opened)
    assert contents(tmp_path / "store") == before
