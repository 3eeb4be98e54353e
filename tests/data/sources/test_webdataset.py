"""WebDataset tars: grouping, json fields, shards, threads, damaged files."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.sources import webdataset as tar_index
from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import UnreadableImage
from diptych.errors import UserError


def png(grey):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def make(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            data = json.dumps(data) if isinstance(data, dict) else data
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def grey(source, i):
    return int(source.image(i, 4)[0, 0, 0])


def test_members_are_grouped_by_key(tmp_path):
    members = {
        "./b.png": png(2),
        "a.png": png(1),
        "b.txt": "two b\nagain",
        "a.txt": "a",
        "b.cls": "7",
        "d/c.png": png(3),
        "d/.x.png": b"",
        "note.md": "",
    }
    source = open_source(make(tmp_path / "t.tar", members))
    assert source.has_images
    assert source.has_captions
    assert [source.key(i) for i in range(len(source))] == ["b", "a", "d/c"]
    assert [grey(source, i) for i in range(3)] == [2, 1, 3]
    assert [source.captions(i) for i in range(3)] == [["two b", "again"], ["a"], []]
    assert [source.label(i) for i in range(3)] == ["7", None, "d"]


@pytest.mark.parametrize("field", ["caption", "captions", "text"])
def test_captions_in_json(tmp_path, field):
    value = ["a  cat", "a pet"] if field == "captions" else "a cat"
    source = open_source(
        make(tmp_path / "t.tar", {"a.jpg": png(1), "a.json": {"file": "a.jpg", field: value, "label": 3}})
    )
    assert source.captions(0) == (["a cat", "a pet"] if field == "captions" else ["a cat"])
    assert source.label(0) == "3"


def test_a_text_goes_before_json_unless_a_field_is_named(tmp_path):
    members = {"a.png": png(1), "a.txt": "text", "a.json": {"caption": "json", "text": "other"}}
    path = make(tmp_path / "t.tar", members)
    assert open_source(path).captions(0) == ["text"]
    assert open_source(f"{path}?caption=txt").captions(0) == ["text"]
    assert open_source(f"{path}?caption=caption").captions(0) == ["json"]
    assert open_source(path, columns=Columns(caption="text")).captions(0) == ["other"]
    with pytest.raises(UserError, match="no column 'title' among caption, text"):
        open_source(f"{path}?caption=title")


def test_splits_in_json(tmp_path):
    members = {}
    for i, split in enumerate(["train", "test", "train"]):
        members |= {f"{i}.png": png(i), f"{i}.json": {"split": split, "caption": f"c{i}"}}
    path = make(tmp_path / "t.tar", members)
    source = open_source(f"{path}?split=train")
    assert [(source.key(i), grey(source, i), source.captions(i)) for i in range(len(source))] == [
        ("0", 0, ["c0"]),
        ("2", 2, ["c2"]),
    ]
    with pytest.raises(UserError, match="no split 'val'; it has test, train"):
        open_source(path, split="val")
    with pytest.raises(UserError, match="it is not divided in splits"):
        open_source(make(tmp_path / "u.tar", {"a.png": png(0)}), split="val")


@pytest.mark.parametrize(
    "spec", ["s-{00..02}.tar", "s-*.tar", "s-00.tar,s-01.tar,s-02.tar", "s-{00,01,02}.tar", "s-0?.tar", "s-0[0-9].tar"]
)
def test_shards(tmp_path, spec, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        make(tmp_path / f"s-{i:02}.tar", {"a.png": png(i), "a.txt": f"c{i}"})
    source = open_source(spec)
    assert [source.key(i) for i in range(len(source))] == ["s-00/a", "s-01/a", "s-02/a"]
    assert [(grey(source, i), source.captions(i)) for i in range(3)] == [(i, [f"c{i}"]) for i in range(3)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_agrees_with_tarfile(tmp_path, format):
    names = ["a.txt", "f" * 60 + "/" + "g" * 60 + "/b.txt", "é猫.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["h" * 300 + "/c.txt", "short.txt"]
    path = make(tmp_path / "t.tar", {name: "x" * n for n, name in enumerate(names, start=511)}, format)
    with tarfile.open(path, "a", format=format) as tar:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]
    expected.append(("link.txt", *expected[0][1:]))  # what the link stands for
    assert [(m.name, m.offset, m.size) for m in tar_index.members(tmp_path / "t.tar")] == expected
    assert len(expected) == len(names) + 1


def test_links_and_tars_joined_end_to_end(tmp_path):
    make(tmp_path / "a.tar", {"a.png": png(1), "a.txt": "one"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, target, kind in [
            ("d/b.png", "a.png", tarfile.LNKTYPE),
            ("d/c.png", "../a.png", tarfile.SYMTYPE),
            ("d/lost.png", "nowhere.png", tarfile.SYMTYPE),
        ]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    make(tmp_path / "b.tar", {"e.png": png(5)})
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    source = open_source(str(tmp_path / "c.tar"))
    assert [source.key(i) for i in range(len(source))] == ["a", "e", "d/b", "d/c", "d/lost"]
    assert [grey(source, i) for i in range(4)] == [1, 5, 1, 1]
    with pytest.raises(UnreadableImage, match="d/lost: is empty"):
        source.image(4, 4)


def test_of_members_of_one_name_the_last_counts(tmp_path):
    path = make(tmp_path / "t.tar", {"a.png": png(1), "a.txt": "old"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("./a.txt")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    source = open_source(path)
    assert source.captions(0) == ["new"]
    assert source.notes == [f"1 member of {path} replaced by later ones of the name"]


def test_threads_read_what_one_thread_reads(tmp_path):
    members = {}
    for i in range(40):
        members |= {f"{i}.png": png(i), f"{i}.txt": str(i)}
    source = open_source(make(tmp_path / "t.tar", members))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: (grey(source, i % 40), source.captions(i % 40)), range(400))) == [
            (i % 40, [str(i % 40)]) for i in range(400)
        ]


def test_texts_only(tmp_path):
    source = open_source(make(tmp_path / "t.tar", {"a.txt": "a"}))
    assert not source.has_images
    with pytest.raises(UserError, match="holds no images"):
        source.image(0, 8)


def test_an_image_is_chosen_by_extension(tmp_path):
    path = make(tmp_path / "t.tar", {"a.left.png": png(1), "a.right.png": png(2), "a.txt": "a"})
    with pytest.raises(UserError, match=r"a\.txt: belongs to 2 images, such as a\.left\.png and a\.right\.png"):
        open_source(path)
    assert grey(open_source(f"{path}?image=right.png"), 0) == 2


@pytest.mark.parametrize("cut", [100, 600, 1024, 1536, 3000])
def test_a_truncated_tar_is_refused(tmp_path, cut):
    path = make(tmp_path / "t.tar", {"a.png": png(1), "b.txt": "x" * 2000})
    data = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(data[:cut])
    with pytest.raises(UserError, match=r"t\.tar: is (cut short|not a tar file)"):
        open_source(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a tar file"),
        (b"text" * 500, "is not a tar file"),
        (b"\x1f\x8b" + bytes(2000), "is a compressed tar, .* gunzip"),
        (bytes(10240), "holds no images .* and no texts"),
    ],
)
def test_not_a_tar(tmp_path, data, message):
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "t.tar"))


def test_empty_tars_among_others_are_named(tmp_path):
    make(tmp_path / "t-0.tar", {"a.png": png(0)})
    make(tmp_path / "t-1.tar", {})
    assert "1 tar without a file: t-1.tar" in open_source(f"{tmp_path}/t-*.tar").notes


def test_a_damaged_header_is_placed(tmp_path):
    path = make(tmp_path / "t.tar", {"a.txt": "a", "b.txt": "b"})
    data = bytearray((tmp_path / "t.tar").read_bytes())
    data[1024 + 5] ^= 1
    (tmp_path / "t.tar").write_bytes(data)
    with pytest.raises(UserError, match="is damaged at byte 1024"):
        open_source(path)


def test_damaged_members_are_named(tmp_path):
    members = {"a.jpg": b"", "b.jpg": png(1)[:45], "b.txt": b"caf\xe9", "c.txt": "a lone text"}
    source = open_source(make(tmp_path / "t.tar", members))
    for i, message in enumerate(["a: is empty", "b: cannot be decoded"]):
        with pytest.raises(UnreadableImage, match=rf"t\.tar: {message}"):
            source.image(i, 8)
    with pytest.raises(UserError, match=r"b\.txt: line 1, byte 3"):
        source.captions(1)
    assert source.notes == ["1 text without an image of that name not used: c.txt"]


@pytest.mark.parametrize("content", ["{", "7", "[" * 100_000])
def test_damaged_json(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.json is not"):
        open_source(make(tmp_path / "t.tar", {"a.png": png(1), "a.json": content}))


def test_ambiguous_fields(tmp_path):
    with pytest.raises(UserError, match=r"fields of its \.json.*: caption, text may each be the caption"):
        open_source(make(tmp_path / "t.tar", {"a.png": png(1), "a.json": {"caption": "a", "text": "b"}}))


def test_a_tar_of_something_else(tmp_path):
    with pytest.raises(UserError, match="holds no images and no captions"):
        open_source(make(tmp_path / "t.tar", {"a.ogg": "a", "a.json": {"label": 3}}))
