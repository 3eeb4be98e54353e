"""What an audit finds, keeps and writes."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.data.audit import Fit, audit, near_duplicates, write_audit
from diptych.data.check import content_digest
from diptych.data.sources import open_source
from diptych.data.sources.decode import decode
from diptych.errors import UserError


def scene(seed, side=64):
    """Smooth random colours, which differ from seed to seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def small(image):
    return decode(image, 32)


def test_copies_are_found_whatever_was_done_to_them(tmp_path):
    images = [scene(seed) for seed in range(40)]
    scene(3).save(tmp_path / "again.jpg", quality=40)
    copies = [decode(tmp_path / "again.jpg", 32), small(scene(5, 20)), small(scene(7).transpose(Image.Transpose(0)))]
    twins = near_duplicates([*map(small, images), None, *copies, small(scene(99))])
    assert twins == {41: 3, 42: 5, 43: 7}


def test_the_earliest_of_a_group_stands_for_it():
    assert near_duplicates([small(scene(1)), small(scene(2)), *[small(scene(1))] * 3]) == {2: 0, 3: 0, 4: 0}
    assert near_duplicates([]) == {}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        scene(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}\nanother {i}\n")
    scene(0).save(folder / "7.jpg", quality=60)
    (folder / "7.txt").write_text("number 1\n")
    scene(8).resize((90, 20)).save(folder / "8.png")
    (folder / "9.jpg").write_text("<html>")
    return folder


def test_what_is_found_and_kept(photos, tmp_path):
    source = open_source(str(photos))
    keys = [source.key(i) for i in range(len(source))]
    fits = [Fit(keys.index(f"{i}.png"), caption, 10.0 * i + caption) for i in range(6) for caption in range(2)]
    findings = audit(source, fits, worst=0.1)
    assert (findings[0].key, findings[0].caption, findings[0].rank) == ("0.png", "number 0", 0.0)
    reasons = {(found.key, found.caption): found.reasons for found in findings if found.reasons}
    assert reasons == {
        ("0.png", "number 0"): ["caption does not fit"],
        ("0.png", "another 0"): ["caption does not fit"],
        ("7.jpg", "number 1"): ["image there twice", "caption of another image too"],
        ("8.png", ""): ["sides of 4.5 : 1", "no caption"],
        ("9.jpg", ""): ["unreadable image", "no caption"],
    }
    lines = write_audit(source, findings, tmp_path / "out", spec=str(photos))
    assert lines[0] == f"{photos}: 13 captions of 9 items looked at"
    assert f"{2:>7,}  caption does not fit" in lines
    spec = f"{photos}?keep={tmp_path / 'out' / 'keep.jsonl'}"
    assert lines[-1] == f"what is left, as a source: '{spec}'"
    with open(tmp_path / "out" / "audit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] | {"fit": "0.0", "rank": "0.0"} == rows[0]
    assert [row["key"] for row in rows] == pq.read_table(tmp_path / "out" / "audit.parquet")["key"].to_pylist()
    assert decode(tmp_path / "out" / "worst.png", 32).mean() > 100

    kept = open_source(spec)
    assert [kept.key(i) for i in range(len(kept))] == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "8.png"]
    assert [kept.captions(0), kept.captions(1), kept.captions(6)] == [[], ["number 1", "another 1"], []]
    assert np.array_equal(kept.image(1, 8), source.image(keys.index("1.png"), 8))


def test_a_list_of_what_to_keep(photos, tmp_path):
    file = tmp_path / "keep.jsonl"
    file.write_text(json.dumps({"key": "2.png"}) + "\n" + json.dumps({"key": "1.png", "captions": ["other"]}))
    source = open_source(f"{photos}?keep={file}")
    assert [source.captions(i) for i in range(2)] == [["number 2", "another 2"], ["other"]]
    before = content_digest(source)
    file.write_text(json.dumps({"key": "2.png"}))
    assert content_digest(open_source(f"{photos}?keep={file}")) != before
    file.write_text(json.dumps({"key": "no.png"}))
    with pytest.raises(UserError, match=r"keep\.jsonl: row 1: .* has no item 'no\.png'"):
        open_source(f"{photos}?keep={file}")


def test_a_list_of_scenes_to_keep(tmp_path):
    scenes = open_source("scenes:?count=4")
    (tmp_path / "keep.jsonl").write_text(json.dumps({"key": scenes.key(2)}))
    source = open_source(f"scenes:?count=4&keep={tmp_path / 'keep.jsonl'}")
    assert [source.captions(i) for i in range(len(source))] == [scenes.captions(2)]
