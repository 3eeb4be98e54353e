"""Folders of images: side-cars, metadata files, labels, splits."""

import json
import os

import pytest
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.sources.decode import UnreadableImage
from diptych.errors import UserError


def put(path, grey=0, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_side_cars_hold_a_caption_per_line(tmp_path):
    put(tmp_path / "b.png", 2, "two  b\n\nb again\n")
    put(tmp_path / "a.png", 1, "one a")
    put(tmp_path / "c.v1.png", 3)
    source = open_source(str(tmp_path))
    assert source.has_images
    assert source.has_captions
    assert [source.key(i) for i in range(len(source))] == ["a.png", "b.png", "c.v1.png"]
    assert [source.captions(i) for i in range(3)] == [["one a"], ["two b", "b again"], []]
    assert [int(source.image(i, 4)[0, 0, 0]) for i in range(3)] == [1, 2, 3]
    assert source.label(0) is None


def test_bare_images_in_sub_folders_have_labels(tmp_path):
    put(tmp_path / "cat" / "x.JPG")
    put(tmp_path / "dog" / "x.png")
    put(tmp_path / ".hidden" / "x.png")
    put(tmp_path / "dog" / "._x.png")
    (tmp_path / "README.txt").write_text("photos")
    (tmp_path / "dog" / "Thumbs.db").write_text("?")
    source = open_source(str(tmp_path))
    assert not source.has_captions
    assert [(source.key(i), source.label(i)) for i in range(len(source))] == [
        ("cat/x.JPG", "cat"),
        ("dog/x.png", "dog"),
    ]


def test_splits_are_folders(tmp_path):
    put(tmp_path / "train" / "cat" / "a.png", 1)
    put(tmp_path / "train" / "b.png", 2)
    put(tmp_path / "test" / "cat" / "c.png", 3)
    put(tmp_path / "cat" / "d.png", 4)
    source = open_source(f"{tmp_path}?split=train")
    assert [(source.key(i), source.label(i)) for i in range(len(source))] == [
        ("train/b.png", None),
        ("train/cat/a.png", "cat"),
    ]
    assert len(open_source(str(tmp_path))) == 4
    with pytest.raises(UserError, match="no split 'cat'; it has test, train"):
        open_source(str(tmp_path), split="cat")


def test_metadata_files(tmp_path):
    for i in range(2):
        put(tmp_path / "train" / f"{i}.png", i)
        put(tmp_path / "test" / f"{i}.png", 9 + i)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n1.png,one\n0.png,zero\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,text\n1.png,ten\n")
    source = open_source(str(tmp_path), split="train")
    assert [(int(source.image(i, 4)[0, 0, 0]), source.captions(i)) for i in range(2)] == [(1, ["one"]), (0, ["zero"])]
    both = open_source(str(tmp_path))
    assert sorted(both.captions(i)[0] for i in range(len(both))) == ["one", "ten", "zero"]
    with pytest.raises(UserError, match="no split 'val'"):
        open_source(str(tmp_path), split="val")


def test_metadata_at_the_root(tmp_path):
    put(tmp_path / "images" / "a.png", 5)
    rows = [{"file_name": "images/a.png", "captions": ["one", "two"], "split": "train"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path), split="train")
    assert source.captions(0) == ["one", "two"]
    assert source.image(0, 4)[0, 0, 0] == 5


def test_links_to_folders_are_followed_once(tmp_path):
    put(tmp_path / "photos" / "a.png")
    (tmp_path / "all").mkdir()
    os.symlink(tmp_path / "photos", tmp_path / "all" / "photos")
    os.symlink(tmp_path / "all", tmp_path / "all" / "loop")
    source = open_source(str(tmp_path / "all"))
    assert [source.key(i) for i in range(len(source))] == ["photos/a.png"]


def test_what_is_not_used_is_named(tmp_path, caplog):
    put(tmp_path / "a.png", caption="a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,a\n")
    source = open_source(str(tmp_path))
    assert list(source.notes) == [
        "1 text without an image of that name not used: b.txt",
        "1 other file not used: captions.csv; a table of captions is a source of its own",
    ]
    open_source(str(tmp_path))
    assert [record.message for record in caplog.records] == [f"{tmp_path}: {note}" for note in source.notes]


def test_a_text_for_two_images_is_refused(tmp_path):
    put(tmp_path / "cat.jpg")
    put(tmp_path / "cat.png", caption="a cat")
    with pytest.raises(UserError, match=r"cat\.txt: belongs to 2 images, such as cat\.jpg and cat\.png; rename"):
        open_source(str(tmp_path))
    source = open_source(f"{tmp_path}?image=png")
    assert [(source.key(i), source.captions(i)) for i in range(len(source))] == [("cat.png", ["a cat"])]
    assert source.notes == ["1 other file not used: cat.jpg"]


def test_side_cars_of_other_tools(tmp_path):
    """kohya: .caption; img2dataset: .json, and folders that are shards."""
    put(tmp_path / "00000" / "000000000.jpg")
    (tmp_path / "00000" / "000000000.json").write_text(json.dumps({"caption": "from json", "url": "https://a.org/x"}))
    put(tmp_path / "00001" / "000010000.jpg")
    (tmp_path / "00001" / "000010000.caption").write_text("from caption")
    for shard in ("00000", "00001"):
        (tmp_path / f"{shard}_stats.json").write_text("{}")
        (tmp_path / f"{shard}.parquet").touch()
    source = open_source(str(tmp_path))
    assert [source.captions(i) for i in range(2)] == [["from json"], ["from caption"]]
    assert [source.label(i) for i in range(2)] == [None, None]


def test_one_folder_is_no_class_and_splits_are_named(tmp_path):
    put(tmp_path / "images" / "a.png")
    put(tmp_path / "images" / "b.png")
    assert open_source(str(tmp_path)).label(0) is None
    put(tmp_path / "c" / "train2017" / "a.png")
    put(tmp_path / "c" / "val2017" / "b.png", 7)
    source = open_source(str(tmp_path / "c"))
    assert source.notes == ["the splits train2017, val2017 are used together; choose one, e.g. ?split=val2017"]
    assert source.label(0) is None
    assert len(open_source(f"{tmp_path / 'c'}?split=val2017")) == 1


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "csv.gz"])
def test_metadata_of_every_format(tmp_path, kind):
    import gzip

    import pyarrow
    import pyarrow.parquet

    put(tmp_path / "train" / "a.png", 1)
    put(tmp_path / "test" / "b.png", 2)
    put(tmp_path / "test" / "unlisted.png", 3)
    rows = [{"file_name": "train/a.png", "text": "one"}, {"file_name": "test/b.png", "text": "two"}]
    path = tmp_path / f"metadata.{kind}"
    lines = {"csv": ",", "tsv": "\t", "csv.gz": ","}
    if kind in lines:
        text = "\n".join(lines[kind].join(cells) for cells in (list(rows[0]), *(row.values() for row in rows)))
        path.write_bytes(gzip.compress(text.encode()) if kind == "csv.gz" else text.encode())
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path))
    assert [source.captions(i) for i in range(len(source))] == [["one"], ["two"]]
    assert any("1 image not listed in metadata" in note and "test/unlisted.png" in note for note in source.notes)
    assert any("splits test, train are used together" in note for note in source.notes)
    assert [open_source(str(tmp_path), split="test").captions(0)] == [["two"]]


def test_notes_elsewhere_are_no_side_cars(tmp_path):
    put(tmp_path / "images" / "a.png", caption="a")
    (tmp_path / "train_list.txt").write_text("a")
    assert len(open_source(str(tmp_path))) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images; it is empty"),
        (["a.doc"], "holds no images"),
        (["b/shard.tar"], "holds no images, but b/shard.tar; give that file itself"),
        (["photos.zip"], "holds no images, but photos.zip; unpack it first"),
        (["t/a.txt", "t/b.txt"], r"holds no images, but 2 texts; give them as a source of texts, .*/t/\*\.txt'"),
        (["data-00000.arrow", "state.json"], "save the data set with to_parquet"),
    ],
)
def test_folders_without_images(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4\x14\0\xf8", "a document of Word"),
        (b"{\\rtf1 a dog}", "is RTF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of git-lfs"),
    ],
)
def test_side_cars_that_are_no_texts(tmp_path, content, message):
    put(tmp_path / "a.png", caption="a")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt: .*{message}"):
        open_source(str(tmp_path)).captions(0)


def test_damaged_items_are_named(tmp_path):
    put(tmp_path / "a.png", caption="a")
    put(tmp_path / "b.png", caption="")
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    source = open_source(str(tmp_path))
    assert source.captions(1) == []
    with pytest.raises(UserError, match=r"a\.txt: line 1, byte 3"):
        source.captions(0)
    with pytest.raises(UnreadableImage, match=r"c\.heic: is HEIC"):
        source.image(2, 8)
    os.remove(tmp_path / "b.png")
    with pytest.raises(UnreadableImage, match=r"b\.png: does not exist"):
        source.image(1, 8)


def test_columns_for_other_sources_do_no_harm(tmp_path):
    from diptych.data.sources.columns import Columns

    put(tmp_path / "a.png", caption="a")
    assert open_source(str(tmp_path), columns=Columns(caption="title")).captions(0) == ["a"]


def test_a_pipe_is_no_text_to_wait_for(tmp_path):
    put(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt: is not a file"):
        open_source(str(tmp_path))


def test_folders_of_classes_beside_a_table_are_named(tmp_path):
    put(tmp_path / "cat" / "a.png")
    put(tmp_path / "dog" / "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat/a.png,one\ndog/b.png,two\n")
    source = open_source(str(tmp_path))
    assert source.label(0) is None
    assert source.notes == ["folders such as cat are no classes beside metadata.csv; add a column label"]
