"""Tables: every format, columns that are guessed, columns that cannot be, damaged files."""

import csv
import gzip
import json
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.sources.columns import Columns, notes_on_labels
from diptych.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Three photos in a folder, each of one grey value."""
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


def rows_of(source):
    return [(int(source.image(i, 4)[0, 0, 0]), source.captions(i), source.label(i)) for i in range(len(source))]


ROWS = [(f"photos/{i}.png", f"photo, number {i}", "ab"[i % 2]) for i in range(3)]
EXPECTED = [(i, [f"photo, number {i}"], "ab"[i % 2]) for i in range(3)]
HEADER = ("file_name", "caption", "label")


def write(folder, kind):
    path = folder / f"table.{kind}"
    records = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    if kind == "csv":
        write_csv(path, [HEADER, *ROWS])
    elif kind == "tsv":
        write_csv(path, [HEADER, *ROWS], "\t")
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, records)))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "jsonl.gz"])
def test_every_format_reads_alike(photos, kind):
    source = open_source(write(photos, kind))
    assert source.has_images
    assert source.has_captions
    assert rows_of(source) == EXPECTED
    assert source.key(1).endswith("photos/1.png")


def test_several_files_are_one_source(photos):
    for i, row in enumerate(ROWS):
        write_csv(photos / f"part-{i}.csv", [HEADER, row])
    assert rows_of(open_source(str(photos / "part-*.csv"))) == EXPECTED


def test_semicolons_byte_order_mark_and_crlf(photos):
    path = photos / "excel.csv"
    path.write_bytes("\ufeffimage;caption\r\nphotos/0.png;eins\r\n\r\nphotos/1.png;zwei\r\n".encode())
    assert [row[:2] for row in rows_of(open_source(str(path)))] == [(0, ["eins"]), (1, ["zwei"])]


def test_rows_of_the_same_image_are_one_item(photos):
    path = write_csv(
        photos / "t.csv",
        [("image", "caption"), *((f"photos/{i % 2}.png", f"caption {n}") for n, i in enumerate([0, 1, 0]))],
    )
    assert [row[:2] for row in rows_of(open_source(path))] == [(0, ["caption 0", "caption 2"]), (1, ["caption 1"])]


@pytest.mark.parametrize(
    "captions",
    [
        {"captions": ["one cat", "two  cats"]},
        {"sentences": [{"raw": "one cat", "tokens": ["one", "cat"]}, {"raw": "two cats"}]},
        {"caption_0": "one cat", "caption_1": "two cats"},
        {"caption": "one cat", "captions": ["x"], "wanted": ["one cat", "", "two\0cats"]},
    ],
)
def test_several_captions_each(photos, captions):
    path = photos / "t.jsonl"
    path.write_text(json.dumps({"file_name": "photos/0.png", "height": 5, **captions}))
    columns = Columns(caption="wanted") if "wanted" in captions else None
    assert open_source(str(path), columns=columns).captions(0) == ["one cat", "two cats"]


def test_caption_columns_can_be_joined(photos):
    path = write_csv(photos / "t.csv", [("image", "en", "long"), ("photos/0.png", "a cat", "a long cat")])
    assert open_source(f"{path}?caption=en,long").captions(0) == ["a cat", "a long cat"]


def test_coco_captions_are_joined(photos):
    document = {
        "info": {},
        "images": [{"id": i, "file_name": f"photos/{i}.png"} for i in range(2)],
        "annotations": [{"id": n, "image_id": n % 2, "caption": f"c{n}"} for n in range(3)],
    }
    (photos / "coco.json").write_text(json.dumps(document))
    assert [row[:2] for row in rows_of(open_source(str(photos / "coco.json")))] == [(0, ["c0", "c2"]), (1, ["c1"])]
    del document["annotations"][0]["image_id"]
    (photos / "coco.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="'image_id' is missing"):
        open_source(str(photos / "coco.json"))


def test_texts_without_images(tmp_path):
    source = open_source(
        write_csv(tmp_path / "p.tsv", [("Prompt", "Category"), ("a cat", "x"), ("", "y"), ("dog", "y")], "\t")
    )
    assert not source.has_images
    assert [source.captions(i) for i in range(len(source))] == [["a cat"], ["dog"]]
    assert source.label(1) == "y"
    with pytest.raises(UserError, match="holds no images"):
        source.image(0, 8)


def test_lone_quotes_in_tab_separated_texts(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tn\n"so it is\t1\na 5" screen\t2\n"fine"\t3\n')
    source = open_source(str(tmp_path / "t.tsv"))
    assert len(source) == 3
    assert source.captions(0) == ['"so it is']


def test_images_without_captions(photos):
    source = open_source(write_csv(photos / "t.csv", [("path", "width"), ("photos/2.png", 8)]))
    assert not source.has_captions
    assert rows_of(source) == [(2, [], None)]


@pytest.mark.parametrize("spec", ["?split=test", ""])
def test_splits(photos, spec):
    path = write_csv(
        photos / "t.csv",
        [
            ("image", "caption", "split"),
            *((r[0], r[1], s) for r, s in zip(ROWS, ["train", "test", "test"], strict=True)),
        ],
    )
    source = open_source(path + spec, split=None if spec else "test")
    assert [row[0] for row in rows_of(source)] == [1, 2]
    assert len(open_source(path)) == 3
    with pytest.raises(UserError, match="no split 'val'; it has test, train"):
        open_source(path, split="val")


def test_named_columns_go_before_guesses(photos):
    path = write_csv(
        photos / "t.csv", [("image", "caption", "other", "title"), ("photos/0.png", "no", "photos/1.png", "yes")]
    )
    assert rows_of(open_source(path, columns=Columns(image="other", caption="title")))[0][:2] == (1, ["yes"])
    assert rows_of(open_source(f"{path}?image=other&caption=title"))[0][:2] == (1, ["yes"])
    assert not open_source(path, columns=Columns(caption="")).has_captions


@pytest.mark.parametrize(
    ("header", "row", "columns", "message"),
    [
        (
            ("image", "caption", "text"),
            ("photos/0.png", "a b", "c d"),
            {},
            r"caption, text may each be the caption column .*choose one behind the source with \?caption=NAME",
        ),
        (
            ("image", "img", "caption"),
            ("photos/0.png", "photos/1.png", "c d"),
            {},
            "image, img may each be the image column",
        ),
        (("a", "b", "image"), ("a b", "c d", "photos/0.png"), {}, "a, b may each be the caption column"),
        (
            ("x", "y"),
            ("1", "2"),
            {},
            r"no column of images or captions among x, y; name one behind the source with \?image",
        ),
        (
            ("image", "caption"),
            ("photos/0.png", "c"),
            {"caption": "capt"},
            "no column 'capt' among image, caption; check caption=capt",
        ),
        (("image", "caption"), ("photos/0.png", "c"), {"image": "pic"}, "no column 'pic'"),
        (("url", "n"), ("https://a.org/away.png", "1"), {}, "column 'url' holds web addresses, which are not fetched"),
        (("url", "caption"), ("https://a.org/away.png", "c"), {"image": "url"}, "web addresses"),
        (
            ("image", "caption"),
            ("nowhere/0.png", "c"),
            {},
            r"nowhere/0\.png: does not exist; image paths in .*t\.csv are relative",
        ),
        (
            ("image", "caption"),
            ("C:\\data\\0.png", "c"),
            {},
            r"^C:\\data\\0\.png: does not exist here; write the paths",
        ),
        (
            ("image", "caption"),
            ("/away/0.png", "c"),
            {},
            r"^/away/0\.png: does not exist here; write the paths in .*csv",
        ),
        (("image", "caption"), ("photos/0.png", "c", "d"), {}, "the row at line 2 has 3 cells and the header 2; put"),
        (("image", "caption"), ("photos/0.png",), {}, "2 has 1 cells and the header 2; write the ',' that is missing"),
        (("photos/0.png", "a cat"), ("photos/1.png", "c"), {}, "the first line must name every column"),
        (("image", "image"), ("photos/1.png", "c"), {}, "the first line must name every column, each once"),
    ],
)
def test_what_cannot_be_guessed_is_said(photos, header, row, columns, message):
    path = write_csv(photos / "t.csv", [header, row])
    with pytest.raises(UserError, match=message) as caught:
        open_source(path, columns=Columns(**columns))
    assert "t.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "the first line must name|holds no rows"),
        ("t.csv", "image,caption\n", "holds no rows"),
        ("t.csv", 'image,caption\na.png,"a cat\nb.png,a dog\n', "the row at line 2: .*a quote that is not closed"),
        ("t.json", "[]", "must be a list of objects"),
        ("t.json", "{", "is not JSON"),
        ("t.json", "[" * 100_000, "is not JSON"),
        ("t.json", '{"a": 1}', "must be a list of objects"),
        ("t.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("t.jsonl", '{"text": "a"}\n[1]', "line 2 is not a JSON object"),
        ("t.jsonl", '{"image": "a.png"}\n{"image": null}', "a.png: does not exist"),
        ("t.csv", "caption,n\n,1\n,2\n", "no column of images or captions"),
        ("t.csv.gz", "not gzip", "is not a complete gzip file"),
    ],
)
def test_damaged_tables(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_encoding(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"caption\ncaf\xe9 au lait\n")
    with pytest.raises(UserError, match="line 2, byte 11 "):
        open_source(str(tmp_path / "t.csv"))


def test_misnamed_json_lines_and_plain_lists(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.json").write_text('["one", "two"]')
    (tmp_path / "c.json").write_text('{"version": 1, "rows": [{"text": "one"}, {"text": "two"}]}')
    for name in "abc":
        source = open_source(str(tmp_path / f"{name}.json"))
        assert [source.captions(i) for i in range(2)] == [["one"], ["two"]]


def test_a_changed_file_is_read_anew(photos):
    path = write(photos, "csv")
    assert len(open_source(path)) == 3
    write_csv(photos / "table.csv", [HEADER, ROWS[2]])
    assert rows_of(open_source(path)) == EXPECTED[2:]


def test_pixels_are_not_kept(photos):
    source = open_source(write(photos, "csv"))
    assert np.all(source.image(0, 4) == 0)
    Image.new("RGB", (8, 8), (77, 77, 77)).save(photos / "photos" / "0.png")
    assert np.all(source.image(0, 4) == 77)


def test_one_image_under_two_names_is_one_item(tmp_path, monkeypatch):
    """Else it could be in two streams; and a name is printed as one would write it."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("file_name,caption\na.png,one\n./a.png,two\n")
    monkeypatch.chdir(tmp_path)
    source = open_source("./t.csv")
    assert (len(source), source.key(0), source.captions(0)) == (1, "a.png", ["one", "two"])


def table(folder, name, rows):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return open_source(str(folder / name))


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["a dog runs", "one dog"]', ["a dog runs", "one dog"]),
        ("['a dog runs', \"it's one\"]", ["a dog runs", "it's one"]),
        ("['a dog runs' 'one dog'\n 'a pet']", ["a dog runs", "one dog", "a pet"]),
        ('[{"raw": "a dog"}, {"raw": "one dog"}]', ["a dog", "one dog"]),
        ('["a dog", null]', ["a dog"]),
        ("['a dog', nan]", ["a dog"]),
        ("array(['a dog', 'one dog'], dtype=object)", ["a dog", "one dog"]),
        ("('a dog', 'one dog')", ["a dog", "one dog"]),
        ('{"a dog","one dog"}', ["a dog", "one dog"]),
        ("b'a dog'", ["a dog"]),
        ("[b'a dog', b'one dog']", ["a dog", "one dog"]),
        ('{"caption": "a dog"}', ["a dog"]),
        ("{'text': ['a dog', 'one dog']}", ["a dog", "one dog"]),
        ('[["a", "dog"], ["one", "dog"]]', ["a dog", "one dog"]),
        ("[]", []),
        ("NA", []),
        ("(a dog) and 'a cat'", ["(a dog) and 'a cat'"]),
        ("{a dog}", ["{a dog}"]),
        ("[laughs] a man [music]", ["[laughs] a man [music]"]),
        ("[a dog]", ["[a dog]"]),
        ("[1, 2]", ["[1, 2]"]),
    ],
)
def test_lists_in_cells(photos, cell, captions):
    path = write_csv(photos / "t.csv", [("image", "caption"), ("photos/0.png", cell), ("photos/1.png", "a cat")])
    assert open_source(path).captions(0) == captions


def test_missing_values_disqualify_no_column_and_are_no_captions(photos):
    rows = [{"image": f"photos/{i % 3}.png", "caption": None, "label": None} for i in range(30)]
    rows[20] = {"image": "photos/2.png", "caption": "late", "label": 3.0}
    rows[21] = {"image": "photos/1.png", "caption": float("nan"), "label": 3}
    rows[22] = {"image": "photos/1.png", "caption": "nan"}
    rows[23] = {"image": None, "caption": "of nothing"}
    source = table(photos, "t.jsonl", rows)
    assert [row[1:] for row in rows_of(source)] == [([], None), ([], "3"), (["late"], "3")]
    assert source.notes == [
        "1 row without an image path not used: row 23 of " + source.name,
        "1 caption such as nan or null taken for missing",
    ]


@pytest.mark.parametrize(
    "spelling", ["./photos/0.png", "photos/../photos/0.png", " photos/0.png ", "photos\\0.png", "photos/0"]
)
def test_spellings_of_a_path(photos, spelling):
    rows = [{"image": "photos/0.png", "caption": "one"}, {"image": "photos/1.png", "caption": "x"}]
    source = table(photos, "t.jsonl", [*rows, {"image": spelling, "caption": "two"}])
    assert [row[:2] for row in rows_of(source)] == [(0, ["one", "two"]), (1, ["x"])]


def test_accents_in_paths(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "cafe\u0301.png")
    source = table(tmp_path, "t.jsonl", [{"image": "caf\u00e9.png", "caption": "one"}])
    assert source.image(0, 4).shape == (4, 4, 3)
    assert source.notes == []


def test_accents_in_folders(tmp_path):
    """Both spellings of the folder are one, and so are the images in it."""
    (tmp_path / "e\u0301te\u0301" / "a\u0300").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "e\u0301te\u0301" / "a\u0300" / "x.png")
    names = ["\u00e9t\u00e9/\u00e0/x.png", "e\u0301te\u0301/a\u0300/x.png"]
    source = table(tmp_path, "t.jsonl", [{"image": name, "caption": f"c{i}"} for i, name in enumerate(names)])
    assert [source.captions(i) for i in range(len(source))] == [["c0", "c1"]]
    assert source.image(0, 4).shape == (4, 4, 3)
    assert source.notes == []


@pytest.mark.parametrize(
    "path",
    [
        "/data/upload/1/5f2d3c1a-0.png",
        "upload/1/5f2d3c1a-0.png",
        "/data/local-files/?d=photos/0.png",
        "/data/local-files/?d=some%20where/0.png",
    ],
)
def test_paths_of_label_studio(photos, path):
    rows = [{"image": path, "caption": "c"}, {"image": path.replace("0.png", "1.png"), "caption": "d"}]
    source = table(photos, "export.json", rows)
    assert [row[:2] for row in rows_of(source)] == [(0, ["c"]), (1, ["d"])]
    source = table(photos, "photos/export.json", rows)
    assert [row[:2] for row in rows_of(source)] == [(0, ["c"]), (1, ["d"])]


def test_rejected_captions_of_vizwiz_are_left_out(photos):
    captions = [("a dog", False, False), ("Quality issues are too severe.", True, False), ("spam", False, True)]
    document = {
        "images": [{"id": 0, "file_name": "photos/0.png"}],
        "annotations": [
            {"image_id": 0, "caption": text, "is_precanned": ready, "is_rejected": rejected}
            for text, ready, rejected in captions
        ],
    }
    (photos / "v.json").write_text(json.dumps(document))
    source = open_source(str(photos / "v.json"))
    assert source.captions(0) == ["a dog"]
    assert source.notes == ["captions not used: 2 that are marked as is_rejected or is_precanned"]


def test_labels_of_minus_one_are_counted(photos):
    rows = [{"image": f"photos/{i}.png", "label": i - 1} for i in range(3)]
    source = table(photos, "t.jsonl", rows)
    assert [source.label(i) for i in range(3)] == [None, "0", "1"]
    assert source.notes == ["1 label of -1 taken for missing; a class needs a name of its own"]


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (
            [("a dog|one dog",), ("a cat|one cat",)],
            "'|' in the cells of 'caption' parts no captions: a cell is one caption",
        ),
        ([("a &quot;dog&quot;",), ("a cat &amp; one",)], None),
        ([("a dog",), ("a cat|one cat",)], None),
    ],
)
def test_marks_between_captions_are_named(photos, rows, note):
    path = write_csv(
        photos / "t.csv", [("image", "caption"), *((f"photos/{i}.png", *row) for i, row in enumerate(rows))]
    )
    assert open_source(path).notes == ([note] if note else [])


def test_columns_of_marks_are_named(photos):
    rows = [("filename", "cat", "dog"), ("photos/0.png", 1, 0), ("photos/1.png", 0, 1)]
    source = open_source(write_csv(photos / "t.csv", rows))
    assert source.notes == ["no labels: columns of marks such as cat, dog are not read; write a column label"]


def test_paths_of_texts_are_no_captions(photos):
    with pytest.raises(UserError, match=r"column 'caption' holds paths of text files, such as '0\.txt'"):
        table(photos, "t.jsonl", [{"image": "photos/0.png", "caption": "0.txt"}])


def test_a_title_above_the_header_is_refused(photos):
    for blank in ("", "\n"):
        (photos / "t.csv").write_text(f"My photos,\n{blank}image,caption\nphotos/0.png,a dog\n")
        message = r"the second line names the columns \(image, caption\); remove what is above"
        with pytest.raises(UserError, match=message):
            open_source(str(photos / "t.csv"))


def test_a_split_in_two_spellings_is_one(photos):
    rows = [
        {"image": f"photos/{i}.png", "caption": "c", "split": split}
        for i, split in enumerate(["train", "Train", "val"])
    ]
    table(photos, "t.jsonl", rows)
    assert len(open_source(str(photos / "t.jsonl"), split="train")) == 2
    with pytest.raises(UserError, match="no split 'TRAIN'"):
        open_source(str(photos / "t.jsonl"), split="TRAIN")


def test_lists_of_words_are_one_caption_or_named(photos):
    rows = [{"image": "photos/0.png", "caption": ["a", "dog", "runs"]}, {"image": "photos/1.png", "caption": ["cats"]}]
    source = table(photos, "t.jsonl", rows)
    assert [source.captions(i) for i in range(2)] == [["a dog runs"], ["cats"]]
    assert source.notes == []
    rows[0]["caption"] = ["dog", "puppy"]
    source = table(photos, "t.jsonl", rows)
    assert [source.captions(i) for i in range(2)] == [["dog", "puppy"], ["cats"]]
    assert source.notes == [
        "each word of lists such as ['dog', 'puppy'] is taken for a caption; join those that are one text"
    ]


def test_names_without_suffix(photos):
    rows = [{"image_id": i, "caption": f"c {i}"} for i in range(3)]
    assert [row[:2] for row in rows_of(table(photos, "photos/t.jsonl", rows))] == [(i, [f"c {i}"]) for i in range(3)]
    source = table(photos, "elsewhere/t.jsonl", [{"image": "0001", "caption": "c"}])
    assert not source.has_images
    assert source.notes == ["no images: column 'image' holds '0001', which is no path of an image file"]


def test_images_of_a_table_lie_near_it(photos):
    (photos / "annotations").mkdir()
    source = table(photos, "annotations/captions.jsonl", [{"image": "0.png", "caption": "c"}])
    assert source.notes == [f"image paths are taken relative to {photos / 'photos'}"]
    assert source.image(0, 4).shape == (4, 4, 3)
    (photos / "other").mkdir()
    Image.new("RGB", (4, 4)).save(photos / "other" / "0.png")
    with pytest.raises(UserError, match=r"its images may be those in .*other or in .*photos; write the folder"):
        table(photos, "annotations/captions.jsonl", [{"image": "0.png", "caption": "c"}])


@pytest.mark.parametrize(
    ("begin", "note"),
    [
        ("/home/u/data/photos/", "without /home/u/data/"),
        ("D:\\data\\photos\\", "without D:\\data\\"),
        ("data/photos/", "without data/"),
        ("/photos/", "without /"),
        ("PHOTOS/", None),
    ],
)
def test_paths_of_another_machine_are_found_by_their_ends(photos, begin, note):
    source = table(photos, "t.jsonl", [{"image": f"{begin}{i}.PNG", "caption": f"c {i}"} for i in range(3)])
    assert [row[:2] for row in rows_of(source)] == [(i, [f"c {i}"]) for i in range(3)]
    assert source.notes == ([f"image paths are taken relative to {photos}, {note}"] if note else [])


def test_paths_whose_folders_are_not_here_are_not_guessed(photos):
    with pytest.raises(UserError, match=r"^/home/other/0\.png: does not exist here"):
        table(photos, "t.jsonl", [{"image": f"/home/other/{i}.png", "caption": "c"} for i in range(3)])
    with pytest.raises(UserError, match=r"0\.jpg: does not exist, but 0\.png does; write the names as the files"):
        table(photos, "t.jsonl", [{"image": f"photos/{i}.jpg", "caption": "c"} for i in range(3)])


def test_images_in_several_folders(photos):
    for i in range(16):
        (photos / f"part_{i // 8}").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(photos / f"part_{i // 8}" / f"x{i}.png")
    (photos / "annotations").mkdir()
    rows = [{"image_id": f"x{i}", "caption": f"c {i}"} for i in range(16)]
    source = table(photos, "annotations/t.jsonl", rows)
    assert [row[:2] for row in rows_of(source)] == [(i, [f"c {i}"]) for i in range(16)]
    assert source.notes[1:] == [f"image paths are taken relative to {photos / 'part_0'}, {photos / 'part_1'}"]
    for part in range(2):
        Image.new("RGB", (4, 4)).save(photos / f"part_{part}" / "x16.png")
    rows.insert(1, {"image_id": "x16", "caption": "twice"})  # not among those that are looked for first
    with pytest.raises(UserError, match=r"part_0/x16\.png: lies in .*part_1/x16\.png too; write the folder"):
        table(photos, "annotations/t.jsonl", rows)


def test_captions_of_a_missing_image_are_those_of_one(photos):
    names = [*(f"photos/{i}.png" for i in range(3)), "photos/9.png.1#0", "photos/9.png.1#1"]  # Flickr8k has such a name
    source = table(photos, "t.jsonl", [{"image": name, "caption": "c"} for name in names])
    assert [len(source.captions(i)) for i in range(len(source))] == [1, 1, 1, 2]
    assert source.notes[-1].startswith("1 of 4 images do not exist")


def test_sharp_s_is_no_capital(photos):
    Image.new("RGB", (4, 4)).save(photos / "strasse.png")
    source = table(photos, "t.jsonl", [{"image": name, "caption": "c"} for name in ("Strasse.png", "straße.png")])
    assert [len(source.captions(i)) for i in range(len(source))] == [1, 1]
    assert "1 of 2 images do not exist" in source.notes[-1]


def test_names_without_suffix_in_any_column_of_images(photos):
    rows = [{"sku": f"1{i}", "photo": f"photos/{i}", "description": f"a photo {i}"} for i in range(3)]
    assert [row[:2] for row in rows_of(table(photos, "t.jsonl", rows))] == [(i, [f"a photo {i}"]) for i in range(3)]


def test_names_as_addresses_write_them_and_far_folders(photos):
    (photos / "a/b/c").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (4, 4), (i, i, i)).save(photos / "a/b/c" / f"my cat {i}.png")
    source = table(photos, "t.jsonl", [{"image": f"my%20cat%20{i}.png", "caption": f"c {i}"} for i in range(3)])
    assert [row[:2] for row in rows_of(source)] == [(i, [f"c {i}"]) for i in range(3)]
    source = table(photos, "u.jsonl", [{"id": "/9" * 3000, "caption": f"a caption {i}"} for i in range(3)])
    assert not source.has_images


def test_images_in_several_splits_are_named(photos):
    rows = [{"image": f"photos/{i}.png", "caption": "c", "split": "train"} for i in range(3)]
    source = table(photos, "t.jsonl", [*rows, {"image": "./photos/1.png", "caption": "d", "split": "VAL"}])
    assert "1 image in several splits: photos/1.png (train, VAL)" in source.notes


def test_rows_without_a_split_are_counted(photos):
    rows = [{"image": f"photos/{i}.png", "caption": "c", "split": split} for i, split in enumerate(["a", "b", ""])]
    (photos / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split in (None, "a"):
        notes = open_source(str(photos / "t.jsonl"), split=split).notes
        assert "1 item without a split: no ?split= takes it" in notes


def test_folders_are_no_classes_of_a_table(photos):
    for name in ("cat", "dog"):
        shutil.copytree(photos / "photos", photos / name)
    rows = [{"image": f"{name}/{i}.png"} for name in ("cat", "dog") for i in range(3)]
    assert table(photos, "t.jsonl", rows).notes == [
        "folders such as cat are no classes beside t.jsonl; add a column label"
    ]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("photos/0.png; photos/1.png", r"row 0 of .*names several images; write a row for each image"),
        (["photos/0.png", "photos/1.png"], "which is a list of images; write a row for each image"),
        ("data:image/png;base64,iVBORw0KGgo", "an image written as text; save it as a file"),
    ],
)
def test_cells_that_hold_several_images_or_an_image_as_text(photos, cell, message):
    rows = [{"image": cell, "caption": f"a caption {i}"} for i in range(3)]
    if message.startswith("row"):
        with pytest.raises(UserError, match=message):
            table(photos, "t.jsonl", rows)
    else:
        assert any(message in note for note in table(photos, "t.jsonl", rows).notes)


def test_answers_of_conversations_are_captions(photos):
    def talk(i, answers):
        parts = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"A photo, {i}."}]
        return {"id": str(i), "image": f"photos/{i}.png", "conversations": parts * answers}

    source = table(photos, "t.json", [talk(0, 1), talk(1, 1), talk(2, 2)])
    assert [source.captions(i) for i in range(3)] == [["A photo, 0."], ["A photo, 1."], []]
    assert (
        source.notes[0]
        == "of each conversation in 'conversations' the answer is the caption, if it has one answer alone"
    )
    assert "1 cell of captions without a text" in source.notes[-1]
    content = [{"type": "text", "text": "A photo."}]
    rows = [
        {
            "images": ["photos/0.png"],
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}],
        }
    ]
    assert table(photos, "m.jsonl", rows).captions(0) == ["A photo."]


def test_missing_images_labels_that_differ_and_splits_are_named(photos):
    rows = [
        {"image": "photos/0.png", "caption": "c", "label": "cat", "split": "train"},
        {"image": "./photos/0.png", "caption": "c", "label": "dog", "split": "train"},
        {"image": "photos/9.png", "caption": "c", "label": "dog", "split": "restval"},
    ]
    source = table(photos, "t.jsonl", rows)
    assert [source.label(i) for i in range(2)] == ["cat", "dog"]
    assert source.notes == [
        f"1 of 2 images do not exist: {photos / 'photos' / '9.png'}",
        f"1 image with two labels, of which the first is used: {photos / 'photos' / '0.png'} (cat, dog)",
        "the splits restval, train are used together; choose one, e.g. ?split=train",
    ]
    assert len(open_source(f"{source.name}?split=train+restval")) == 2


def test_captions_guessed_by_content_are_named(photos):
    source = table(photos, "t.jsonl", [{"image": "photos/0.png", "author": "Jane Doe"}])
    assert source.notes == ["captions are taken from 'author', the only column of sentences"]


def test_numbered_columns_beside_one_without_number(photos):
    rows = [{"image": "photos/0.png", "caption": "", "caption.1": "two", "Caption 3": "three"}]
    source = table(photos, "t.jsonl", [*rows, {"image": "photos/1.png", "caption": "one"}])
    assert [row[1] for row in rows_of(source)] == [["two", "three"], ["one"]]


@pytest.mark.parametrize(
    "text",
    ["a dog runs\na cat sits\n", "1\ta dog runs\n2\ta cat\n"],
)
def test_a_table_without_a_header_is_refused(tmp_path, text):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(UserError, match="the first line must name"):
        open_source(str(tmp_path / "t.tsv"))


def test_folders_of_images_in_a_column_of_their_own(photos):
    rows = [
        {"folder": "photos", "filename": "0.png", "caption": "c"},
        {"folder": ".", "filename": "1.png", "caption": "d"},
    ]
    Image.new("RGB", (4, 4), (9, 9, 9)).save(photos / "1.png")
    assert [row[:2] for row in rows_of(table(photos, "t.jsonl", rows))] == [(0, ["c"]), (9, ["d"])]


def test_absolute_and_relative_paths_are_one_item(photos, monkeypatch):
    monkeypatch.chdir(photos)
    rows = [{"image": "photos/0.png", "caption": "one"}, {"image": str(photos / "photos" / "0.png"), "caption": "two"}]
    (photos / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source("t.jsonl")
    assert [source.captions(i) for i in range(len(source))] == [["one", "two"]]


def test_what_has_no_captions_says_what_it_has(photos):
    source = table(photos, "t.jsonl", [{"image": "photos/0.png", "title": "Dog", "dialogue": [{"value": "x"}]}])
    assert source.notes == ["no captions: none of the columns title, dialogue is called like captions"]
    lists = table(photos, "l.jsonl", [{"image": "photos/0.png", "label": ["cat", "dog"]}])
    assert lists.label(0) is None
    assert lists.notes == ["1 label of ['cat', 'dog'] taken for missing; a class needs a name of its own"]


def test_names_of_classes_go_before_their_numbers(photos):
    rows = [{"image": f"photos/{i}.png", "label": i, "label_name": name} for i, name in enumerate(["dog", "cat"])]
    assert [row[2] for row in rows_of(table(photos, "t.jsonl", rows))] == ["dog", "cat"]


def test_tables_of_splits_and_of_other_columns_are_named(photos):
    write_csv(photos / "train.csv", [("image", "caption"), ("photos/0.png", "c")])
    write_csv(photos / "test.csv", [("image", "comment"), ("photos/1.png", "d")])
    assert open_source(str(photos / "*.csv")).notes == [
        "columns not used: comment",
        "files of the splits test, train are used together; give those of one as the source",
        "no captions in test.csv: there is no column caption",
    ]


@pytest.mark.parametrize(
    ("extra", "note"),
    [
        ({"title": "a long title of it"}, "columns not used: title (sentences)"),
        ({"is_train": 1}, "columns not used: is_train (splits)"),
        ({"fine_label": 3, "coarseLabel": 1}, "columns not used: fine_label (labels), coarseLabel (labels)"),
        ({"mask_path": "photos/1.png"}, "columns not used: mask_path (images)"),
        ({"y": 1, "zh_text": "狗", "empty": ""}, "columns not used: y, zh_text"),
        ({f"c{i}": i for i in range(10)}, "columns not used: c0, c1, c2, c3, c4, c5, c6, c7 and 2 more"),
        ({"url": "https://a.org/0.png", "width": 8, "annotationID": 3, "file_size": 9}, None),
    ],
)
def test_columns_that_may_matter_are_named(photos, extra, note):
    source = table(photos, "t.jsonl", [{"image": "photos/0.png", "caption": "c", **extra}])
    assert source.notes == ([note] if note else [])


def test_splits_by_the_values_of_a_column_and_by_paths(photos):
    rows = [{"image": f"photos/{i}.png", "Usage": use} for i, use in enumerate(["Training", "PublicTest"])]
    assert table(photos, "t.jsonl", rows).notes == [
        "the splits PublicTest, Training are used together; choose one, e.g. ?split=Training"
    ]
    for folder in ("train", "val"):
        (photos / folder).mkdir()
        Image.new("RGB", (4, 4)).save(photos / folder / "0.png")
    source = table(photos, "p.jsonl", [{"image": f"{folder}/0.png", "caption": folder} for folder in ("train", "val")])
    assert source.notes == ["the splits train, val are used together; choose one, e.g. ?split=val"]
    only = open_source(f"{source.name}?split=val")
    assert [only.captions(i) for i in range(len(only))] == [["val"]]


def test_numbers_in_a_column_of_ids_are_names_of_images(photos):
    source = table(photos, "t.jsonl", [{"id": i, "caption": f"c {i}"} for i in range(3)])
    assert [row[:2] for row in rows_of(source)] == [(i, [f"c {i}"]) for i in range(3)]
    assert source.notes[0] == "images are those that column 'id' names"
    texts = table(photos, "u.jsonl", [{"id": i + 100, "caption": f"c {i}"} for i in range(3)])
    assert not texts.has_images
    assert "no images: no column names those beside it" in texts.notes[0]


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (
            [{"image": ["photos/0.png", "photos/1.png"], "caption": "c"}, {"image": ["photos/2.png"], "caption": "d"}],
            "1 row with several images not used: row 0 of {}; write a row for each image",
        ),
        (
            [{"image": "photos/0.png", "caption": {"x": 1}}, {"image": "photos/1.png", "caption": "c"}],
            "1 cell of captions without a text, such as {{'x': 1}}",
        ),
        (
            [{"image": "photos/0.png", "caption": {"en": "a dog"}}],
            "no captions: column 'caption' holds \"{{'en': 'a dog'}}\", which is no text",
        ),
        ([{"image": "photos/0.png", "caption": None}], "no captions: column 'caption' is empty"),
        (
            [{"image": "photos/0.png", "label": "cat|dog"}, {"image": "photos/1.png", "label": "cat"}],
            "labels such as 'cat|dog' are classes of their own: an image has one label",
        ),
        (
            [{"image": "photos/0.png", "label": "None"}, {"image": "photos/1.png", "label": "cat"}],
            "1 label of None taken for missing; a class needs a name of its own",
        ),
        (
            [{"image": f"photos/{i}.png", "label": label} for i, label in enumerate(["cat dog", "cat", "dog"])],
            "labels such as 'cat dog' are classes of their own: an image has one label",
        ),
        (
            [{"image": "photos/0.png", "text": "TRUE"}, {"image": "photos/1.png", "text": "FALSE"}],
            "no captions: column 'text' holds 'TRUE', which is no text",
        ),
        (
            [{"image": "photos/0.png", "id": "a", "talk": [{"from": "gpt"}]}],
            "no captions: none of the columns id, talk is called like captions",
        ),
        (
            [{"image_id": 900, "caption": "c"}],
            "no images: column 'image_id' holds '900', which is no path of an image file",
        ),
    ],
)
def test_cells_that_are_not_what_they_seem_are_named(photos, rows, note):
    source = table(photos, "t.jsonl", rows)
    assert source.notes == [note.format(source.name)]


def test_labels_of_several_words_are_several_labels_where_they_share_most_words():
    assert notes_on_labels(["haze low", "clear low", "haze wet", "clear wet", "low wet"])
    assert notes_on_labels(["cat, dog", "bird, fish", "cat, fish"])
    assert not notes_on_labels(["polar bear", "brown bear", "polar fox", "bear"])


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["Cat", "cat"], "classes that differ in spelling alone: 'Cat' and 'cat'"),
        (["01", "1", "2"], "classes that differ in spelling alone: '01' and '1'"),
        (["0.25", "3", "3"], "numbers such as 0.25 are taken for classes, each a class of its own"),
        ([f"photo {i}" for i in range(8)], "each of 8 labels, such as 'photo 0', is that of one image"),
        (["unknown", "a"], "'unknown' is taken for a class"),
        (["a"] * 8, "all 8 labels are 'a'"),
        (["cat:0.8", "dog:0.75"], "numbers such as cat:0.8 are taken for classes, each a class of its own"),
        (["a", "b"] * 4, None),
    ],
)
def test_labels_that_may_be_no_classes_are_named(labels, note):
    assert notes_on_labels(labels) == ([note] if note else [])


def test_paths_and_texts_in_one_cell_are_refused(photos):
    (photos / "t.csv").write_text("image caption\nphotos/0.png a dog\nphotos/1.png a cat\n")
    with pytest.raises(UserError, match=r"holds paths and texts in one, such as 'photos/0\.png a dog'; put commas"):
        open_source(str(photos / "t.csv"))


def test_addresses_of_files(photos):
    shutil.copy(photos / "photos" / "1.png", photos / "photos" / "b c.png")
    source = table(photos, "t.jsonl", [{"image": f"file://{photos}/photos/b%20c.png", "caption": "c"}])
    assert rows_of(source) == [(1, ["c"], None)]


def test_a_table_of_texts_beside_images_says_so(photos):
    note = f"no images: no column names those beside it, such as {photos / 'photos'}"
    assert table(photos, "t.jsonl", [{"text": "a dog"}]).notes[0].startswith(note)
    assert open_source(f"{photos}/t.jsonl?image=").notes == []
    lists = table(photos, "l.jsonl", [{"frames": ["photos/0.png", "photos/1.png"], "text": "a dog"}])
    assert lists.notes[0].startswith("no images: column 'frames' holds")


def test_strange_texts_of_a_column_are_named(photos):
    source = table(photos, "t.jsonl", [{"image": f"photos/{i}.png", "caption": f"<start> {i} dogs"} for i in range(2)])
    assert source.notes == ["'<start>', which begins every text, is a part of it"]


WORDS = ("red", "green", "blue", "black")
CC3M = [(f"a typical {word} bus", f"http://x.org/{word}/photo-{word}.jpg?size=1") for word in WORDS]


def cc3m(folder, *, header="", names=None):
    """The tsv of CC3M, which names no columns, and files of other names beside it; the third was not downloaded."""
    (folder / "cc3m").mkdir()
    (folder / "cc3m/list.tsv").write_text(header + "".join(f"{text}\t{url}\n" for text, url in CC3M))
    for grey, name in enumerate(names or []):
        if grey != 2:
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / "cc3m" / name, "PNG")
    return open_source(str(folder / "cc3m/list.tsv"))


@pytest.mark.parametrize("header", ["", "caption\turl\n", "text\timage_url\n"])
@pytest.mark.parametrize(
    ("names", "how"),
    [
        ([f"{i}.png" for i in range(4)], "row numbers, counted from 0"),
        ([f"{i + 1:05d}.png" for i in range(4)], "row numbers, counted from 1"),
        ([f"photo-{word}.png" for word in WORDS], "the end of the address"),
        ([f"{i}_{zlib.crc32(url.encode())}" for i, (_, url) in enumerate(CC3M)], "row number and checksum"),
    ],
)
def test_downloaded_images_of_a_list_of_addresses(tmp_path, header, names, how):
    source = cc3m(tmp_path, header=header, names=names)
    assert rows_of(source) == [(i, [f"a typical {WORDS[i]} bus"], None) for i in (0, 1, 3)]
    (note,) = source.notes
    assert how in note
    assert "1 row of 4 without a file not used" in note


def test_a_list_of_addresses_without_images_is_one_of_texts(tmp_path):
    source = cc3m(tmp_path)
    assert not source.has_images
    assert [source.captions(i) for i in range(4)] == [[text] for text, _ in CC3M]
    assert rows_of_paths(tmp_path) == [(i, [f"a typical {WORDS[i]} bus"], None) for i in range(4)]


def rows_of_paths(folder):
    """The same list with a third column, of paths."""
    for grey in range(4):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{grey}-of-them.png")
    lines = [f"{text}\t{url}\t{number}-of-them.png\n" for number, (text, url) in enumerate(CC3M)]
    (folder / "three.tsv").write_text("".join(lines))
    return rows_of(open_source(str(folder / "three.tsv")))


def test_files_that_number_something_else_are_not_taken_for_downloads(tmp_path):
    source = cc3m(tmp_path, names=["0.png", "1.png", "", "99.png"])
    assert not source.has_images


def test_karpathys_file_chooses_split_and_captions_of_coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    images = []
    for number, (folder, split) in enumerate([("train2014", "train"), ("val2014", "restval"), ("val2014", "test")]):
        (tmp_path / folder).mkdir(exist_ok=True)
        name = f"COCO_{folder}_{number:012d}.jpg"
        Image.new("RGB", (8, 8), (number, number, number)).save(tmp_path / folder / name, "PNG")
        sentences = [{"tokens": ["a", "dog"], "raw": f"A dog {each}."} for each in range(5)]
        images.append({"filepath": folder, "filename": name, "split": split, "sentences": sentences})
    (tmp_path / "annotations/dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    place = tmp_path / "annotations/dataset_coco.json"
    texts = [f"A dog {each}." for each in range(5)]
    assert rows_of(open_source(f"{place}?split=test")) == [(2, texts, None)]
    assert rows_of(open_source(f"{place}?split=train+restval")) == [(0, texts, None), (1, texts, None)]
