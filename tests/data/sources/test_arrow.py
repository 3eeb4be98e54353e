"""Parquet files and the hub: embedded images, offline, quiet, no stale copies."""

import io
import os
import socket

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.sources.decode import UnreadableImage
from diptych.errors import UserError


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Any attempt to reach a network fails; `datasets` keeps its copies in the test's folder."""

    def refuse(*_, **__):
        raise AssertionError("touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows_of(source):
    return [(int(source.image(i, 4)[0, 0, 0]), source.captions(i), source.label(i)) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["bytes", "record"])
def test_embedded_images(tmp_path, kind, capfd):
    images = [png(i) if kind == "bytes" else {"bytes": png(i), "path": f"{i}.png"} for i in range(3)]
    path = write(
        tmp_path / "t.parquet",
        image=images,
        filename=["0.png", "1.png", "2.png"],
        caption=["a", "b", "c"],
        label=[7, 8, 9],
    )
    source = open_source(path)
    assert source.has_images
    assert source.has_captions
    assert rows_of(source) == [(0, ["a"], "7"), (1, ["b"], "8"), (2, ["c"], "9")]
    assert source.key(2) == "row 2"
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_datasets_own_parquet(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "split": datasets.Value("string"),
        }
    )
    rows = [
        {
            "image": {"bytes": png(i), "path": None},
            "captions": [f"c{i}", "x"],
            "label": i % 2,
            "split": ["train", "test"][i % 2],
        }
        for i in range(4)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "t.parquet")
    source = open_source(f"{tmp_path}/t.parquet?split=test")
    assert rows_of(source) == [(1, ["c1", "x"], "dog"), (3, ["c3", "x"], "dog")]
    with pytest.raises(UserError, match="no split 'val'; it has test, train"):
        open_source(str(tmp_path / "t.parquet"), split="val")


def test_paths_in_parquet_are_read_like_any_table(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    path = write(tmp_path / "t.parquet", image=["a.png", "a.png"], caption=["one", "two"])
    assert rows_of(open_source(path)) == [(5, ["one", "two"], None)]
    labels = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    datasets.Dataset.from_list([{"text": "a", "label": 1}], features=labels).to_parquet(tmp_path / "l.parquet")
    assert open_source(str(tmp_path / "l.parquet")).label(0) == "y"
    texts = open_source(write(tmp_path / "u.parquet", text=["a", "b"]))
    assert not texts.has_images
    assert texts.captions(1) == ["b"]


def test_shards_in_order_and_odd_names(tmp_path):
    folder = tmp_path / "[odd] {name} *"
    folder.mkdir()
    for i in range(2):
        write(folder / f"t-{i}.parquet", image=[png(i)], text=[str(i)])
    assert rows_of(open_source(f"{folder}/t-1.parquet")) == [(1, ["1"], None)]
    both = open_source(f"{folder}/t-1.parquet,{folder}/t-0.parquet")
    assert rows_of(both) == [(1, ["1"], None), (0, ["0"], None)]


def test_files_with_other_columns(tmp_path):
    write(tmp_path / "t-0.parquet", image=[png(0)], text=["dog"], label=pa.array([0], pa.int32()))
    write(tmp_path / "t-1.parquet", url=["u"], label=pa.array([1], pa.int64()), text=["cat"], image=[png(1)])
    both = open_source(f"{tmp_path}/t-*.parquet")
    assert rows_of(both) == [(0, ["dog"], "0"), (1, ["cat"], "1")]
    assert both.notes == ["columns not used, as some files lack them: url"]
    write(tmp_path / "t-2.parquet", other=["x"])
    with pytest.raises(UserError, match=r"t-0\.parquet and another file have no column in common"):
        open_source(f"{tmp_path}/t-*.parquet")


def test_splits_that_are_numbers_with_names(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    features["split"] = datasets.ClassLabel(names=["train", "test"])
    rows = [{"image": {"bytes": png(i), "path": None}, "text": f"photo {i}", "split": i} for i in range(2)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "t.parquet")
    assert rows_of(open_source(f"{tmp_path}/t.parquet?split=test")) == [(1, ["photo 1"], None)]


def test_lists_of_one_image_are_images(tmp_path):
    talk = [[{"user": "What is it?", "assistant": f"photo {i}"}] for i in range(2)]
    features = datasets.Features(
        {
            "images": datasets.Sequence(datasets.Image()),
            "texts": [{"user": datasets.Value("string"), "assistant": datasets.Value("string")}],
        }
    )
    rows = [{"images": [{"bytes": png(i), "path": None}], "texts": talk[i]} for i in range(2)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "t.parquet")
    assert rows_of(open_source(str(tmp_path / "t.parquet"))) == [(0, ["photo 0"], None), (1, ["photo 1"], None)]
    several = write(tmp_path / "u.parquet", images=[[png(0), png(1)]], n=[1])
    with pytest.raises(UserError, match="column 'images' holds lists of images; write a row for each image"):
        open_source(several)


def test_a_changed_file_is_read_anew_and_the_working_folder_stays_clean(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = write(tmp_path / "t.parquet", image=[png(1)], text=["old"])
    assert open_source(path).captions(0) == ["old"]
    write(tmp_path / "t.parquet", image=[png(1)], text=["new"])
    assert open_source(path).captions(0) == ["new"]
    assert os.listdir(tmp_path / "work") == []


def test_damaged_images_are_named(tmp_path):
    source = open_source(write(tmp_path / "t.parquet", image=[png(1), b"", b"x", None], text=list("abcd")))
    for i, reason in ((1, "is empty"), (2, "is not an image"), (3, "is empty")):
        with pytest.raises(UnreadableImage, match=rf"t\.parquet: row {i}: {reason}"):
            source.image(i, 4)


@pytest.mark.parametrize("data", [b"", b"not parquet", b"PAR1" + bytes(100) + b"PAR1"])
def test_damaged_files(tmp_path, data):
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"t\.parquet: (is not readable as parquet|holds no rows)") as caught:
        open_source(str(tmp_path / "t.parquet"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "tar", "png"])
def test_what_stands_in_the_place_of_a_file_is_said(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    with pytest.raises(UserError, match=rf"t\.{kind}: is a pointer of git-lfs.*git lfs pull"):
        open_source(str(tmp_path)).image(0, 4) if kind == "png" else open_source(str(path))


def test_a_table_without_rows(tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        open_source(write(tmp_path / "t.parquet", text=pa.array([], pa.string())))


def fake_hub(monkeypatch, splits):
    calls = []

    def load(name, config=None, *, revision=None):
        calls.append((name, config, revision))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_hub(monkeypatch):
    def data(*greys):
        images = [Image.fromarray(np.full((8, 8, 3), grey, np.uint8)) for grey in greys]
        return datasets.Dataset.from_dict({"image": images, "text": [f"c{grey}" for grey in greys]}).cast_column(
            "image", datasets.Image()
        )

    calls = fake_hub(monkeypatch, datasets.DatasetDict(train=data(1, 2), test=data(3)))
    assert rows_of(open_source("hub:owner/name:test?small&revision=v2")) == [(3, ["c3"], None)]
    assert len(open_source("hub:owner/name", split="train")) == 2
    assert calls == [("owner/name", "small", "v2"), ("owner/name", None, None)]
    with pytest.raises(UserError, match=r"has the splits train, test; choose one, e.g. hub:owner/name:train"):
        open_source("hub:owner/name")
    with pytest.raises(UserError, match="no split 'val'; it has test, train"):
        open_source("hub:owner/name?split=val")


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach\n the hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"hub:owner/name: cannot be loaded .Couldn't reach the hub"):
        open_source("hub:owner/name")


def test_values_late_in_a_column_count(tmp_path):
    """`datasets` stores nulls first where nobody sorted them; the first rows say nothing of a column."""
    images = [{"bytes": png(i), "path": None} for i in range(24)]
    table = {"image": images, "caption": [None] * 20 + ["late"] * 4, "captions_list": [["a", None]] * 24}
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(table), path)
    source = open_source(str(path))
    assert [source.captions(0), source.captions(23)] == [[], ["late"]]
    assert open_source(f"{path}?caption=captions_list").captions(0) == ["a"]


def test_paths_are_relative_to_their_own_file(tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.png").write_bytes(png(i))
        for name, cell in (("paths", "x.png"), ("records", {"bytes": None, "path": "x.png"})):
            table = pa.table({"image": [cell], "caption": [f"c{i}"]})
            pq.write_table(table, tmp_path / str(i) / f"{name}.parquet")
    for name in ("paths", "records"):
        source = open_source(f"{tmp_path}/*/{name}.parquet")
        assert [int(source.image(i, 4)[0, 0, 0]) for i in range(2)] == [0, 1]


def test_types_of_columns_that_other_engines_write(tmp_path):
    """Views of strings, and captions as bytes, beside images as bytes."""
    for kind, column in [
        ("view", pa.array(["a dog", None]).cast(pa.string_view())),
        ("binary", pa.array([b"a dog", None], pa.binary())),
        ("dictionary", pa.array(["a dog", None]).dictionary_encode()),
        ("large", pa.array(["a dog", None], pa.large_string())),
    ]:
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"image": [png(1), png(2)], "caption": column}), path)
        source = open_source(str(path))
        assert [source.captions(i) for i in range(2)] == [["a dog"], []]


def test_rows_of_one_image_are_one_item(tmp_path):
    """Equal bytes, whatever their name; images of one length that differ in one byte stay apart."""
    other = bytearray(png(0))
    other[-1] ^= 1
    cells = [png(0), png(1), bytes(other), png(0), None, b"", None]
    images = [{"bytes": cell, "path": f"{i}.png"} for i, cell in enumerate(cells[:4])]
    images += [{"bytes": cell, "path": None} for cell in cells[4:]]
    path = write(
        tmp_path / "t.parquet",
        image=images,
        caption=list("abcdefg"),
        label=["x", "y", "z", "w", None, None, None],
        split=["train"] * 3 + ["test"] * 4,
    )
    source = open_source(path)
    assert [source.captions(i) for i in range(len(source))] == [["a", "d"], *([c] for c in "bcefg")]
    assert [source.key(i) for i in range(3)] == ["row 0", "row 1", "row 2"]
    assert [source.label(i) for i in range(4)] == ["x", "y", "z", None]
    assert "1 image with two labels, of which the first is used: row 0" in source.notes
    assert [source.captions(i) for i in range(4)] == [["a", "d"], ["b"], ["c"], ["e"]]
    test = open_source(path, split="test")
    assert (test.key(0), test.captions(0), test.label(0)) == ("row 0", ["d"], "w")
    bare = write(tmp_path / "bare.parquet", image=images[:4], label=["x", "y", "z", "x"])
    assert len(open_source(bare)) == 4


def test_missing_captions_and_labels_are_counted(tmp_path):
    path = write(
        tmp_path / "t.parquet",
        image=[png(i) for i in range(4)],
        captions=[["one", " nan"], ["null"], [None], ["two"]],
        label=[0, 1, -1, -1],
    )
    source = open_source(path)
    assert source.notes == [
        "2 captions such as nan or null taken for missing",
        "2 labels of -1 taken for missing; a class needs a name of its own",
    ]
    assert [source.label(i) for i in range(4)] == ["0", "1", None, None]


def test_other_columns_of_images_and_joined_labels_are_named(tmp_path):
    pictures = [png(1), png(2)]
    source = open_source(write(tmp_path / "t.parquet", image=pictures, image_2=pictures, label=["cat;dog", "cat"]))
    assert source.notes == [
        "columns not used: image_2 (images)",
        "labels such as 'cat;dog' are classes of their own: an image has one label",
    ]


def test_columns_beside_paths_are_named_too(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    source = open_source(write(tmp_path / "t.parquet", image=["0.png"], caption=["c"], y=[3], url=["http://x.org/0"]))
    assert source.notes == ["columns not used: y"]


def test_rows_that_img2dataset_could_not_download_are_left_out(tmp_path):
    path = write(
        tmp_path / "00000.parquet",
        key=["000000000", "000000001", "000000002"],
        caption=["a dog", "a cat", "a cow"],
        url=["http://x.org/a.jpg"] * 3,
        status=["success", "failed_to_download", "success"],
        jpg=[png(1), None, png(3)],
    )
    source = open_source(path)
    assert rows_of(source) == [(1, ["a dog"], None), (3, ["a cow"], None)]
    assert source.notes == ["1 row that img2dataset could not download not used"]
