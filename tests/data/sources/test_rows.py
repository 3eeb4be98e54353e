"""Rows of table files in the forms that common tools write; what is ambiguous is refused."""

import gzip
import json

import pytest

from diptych.data.sources.rows import read_rows
from diptych.errors import UserError


def rows_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(path)


A_B = [{"image": "a.jpg", "caption": "a dog"}, {"image": "b.jpg", "caption": "a cat"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "image,caption\na.jpg,a dog\nb.jpg,a cat\n"),
        ("t.csv", "\nimage, caption\na.jpg, a dog \n b.jpg,a cat"),
        ("t.csv", 'image,caption\na.jpg, "a dog"\n"b.jpg",a cat'),
        ("t.csv", "image|caption\na.jpg| a dog\nb.jpg|a cat"),
        ("t.csv", "sep=;\nimage;caption\na.jpg;a dog\nb.jpg;a cat"),
        ("t.csv", "image\tcaption\r\na.jpg\ta dog\r\nb.jpg\ta cat\r\n"),
        ("t.tsv", "image,caption\na.jpg,a dog\nb.jpg,a cat\n"),
        ("t.tsv", 'image\tcaption\na.jpg\t"a dog"\nb.jpg\ta cat\n'),
        ("t.json", json.dumps({"image": {"0": "a.jpg", "1": "b.jpg"}, "caption": {"0": "a dog", "1": "a cat"}})),
        ("t.json", json.dumps({"image": ["a.jpg", "b.jpg"], "caption": ["a dog", "a cat"]})),
    ],
)
def test_the_same_rows(tmp_path, name, content):
    assert rows_of(tmp_path, name, content) == A_B


def test_an_index_without_a_name(tmp_path):
    assert rows_of(tmp_path, "t.csv", ",image\n0,a.jpg\n") == [{"column 1": "0", "image": "a.jpg"}]


def test_quotes_in_tab_separated_rows_end_with_the_row(tmp_path):
    rows = rows_of(tmp_path, "t.tsv", 'a\tb\n1\t"a dog\n2\ta cat"\n3\t"he said ""hi"""\n')
    assert [row["b"] for row in rows] == ['"a dog', 'a cat"', 'he said "hi"']
    quoted = rows_of(tmp_path, "q.tsv", 'a\tb\n1\t"two\nlines"\n2\t"a\ttab"\n')
    assert [row["b"] for row in quoted] == ["two\nlines", "a\ttab"]


def test_a_quote_that_swallows_a_row_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"t\.csv: the row at line 2: a quote that opens there closes in another row"):
        rows_of(tmp_path, "t.csv", 'image,caption\na.jpg,"a dog\nb.jpg,a cat"\nc.jpg,two birds\n')
    rows = rows_of(tmp_path, "u.csv", 'image,caption\na.jpg,"a dog, brown\nruns, fast"\n')
    assert rows[0]["caption"] == "a dog, brown\nruns, fast"


def test_documents_of_the_field(tmp_path):
    karpathy = {
        "dataset": "coco",
        "images": [{"filepath": "val2014", "filename": "1.jpg", "split": "test", "sentences": [{"raw": "A dog."}]}],
    }
    assert rows_of(tmp_path, "k.json", json.dumps(karpathy))[0]["filepath"] == "val2014"
    coco = {
        "info": {},
        "licenses": [{"id": 1}],
        "images": [{"id": 1, "file_name": "x.jpg"}, {"id": 2, "file_name": "y.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}],
    }
    assert [row["captions"] for row in rows_of(tmp_path, "c.json", json.dumps(coco))] == [["a dog"], []]
    test = {name: coco[name] for name in ("info", "licenses", "images")}
    assert [row["captions"] for row in rows_of(tmp_path, "i.json", json.dumps(test))] == [[], []]
    coco["annotations"].append({"id": 2, "image_id": 7, "caption": "lost"})
    with pytest.raises(UserError, match=r"'lost' is of image 7, which is not among its images"):
        rows_of(tmp_path, "d.json", json.dumps(coco))
    kohya = {"dir/a.jpg": {"caption": "a dog", "tags": "dog"}, "dir/b.jpg": {"caption": "a cat"}}
    assert [row["file_name"] for row in rows_of(tmp_path, "m.json", json.dumps(kohya))] == ["dir/a.jpg", "dir/b.jpg"]
    plain = {"a.jpg": "a dog", "b.jpg": ["a cat", "one cat"]}
    assert [row["captions"] for row in rows_of(tmp_path, "p.json", json.dumps(plain))] == [
        "a dog",
        ["a cat", "one cat"],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a.jpg": "a dog", "a.jpg": "one dog"}', "the key 'a.jpg' is there twice"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}', "the id 1"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of git-lfs"),
        ("<!DOCTYPE html><html>", "is a page of HTML"),
        ("PK\x03\x04...", "is a zip, a spreadsheet or a document"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, "t.json", content)


def test_quotes_behind_backslashes(tmp_path):
    rows = rows_of(tmp_path, "t.csv", '"image","caption"\n"a.jpg","a \\"dog\\", C:\\new"\n')
    assert rows == [{"image": "a.jpg", "caption": 'a "dog", C:\\new'}]
    with pytest.raises(UserError, match=r"the row at line 2: .* a quote that is not closed"):
        rows_of(tmp_path, "t.csv", 'image,caption\na.jpg,"a \\"dog\\", "C:\n')


@pytest.mark.parametrize(
    "content", ["Photos;;\n;;\nDatei;Text;\na.jpg;a dog;\n", "Photos 2024;;\n\nimage;caption;\na.jpg;a dog;\n"]
)
def test_a_title_above_the_header_is_named(tmp_path, content):
    with pytest.raises(UserError, match=r"the second line names the columns \((Datei, Text|image, caption)\); remove"):
        rows_of(tmp_path, "t.csv", content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", '{"image": "a.jpg", "caption": "a dog"}\n', r"t\.csv: holds JSON; let its name end in \.json"),
        ("t.csv", '[\n{"image": "a.jpg"}\n]', r"t\.csv: holds JSON"),
        ("t.csv", "<table><tr><td>a</td></tr></table>", "is a table of HTML"),
        ("t.csv", '<?xml version="1.0"?>\n<Workbook/>', "is XML"),
        ("t.csv", "a.jpg".ljust(257, "\0") + "ustar", "is a tar, whatever its name"),
        ("t.json", "image,caption\na.jpg,a dog, brown\n", r"is a table with ',' between its columns; .* end in \.csv"),
        ("t.jsonl", "image\tcaption\na.jpg\ta dog\n", r"is a table with '\\t' between its columns; .* end in \.tsv"),
    ],
)
def test_tables_by_another_name(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, name, content)


def test_the_header_of_r_lacks_a_name(tmp_path):
    with pytest.raises(UserError, match="the row at line 2 has 3 cells and the header 2; so has every row; name each"):
        rows_of(tmp_path, "t.csv", "image,caption\n1,a.jpg,a dog\n2,b.jpg,a cat\n")
    with pytest.raises(UserError, match="put quotes around cells"):
        rows_of(tmp_path, "t.csv", "image,caption\na.jpg,a dog, brown\nb.jpg,a cat\n")


def test_characters_without_width_around_a_cell(tmp_path):
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        rows = rows_of(tmp_path, name, f"image{mark}caption\n\u00a0a.jpg\u200b{mark}a dog\ufeff\n")
        assert rows == [{"image": "a.jpg", "caption": "a dog"}]


def test_captions_by_the_names_of_images(tmp_path):
    for captions in (["A dog runs.", "A cat sits."], [["A dog runs."], ["A cat sits.", "One cat sits."]]):
        content = json.dumps(dict(zip(("x1", "x2"), captions, strict=True)))
        assert rows_of(tmp_path, "t.json", content)[1] == {"image_id": "x2", "captions": captions[1]}
    with pytest.raises(UserError, match="must be a list of objects"):
        rows_of(tmp_path, "t.json", json.dumps({"name": "scenes", "version": "1.0"}))


def test_cells_may_be_large(tmp_path):
    assert len(rows_of(tmp_path, "t.csv", f'image,caption\n"{"x" * 200_000}",a dog\n')[0]["image"]) == 200_000


def test_documents_by_split_and_by_id(tmp_path):
    by_split = {"train": [{"image": "a.jpg"}], "test": [{"image": "b.jpg"}]}
    assert [row["split"] for row in rows_of(tmp_path, "s.json", json.dumps(by_split))] == ["train", "test"]
    below = {"train": {"a.jpg": "a dog"}, "val": {"b.jpg": ["a cat"]}}
    rows = rows_of(tmp_path, "b.json", json.dumps(below))
    assert [(row["split"], row["file_name"]) for row in rows] == [("train", "a.jpg"), ("val", "b.jpg")]
    with pytest.raises(UserError, match="must be a list of objects"):
        rows_of(tmp_path, "d.json", json.dumps({"train": {"a.jpg": "a dog"}, "val": {"seed": 1}}))
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": "1", "caption": "a dog"}]}
    assert rows_of(tmp_path, "c.json", json.dumps(coco))[0]["captions"] == ["a dog"]
    keyed = {"a.jpg": [{"caption": "a dog"}, {"caption": "one dog"}]}
    assert rows_of(tmp_path, "k.json", json.dumps(keyed))[0]["file_name"] == "a.jpg"
    assert rows_of(tmp_path, "l.jsonl", json.dumps([{"image": "a.jpg"}])) == [{"image": "a.jpg"}]


@pytest.mark.parametrize(
    "nested",
    [
        [{"data": {"image": "a.jpg", "caption": "a dog"}}, {"data": {"image": "b.jpg", "caption": "a cat"}}],
        {"version": 1, "data": [{"paragraphs": [{"image": row["image"], "caption": row["caption"]} for row in A_B]}]},
    ],
)
def test_images_in_records_inside_the_rows(tmp_path, nested):
    assert rows_of(tmp_path, "t.json", json.dumps(nested)) == A_B
    inner = [{"image": {"path": "a.jpg", "bytes": None}, "caption": "a dog"}, {"caption": "no image"}]
    rows = rows_of(tmp_path, "u.json", json.dumps(inner))
    assert rows == [{"caption": "a dog", "path": "a.jpg", "bytes": None}, {"caption": "no image"}]


def test_documents_by_class(tmp_path):
    by_class = {"beach": [{"filename": "a.jpg", "raw": "sea", "raw_1": "sand"}], "farm": [{"filename": "b.jpg"}]}
    assert [row["label"] for row in rows_of(tmp_path, "n.json", json.dumps(by_class))] == ["beach", "farm"]


def test_capitals_in_the_suffix_of_packed_files(tmp_path):
    assert rows_of(tmp_path, "t.csv.GZ", gzip.compress(b"image,caption\na.jpg,a dog\nb.jpg,a cat\n")) == A_B


def test_captions_in_cocos_list_of_images(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg", "caption": "a dog"}]
    (tmp_path / "t.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    assert read_rows(tmp_path / "t.json") == images
