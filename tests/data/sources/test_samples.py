"""What belongs to an image by its name: the same in a folder and in a tar."""

import hashlib
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from diptych.data.sources import open_source
from diptych.data.sources.columns import Columns
from diptych.data.sources.samples import IMAGE, JSON, TEXT, group
from diptych.errors import UserError


def png(name):
    file = io.BytesIO()
    Image.frombytes("RGB", (1, 1), hashlib.sha256(name.encode()).digest()[:3]).save(file, "PNG")
    return file.getvalue()


def write(place, kind, files):
    """The same files as a folder or as members of a tar; the spec of the source."""
    contents = {
        name: png(name) if data is None else (json.dumps(data) if isinstance(data, dict) else data).encode()
        for name, data in files.items()
    }
    if kind == "folder":
        for name, data in contents.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        return str(place)
    with tarfile.open(place / "t.tar", "w") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(place / "t.tar")


CASES = {
    "own name": ({"a.png": None, "a.txt": "one"}, [["one"]]),
    "capitals": ({"A.PNG": None, "A.TXT": "one"}, [["one"]]),
    "whole name": ({"a.png": None, "a.png.txt": "one"}, [["one"]]),
    "dots in names": ({"2.05.png": None, "2.05.txt": "five", "2.06.png": None, "2.06.txt": "six"}, [["five"], ["six"]]),
    "compound extensions": ({"s.input.png": None, "s.outputs.txt": "one"}, [["one"]]),
    "nearest first": ({"a.old.txt": "old", "a.png": None, "a.txt": "new"}, [["new"]]),
    "numbers are no extensions": ({"IMG.2020.01.png": None, "IMG.2020.02.txt": "another"}, [[]]),
    "nor are words that one name has": (
        {"Mr.Jones.png": None, "Mr.Smith.txt": "another", "b.png": None, "b.txt": "one"},
        [[], ["one"]],
    ),
    "compound extensions of many": (
        {name: data for k in "ab" for name, data in ((f"{k}.in.png", None), (f"{k}.out.txt", f"text {k}"))},
        [["text a"], ["text b"]],
    ),
    "words for nothing": ({"a.png": None, "a.txt": "nan\none\n"}, [["one"]]),
    "folders of systems": ({"a.png": None, "a.txt": "one", "__MACOSX/a.png": None, "@eaDir/b.png": None}, [["one"]]),
    "accents": ({"caf\u00e9.png": None, "cafe\u0301.txt": "one"}, [["one"]]),
    "caption": ({"a.png": None, "a.caption": "one"}, [["one"]]),
    "json": ({"a.png": None, "a.json": {"caption": "one"}}, [["one"]]),
    "json that is a caption": (
        {"a.png": None, "a.json": '["one", "two"]', "b.png": None, "b.json": '"three"'},
        [["one", "two"], ["three"]],
    ),
    "json of some": ({"a.png": None, "a.json": {"caption": "one"}, "b.png": None, "b.txt": "two"}, [["one"], ["two"]]),
    "empty text": ({"a.png": None, "a.txt": "\n", "a.json": {"caption": "one"}, "b.png": None}, [["one"], []]),
    "a caption a line": ({"a.png": None, "a.txt": "one\ntwo\n"}, [["one", "two"]]),
    "one of two lines": ({"a.png": None, "a.txt": "One\ntwo", "a.json": {"caption": "One\ntwo"}}, [["One two"]]),
    "folders": ({"x/a.png": None, "y/a.png": None, "y/a.txt": "one"}, [[], ["one"]]),
    "system files": ({"a.png": None, "._a.png": "?", "Thumbs.db": "?", "a.txt": "one"}, [["one"]]),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("case", CASES)
def test_captions_by_name(tmp_path, kind, case):
    files, expected = CASES[case]
    source = open_source(write(tmp_path, kind, files))
    assert [source.captions(i) for i in range(len(source))] == expected


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_late_json_captions_are_found(tmp_path, kind):
    files = {}
    for i in range(200):
        files |= {f"{i:03}.png": None, f"{i:03}.json": {"width": 8, **({"caption": "late"} if i == 7 else {})}}
    source = open_source(write(tmp_path, kind, files))
    assert source.has_captions
    assert source.captions(7) == ["late"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_extensions_may_be_named(tmp_path, kind):
    files = {"a.left.png": None, "a.right.png": None, "a.tags.txt": "tags", "a.long.txt": "long"}
    spec = write(tmp_path, kind, files)
    with pytest.raises(UserError, match=r"a\.\w+\.txt: belongs to 2 images, .* and 1 more files likewise"):
        open_source(spec)
    source = open_source(spec, columns=Columns(image="right.png", caption="long.txt"))
    assert [source.captions(i) for i in range(len(source))] == [["long"]]
    assert source.notes == ["2 other files not used: a.left.png, a.tags.txt"]


def test_second_side_cars_are_unused():
    groups = group(["k.jpg", "k.a.txt", "k.b.txt", "k.json", "z.json", "n.pdf"], Columns(), source="s")
    assert groups.keys == ["k"]
    assert [groups.slots[0][kind] for kind in (IMAGE, TEXT, JSON)] == [0, 1, 3]
    assert (groups.lone, groups.second, groups.unused) == ([4], [2], [5])


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_is_not_used_is_named_by_its_kind(tmp_path, kind):
    files = {
        "1.png": None,
        "1.txt": "a dog",
        "1.png.txt": "tags",
        "1.npz": "?",
        "2.npz": "?",
        "3.npz": "?",
        "t.csv": "a,b",
    }
    source = open_source(write(tmp_path, kind, files))
    notes, captions = source.notes, source.captions(0)
    assert captions == ["a dog"]
    assert notes[0] == "1 file not used, as another of the kind belongs to the image: 1.png.txt"
    hint = "a table of captions is a source of its own" + ", once it is unpacked" * (kind == "tar")
    assert notes[1] == f"4 other files not used: 1.npz, 2.npz, 3.npz and 1 more; {hint}"


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_that_were_packed_on_windows(tmp_path, kind):
    files = {f"{part}\\{name}\\{i}.png": None for i, part in enumerate(["train", "test"]) for name in ("cat", "dog")}
    spec = write(tmp_path, kind, files | {"train\\cat\\0.txt": "a cat"})
    source = open_source(spec, split="train")
    assert [(source.label(i), source.captions(i)) for i in range(len(source))] == [("cat", ["a cat"]), ("dog", [])]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_splits_that_are_called_after_their_data_set(tmp_path, kind):
    names = [
        "seg_train/seg_train/forest/1",
        "seg_train/seg_train/sea/2",
        "seg_test/seg_test/sea/3",
        "seg_pred/seg_pred/4",
    ]
    spec = write(tmp_path, kind, {f"{name}.png": None for name in names})
    source = open_source(spec)
    assert sorted(str(source.label(i)) for i in range(4)) == ["None", "forest", "sea", "sea"]
    assert source.notes == [
        "the splits seg_pred, seg_test, seg_train are used together; choose one, e.g. ?split=seg_train"
    ]
    assert len(open_source(spec, split="seg_test")) == 1
    names += ["one", "two"]
    spec = write(tmp_path, kind, {f"{name}.png": None for name in names})
    for split in (None, "seg_test"):
        assert "2 items without a split: no ?split= takes them" in open_source(spec, split=split).notes
    (tmp_path / "toys").mkdir()
    toys = write(tmp_path / "toys", kind, {f"{name}/1.png": None for name in ("steam_train", "toy_car")})
    assert {open_source(toys).label(i) for i in range(2)} == {"steam_train", "toy_car"}


def test_images_of_one_name_keep_whole_names():
    groups = group(["k.jpg", "k.png", "m.1.jpg", "m.2.jpg", "n.x.jpg"], Columns(), source="s")
    assert groups.keys == ["k.jpg", "k.png", "m.1", "m.2", "n"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_splits_in_json_that_are_used_together_are_named(tmp_path, kind):
    files = {}
    for i in range(4):
        files |= {f"{i}.png": None, f"{i}.json": {"caption": "c", "split": ["train", "test"][i % 2]}}
    spec = write(tmp_path, kind, files)
    assert open_source(spec).notes == ["the splits test, train are used together; choose one, e.g. ?split=train"]
    assert open_source(spec, split="test").notes == []


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_texts_of_boxes_are_no_captions(tmp_path, kind):
    files = {"a.png": None, "a.txt": "0 0.5 0.5 0.2 0.3\n1 0.1 0.1 0.2 0.2\n", "b.png": None, "b.txt": "2 0.5 0.5 1 1"}
    source = open_source(write(tmp_path, kind, files))
    assert not source.has_captions
    assert source.notes == ["2 texts with boxes not used: they hold no captions"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["cat/a.png", "dog/b.png"], ["cat", "dog"]),
        (["images/train/a.png", "images/val/b.png"], [None, None]),
        (["train_images/a.png", "test_images/b.png"], [None, None]),
        (["held_out/cat/a.png", "training_set/dog/b.png"], ["cat", "dog"]),
        (["data/test/cat/a.png", "data/train/dog/b.png"], ["cat", "dog"]),
        (["images_001/a.png", "images_002/b.png"], [None, None]),
        (["data/cat/black/a.png", "data/dog/b.png"], ["cat", "dog"]),
        (["cat/train/a.png", "dog/test/b.png"], ["cat", "dog"]),
        (["test/images/a.png", "train/cat/images/b.png"], [None, "cat"]),
    ],
)
def test_folders_that_are_classes(tmp_path, kind, names, labels):
    source = open_source(write(tmp_path, kind, dict.fromkeys(names)))
    assert [source.label(i) for i in range(2)] == labels
    splits = any("train" in name for name in names)
    nested = any("black" in name for name in names)
    assert bool(source.notes) == splits or nested
    assert any("classes are the outermost folders, such as 'cat' for" in note for note in source.notes) == nested
    if splits:
        assert "used together" in source.notes[0]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("names", "masks"),
    [
        (["a.jpg", "a_mask.png", "b.jpg", "b.mask.png", "c.jpg"], ["a_mask.png", "b.mask.png"]),
        (["x (1).png", "x (1)_mask.png", "x (1)_mask_1.png"], ["x (1)_mask.png", "x (1)_mask_1.png"]),
        (["images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b_mask.gif"], ["masks/a.png", "masks/b_mask.gif"]),
        (["train/a.jpg", "train_masks/a_mask.gif", "test/a.jpg"], ["train_masks/a_mask.gif"]),
        (
            ["train/a.png", "train_labels/a_L.png", "test/a.png", "testannot/a.png"],
            ["testannot/a.png", "train_labels/a_L.png"],
        ),
        (["image/0.png", "label/0.png", "image/1.png", "label/1.png"], ["label/0.png", "label/1.png"]),
        (["imagesTr/a_0000.png", "labelsTr/a.png"], ["labelsTr/a.png"]),
        (
            ["k/test/bad/0.png", "k/train/good/0.png", "k/ground_truth/bad/0_mask.png"],
            ["k/ground_truth/bad/0_mask.png"],
        ),
        (["images/val/a.jpg", "annotations/val/a.png", "images/val/b.png"], ["annotations/val/a.png"]),
        (["masks/0.jpg", "hats/0.jpg"], []),
        (
            ["leftImg8bit/train/x/x_0_leftImg8bit.png", "gtFine/train/x/x_0_gtFine_labelIds.png"],
            ["gtFine/train/x/x_0_gtFine_labelIds.png"],
        ),
        (["a.jpg", "a-150x150.jpg", "a@2x.jpg", "b-150x150.jpg"], ["a-150x150.jpg", "a@2x.jpg"]),
        (["images/a.jpg", "images/b.jpg", "thumbs/a.jpg", "thumbs/b.jpg"], ["thumbs/a.jpg", "thumbs/b.jpg"]),
        (["masks/0.png", "hats/0.png", "gloves/0.png"], []),
        (["bank_mask.png", "carnival_mask.png"], []),
        (["mask/0.png", "no_mask/0.png"], []),
        (["x/mask/0.png", "x/without_mask/0.png"], []),
        (["a.png", "a-masklabel.png", "a-condlabel.png"], ["a-masklabel.png", "a-condlabel.png"]),
    ],
)
def test_masks_are_no_images_of_their_own(tmp_path, kind, names, masks):
    files = {}
    for name in names:
        files[name] = None
        if name not in masks:
            files[os.path.splitext(name)[0] + ".txt"] = name
    source = open_source(write(tmp_path, kind, files))
    assert sorted(text for i in range(len(source)) for text in source.captions(i)) == sorted(set(names) - set(masks))
    shown = (
        f"{len(masks)} image{'s' * (len(masks) > 1)} not used, as masks or copies of others: {', '.join(sorted(masks))}"
    )
    assert [note for note in source.notes if "mask" in note and "not used" in note] == ([shown] if masks else [])


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_a_json_says_otherwise_is_named(tmp_path, kind):
    files = {}
    for i, (text, said) in enumerate([("one", "one"), ("two", "another"), ("nan", "three"), ("four\nfive", "five")]):
        files |= {f"{i}.png": None, f"{i}.txt": text, f"{i}.json": {"caption": said, "label": [0, -1, 1, 2][i]}}
    source = open_source(write(tmp_path, kind, files))
    assert [source.captions(i) for i in range(4)] == [["one"], ["two"], ["three"], ["four", "five"]]
    assert [source.label(i) for i in range(4)] == ["0", None, "1", "2"]
    assert source.notes == [
        "1 of 4 .json that were looked at have other captions than the text beside them, which is used; choose with "
        "?caption=caption",
        "1 caption such as nan or null of 4 that were looked at taken for missing",
        "1 label of -1 taken for missing; a class needs a name of its own (of 4 that were looked at)",
    ]
    assert open_source(source.name + "?caption=caption").captions(1) == ["another"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_class_of_minus_one_is_none(tmp_path, kind):
    source = open_source(write(tmp_path, kind, {"a.png": None, "a.cls": "-1", "b.png": None, "b.cls": "3"}))
    assert [source.label(i) for i in range(2)] == [None, "3"]
    assert "1 label of -1 taken for missing" in source.notes[0]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_side_cars_that_say_nothing_are_named(tmp_path, kind):
    files = {"a.png": None, "a.json": {"shapes": [], "version": "5"}, "b.png": None, "b.txt": " \n"}
    source = open_source(write(tmp_path, kind, files))
    assert source.notes == [
        "columns not used: version",
        ".json without captions and labels: their fields are shapes, version",
        "1 text of 2 that were looked at is empty",
    ]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_are_compared_by_their_size_and_their_middle(tmp_path, kind):
    source = open_source(write(tmp_path, kind, {"a.png": None, "b.png": "x" * 99 + "y" * 99, "empty.png": ""}))
    a, b, empty = (source.block(i) for i in range(3))
    assert (b, empty) == ((198, b"y" * 64), (0, b""))
    assert a[0] == len(png("a.png"))


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("names", "doubt"),
    [
        (["A/1.png", "A/2.png", "B/1.png", "B/2.png"], "A and B are taken for classes, though they hold files of the"),
        (["HR/1.png", "LR/1x4.png"], "HR and LR are taken for classes, though they are called like views or dates"),
        (["2021-05/1.png", "2022-06/2.png"], "2021-05 and 2022-06 are taken for classes, though they are called like"),
        (["10_sks dog/a.png", "1_dog/b.png"], "10_sks dog and 1_dog are taken for classes, and numbers of repeats, if"),
        (["v1/a.png", "v2/b.png"], "v1 and v2 are taken for classes, though they are numbered alike"),
        (["cat/1.png", "cat/2.png", "dog/1.png"], None),
        (["n01440764/a.png", "n01443537/b.png"], None),
        (["0/a.png", "1/b.png"], None),
    ],
)
def test_folders_that_may_be_no_classes_are_named(tmp_path, kind, names, doubt):
    notes = open_source(write(tmp_path, kind, dict.fromkeys(names))).notes
    assert [note.startswith(f"folders such as {doubt}") for note in notes] == [True] * bool(doubt)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("text", ["['a dog', 'one dog']", '["a dog", "one dog"]', '[\n{"raw": "a dog"},\n"one dog"]'])
def test_a_text_that_writes_a_list_out_is_read_as_the_list(tmp_path, kind, text):
    source = open_source(write(tmp_path, kind, {"a.png": None, "a.txt": text, "b.png": None, "b.txt": "['a cat']"}))
    assert [source.captions(i) for i in range(2)] == [["a dog", "one dog"], ["a cat"]]
    assert source.notes == []


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a {} dog\nNegative prompt: blurry\nSteps: 20, Sampler: a", "'Negative prompt:', 'Steps: 20, Sampler:'"),
        ("title: {}\ncaption: a {} dog\n", "'title:', 'caption:'"),
        ("a {} dog\na dog that is {}\n", None),
    ],
)
def test_lines_that_are_fields_are_named(tmp_path, kind, text, shown):
    files = {f"{c}.png": None for c in ("red", "blue")} | {f"{c}.txt": text.format(c, c) for c in ("red", "blue")}
    notes = open_source(write(tmp_path, kind, files)).notes
    assert notes == ([f"lines that begin alike in every text are captions too: {shown}"] if shown else [])


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_called_like_captioned_ones_are_named(tmp_path, kind):
    source = open_source(write(tmp_path, kind, {"a.png": None, "a.txt": "x", "more/a.png": None, "b.png": None}))
    shown = "more/a.png" if kind == "folder" else "more/a"
    assert f"1 image without a text called like one that has it: {shown}" in source.notes


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_two_labels_of_one_image_are_named(tmp_path, kind):
    files = {"cat/a.png": None, "cat/a.json": {"label": "dog"}, "dog/b.png": None, "dog/b.cls": "dog"}
    source = open_source(write(tmp_path, kind, files))
    shown = source.key(0)
    assert source.notes == [
        f"1 image of 2 that were looked at with two labels, the first of its own file: {shown} (dog, cat)"
    ]
    assert source.label(0) == "dog"


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_class_that_is_json_is_none(tmp_path, kind):
    source = open_source(write(tmp_path, kind, {"a.png": None, "a.cls": '{"id": 3}', "b.png": None, "b.cls": "[1, 2]"}))
    assert [source.label(i) for i in range(2)] == [None, None]
    assert source.notes[0].startswith('2 labels of {"id": 3} taken for missing')


def test_members_of_any_path_are_read(tmp_path):
    names = {"../up.png": None, "../up.txt": "one", "/abs/a.png": None, "/abs/a.txt": "two", "b/a.png": None}
    source = open_source(write(tmp_path, "tar", names))
    assert [source.captions(i) for i in range(3)] == [["one"], ["two"], []]
    assert [source.label(i) for i in range(3)] == [None, "abs", "b"]


@pytest.mark.parametrize("end", ["_depth", "_normal", "_canny", "-openpose", "_mask"])
def test_what_is_computed_from_an_image_is_no_image(end):
    assert group(["a.jpg", f"a{end}.png", f"b{end}.png"], Columns(), source="t").masks == [1]


def test_a_text_called_caption_goes_before_others():
    names = ["s0.jpg", "s0.tags.txt", "s0.caption.txt", "s1.jpg", "s1.tags.txt", "s1.caption.txt"]
    assert [slots[TEXT] for slots in group(names, Columns(), source="t").slots] == [2, 5]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_copies_with_texts_of_their_own_are_images(tmp_path, kind):
    source = open_source(write(tmp_path, kind, {"a.png": None, "a-8x8.png": None, "a-8x8.txt": "one"}))
    assert len(source) == 2
