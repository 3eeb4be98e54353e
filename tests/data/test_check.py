"""What a source holds, said before anything is trained on it."""

import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from diptych.data import check
from diptych.data.check import (
    Part,
    check_parts,
    check_source,
    content_digest,
    note_on_learned,
    note_on_lengths,
)
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Six images of two classes: two are the same file, one is broken, one has no caption."""
    for i in range(5):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        grey = 10 * min(i, 3)
        Image.new("RGB", (8 + min(i, 3), 8), (grey, grey, grey)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
        if i < 4:
            (tmp_path / "ab"[i % 2] / f"{i}.txt").write_text("a grey square\n" + f"number {i}\n" * (i > 0))
    (tmp_path / "a" / "broken.jpg").write_text("<html>")
    (tmp_path / "b" / "lost.txt").write_text("of no image")
    return tmp_path


def test_classes_in_two_spellings_are_named(tmp_path):
    for i, label in enumerate(["Cat", "cat", "dog"]):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.cls").write_text(label)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "none.png")
    found = check_source(open_source(str(tmp_path)))
    assert "             1 item without a label" in found.lines()
    assert found.notes == ["classes that differ in spelling alone: 'Cat' and 'cat'"]


def test_what_a_source_holds(photos):
    found = check_source(open_source(str(photos)))
    assert (found.items, list(found.captions), found.shared_captions) == (6, [1, 2, 0, 0, 2, 2], 1)
    assert found.labels == {"a": 4, "b": 2}
    assert (found.opened, len(found.unreadable)) == (6, 1)
    assert "broken.jpg" in found.unreadable[0]
    assert sorted(found.sizes) == [(8, 8), (9, 8), (10, 8), (11, 8), (11, 8)]
    assert list(found.twins) == [("b/3.png", "a/4.png")]
    lines = found.lines()
    for line in [
        "  items      6",
        "  captions   7 of 4 items, 1 to 2 each",
        "             2 items without a caption",
        "             1 caption in the same words at several items",
        "  images     6 opened, 1 of them unreadable",
        "  pixels     8 to 11 wide, 8 high, 10 x 8 in the middle",
        "  twins      1 image the same as another: b/3.png = a/4.png",
        "  labels     2 classes: a 4, b 2",
        "  note       1 text without an image of that name not used: b/lost.txt",
        "  sample     a/0.png  a grey square",
    ]:
        assert line in lines


def test_images_of_one_content_are_named_where_they_are_used(photos):
    source = open_source(str(photos))
    assert not any("same" in note for note in source.notes)  # who captions them need not wait for it
    told = check_parts([Part("pair", source, range(6))], max_skipped_share=1)
    assert told.endswith("; 1 image of 6 that were compared the same as another: b/3.png = a/4.png")
    shutil.copy(photos / "a" / "0.png", photos / "b" / "valid.png")
    valid = open_source(str(photos / "b"))
    told = check_parts([Part("pair", source, range(3)), Part("validation image", valid, range(3))], max_skipped_share=1)
    assert "2 images of 6 that were compared in the validation and in what is learned from: " in told
    assert f"valid.png = {photos}: a/0.png" in told


def test_images_that_a_run_has_learned_from_are_noted(photos):
    learned, scored = open_source(str(photos / "b")), open_source(str(photos))
    assert note_on_learned(learned, range(2), scored) == [
        "3 of 6 images that were compared are among those that the run has learned from: scores on them say nothing of "
        "other images"
    ]
    assert note_on_learned(learned, range(1), open_source(str(photos / "a"))) == []


def test_texts_that_are_longer_than_a_model_reads_are_counted():
    assert note_on_lengths([3, 9, 9], 9) == (
        "2 of 3 texts that were looked at fill all 9 tokens that the model reads: what is longer is cut off"
    )
    assert note_on_lengths([3, 8], 9) == ""


def test_images_of_a_table_and_of_a_list_are_compared_too(photos):
    rows = [{"image": name, "caption": name} for name in ("a/0.png", "b/3.png", "a/4.png")]
    (photos / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    twins = [(str(photos / "a" / "4.png"), str(photos / "b" / "3.png"))]
    assert check_source(open_source(str(photos / "t.jsonl"))).twins == twins
    (photos / "keep.jsonl").write_text("".join(json.dumps({"key": key}) + "\n" for pair in twins for key in pair))
    assert len(check_source(open_source(f"{photos}/t.jsonl?keep={photos}/keep.jsonl")).twins) == 1


def test_only_some_images_are_opened(photos):
    assert check_source(open_source(str(photos)), images=2).opened == 2
    assert check_source(open_source(str(photos)), images=0).opened == 6


def test_texts_and_bare_images(tmp_path):
    (tmp_path / "t.txt").write_text("one text\nanother\n")
    lines = check_source(open_source(str(tmp_path / "t.txt"))).lines()
    assert "  captions   2 of 2 items, 1 each" in lines
    assert "  images     none" in lines
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert "  captions   none" in check_source(open_source(str(tmp_path))).lines()


def test_the_first_line_of_a_run(photos):
    source = open_source(str(photos))
    (photos / "t.txt").write_text("one\ntwo\n")
    texts = open_source(str(photos / "t.txt"))
    told = check_parts(
        [
            Part("pair", source, np.array([0, 1, 4, 5])),
            Part("unpaired image", source, [2, 3]),
            Part("unpaired text", texts, range(2)),
        ],
        max_skipped_share=0.01,
    )
    assert told.startswith("4 pairs (7 captions), 2 unpaired images, 2 unpaired texts; 1 of 6 images that were tried")
    with pytest.raises(UserError, match=r"1 of 1 images that were tried cannot be read, such as .*broken\.jpg"):
        check_parts([Part("pair", source, [3])], max_skipped_share=1)


def test_images_without_a_caption_are_no_pairs(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.txt").write_text("one\ntwo\n")
    told = check_parts([Part("pair", open_source(str(tmp_path)), range(3))], max_skipped_share=0.01)
    assert told.startswith("1 pair (2 captions) and 2 images without a caption; 0 of 3 images")


def test_words_of_scripts_without_blanks(tmp_path):
    rows = [f"{i}.png,\u4e00\u53ea\u72d7\u5728{c}\u3002" for i, c in enumerate("\u8349\u6c34\u5c71")]
    (tmp_path / "t.csv").write_text("\n".join(["\u56fe\u7247,\u63cf\u8ff0", *rows]), encoding="utf-8")
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    lines = check_source(open_source(str(tmp_path / "t.csv"))).lines()
    assert "  words      6 of a caption, 6 in the middle" in lines
    assert [line for line in lines if "note" in line] == [
        "  note       captions are taken from '\u63cf\u8ff0', the only column of sentences"
    ]


def test_missing_files_stop_a_run_before_it_trains(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    rows = [{"image": f"{i}.png", "caption": "c"} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path / "t.jsonl"))
    assert "3 of 4 images do not exist" in source.notes[0]
    with pytest.raises(UserError, match=r"3 of 4 images do not exist, over the tolerated 50\.0%: .*1\.png"):
        check_parts([Part("pair", source, range(4))], max_skipped_share=0.5)
    with pytest.raises(UserError, match="3 of 4 images that were tried cannot be read"):
        check_parts([Part("pair", source, range(4))], max_skipped_share=0.8)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / f"{number}.bmp")
        (root / f"{number}.txt").write_text(f"image {number}")
    return root


def as_table(folder):
    rows = [{"file_name": f"photos/{n}.bmp", "caption": (folder / f"{n}.txt").read_text()} for n in range(3)]
    table = folder.parent / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def as_tar(folder):
    with tarfile.open(folder.parent / "photos.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    return folder.parent / "photos.tar"


def as_texts(folder):
    texts = folder.parent / "texts.txt"
    texts.write_text("\n".join((folder / f"{n}.txt").read_text() for n in range(3)))
    return texts


@pytest.mark.parametrize("kind", [lambda folder: folder, as_table, as_tar, as_texts])
@pytest.mark.parametrize("whole", [2**20, 0])
def test_an_edit_is_noticed_and_a_copy_is_not(folder, tmp_path, monkeypatch, kind, whole):
    monkeypatch.setattr(check, "_WHOLE", whole)
    before = content_digest(open_source(str(kind(folder))))
    assert before == content_digest(open_source(str(kind(folder))))
    elsewhere = tmp_path / "elsewhere" / "photos"
    shutil.copytree(folder, elsewhere)
    if kind is not as_tar:  # a tar holds dates
        assert before == content_digest(open_source(str(kind(elsewhere))))
    (folder / "1.txt").write_text("image 7")
    assert before != content_digest(open_source(str(kind(folder))))
    (folder / "1.txt").write_text("image 1")
    if kind is as_texts:
        return
    Image.new("RGB", (4, 4), (0, 9, 0)).save(folder / "1.bmp")  # of the same size in bytes
    noticed = before != content_digest(open_source(str(kind(folder))))
    assert noticed == (whole > 0 or kind is as_tar)
    Image.new("RGB", (4, 5), (0, 9, 0)).save(folder / "1.bmp")
    assert before != content_digest(open_source(str(kind(folder))))


def test_sources_that_cannot_be_edited():
    assert content_digest(ScenesSource(count=5)) == ""


def test_repeated_captions_frames_and_long_texts_are_told(tmp_path):
    frames = [Image.new("L", (4, 4), grey) for grey in (0, 99)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    Image.new("L", (4, 4), 7).save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a dog\na dog\none\nIMG_2.JPG\nhttps://a.org/x\n" + "word " * 100)
    found = check_source(open_source(str(tmp_path)))
    assert (found.repeated_captions, list(found.several_frames)) == (1, ["pages.tif"])
    lines = found.lines()
    assert "             1 caption that their item has already" in lines
    assert "             3 captions that name a file or an address" in lines
    assert "  frames     1 image used by the first alone: pages.tif" in lines
    assert max(map(len, lines)) < 200
    told = check_parts([Part("image", open_source(str(tmp_path)), range(2))], max_skipped_share=0.01)
    assert told.endswith("0 of 2 images that were tried cannot be read; of 1 with several frames the first is used")


def test_names_of_strange_bytes_are_told_on_one_line(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "01.png")
    for name in (b"\xff\xfe.png", b"two\nlines.png"):
        os.link(tmp_path / "01.png", os.fsencode(tmp_path) + b"/" + name)
    lines = check_source(open_source(str(tmp_path))).lines()
    assert not any("\n" in line or not line.isascii() for line in lines)
    assert any("two lines.png" in line and "\\udcff" in line for line in lines)
