"""A file of captions: whole under its name, or in parts that are continued."""

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from diptych.data.caption_file import CaptionFile, MadeCaption, Sidecars
from diptych.data.sources import open_source
from diptych.errors import UserError

ONE = MadeCaption(file="k1", caption='a "dog", one', score=-0.5)
TWO = MadeCaption(file="k2", caption="a cat", score=None)


def test_rows_come_in_the_order_of_the_images(tmp_path):
    file = CaptionFile(tmp_path / "c.csv", made_by={"weights": "1"})
    file.add([TWO])
    file.add([ONE])
    file.finish(["k1", "k2", "k3", "k1"])
    assert (tmp_path / "c.csv").read_text() == 'file_name,caption,score\nk1,"a ""dog"", one",-0.5\nk2,a cat,\n'
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


def test_coco(tmp_path):
    file = CaptionFile(tmp_path / "c.json", made_by={})
    file.add([ONE, TWO])
    file.finish(["k1", "k2"])
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["images"] == [{"id": 1, "file_name": "k1"}, {"id": 2, "file_name": "k2"}]
    assert found["annotations"][1] == {"id": 2, "image_id": 2, "caption": "a cat", "log_probability": None}


@pytest.fixture
def datasets(monkeypatch):
    """The library, which does not tell the hub what is loaded."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    return datasets


@pytest.fixture
def photos(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), (len(name), 9, 200)).save(tmp_path / name)
    return tmp_path


def write(out):
    file = CaptionFile(out, made_by={})
    names = [str(out.parent / name) for name in ("a.png", "b.png")]
    file.add([MadeCaption(file=name, caption=f"a dog, {name[-5]}", score=-0.5) for name in names])
    file.finish(names)


def test_label_studio_takes_the_tasks(photos):
    interface = pytest.importorskip("label_studio_sdk.label_interface")
    write(photos / "c.tasks.json")
    shown = '<View><Image name="image" value="$image"/><TextArea name="caption" toName="image"/></View>'
    for task in json.loads((photos / "c.tasks.json").read_text()):
        assert interface.LabelInterface(shown).validate_task({"data": task["data"]})
        assert all(interface.LabelInterface(shown).validate_prediction(each) for each in task["predictions"])


def test_label_studio(photos):
    """Tasks as its documentation of pre-annotations has them; an export holds what people made of them."""
    out = photos / "c.tasks.json"
    write(out)
    tasks = json.loads(out.read_text())
    assert tasks[0]["data"] == {"image": "/data/local-files/?d=a.png"}
    [part] = tasks[0]["predictions"][0]["result"]
    assert part == {"from_name": "caption", "to_name": "image", "type": "textarea", "value": {"text": ["a dog, a"]}}
    source = open_source(str(out))
    assert [source.captions(i) for i in range(2)] == [["a dog, a"], ["a dog, b"]]
    assert source.image(0, 8).shape == (8, 8, 3)
    tasks[0]["annotations"] = [
        {"was_cancelled": True, "result": [part | {"value": {"text": ["no"]}}]},
        {"was_cancelled": False, "result": [part | {"value": {"text": ["a wolf"]}}]},
    ]
    out.write_text(json.dumps(tasks))
    assert [open_source(str(out)).captions(i) for i in range(2)] == [["a wolf"], ["a dog, b"]]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.parquet"])
def test_datasets_reads_the_folder(datasets, photos, tmp_path_factory, name):
    write(photos / name)
    cache = str(tmp_path_factory.mktemp("cache"))
    found = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=cache)
    assert found["caption"] == ["a dog, a", "a dog, b"]
    assert found[0]["image"].size == (8, 8)
    source = open_source(str(photos))
    assert [source.captions(i) for i in range(2)] == [["a dog, a"], ["a dog, b"]]


def test_what_was_begun_is_continued_by_the_same_run_alone(tmp_path):
    CaptionFile(tmp_path / "c.jsonl", made_by={"weights": "1"}).add([ONE])
    with open(tmp_path / ".c.jsonl.partial", "a") as file:
        file.write('{"file": "cut')
    assert CaptionFile(tmp_path / "c.jsonl", made_by={"weights": "1"}).made == {"k1": ONE}
    with pytest.raises(UserError, match="begun by another run"):
        CaptionFile(tmp_path / "c.jsonl", made_by={"weights": "2"})


@pytest.mark.parametrize(("name", "message"), [("c.txt", r"ends in \.csv"), ("there.csv", "exists already")])
def test_names_that_cannot_be(tmp_path, name, message):
    (tmp_path / "there.csv").touch()
    with pytest.raises(UserError, match=message):
        CaptionFile(tmp_path / name, made_by={})


def test_no_text_is_replaced(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    texts = Sidecars([str(tmp_path / name) for name in ("a.png", "b.png")])
    texts.add([MadeCaption(file=str(tmp_path / "a.png"), caption="other", score=None)])
    texts.add([MadeCaption(file=str(tmp_path / "b.png"), caption="a cat", score=None)])
    assert ((tmp_path / "a.txt").read_text(), (tmp_path / "b.txt").read_text()) == ("mine", "a cat\n")


def write_with_images(out, *, names=("a.png", "b.jpg"), candidates=()):
    """Two photos in the format that the name says."""
    file = CaptionFile(out, made_by={})
    names = [str(out.parent / name) for name in names]
    file.add(
        [
            MadeCaption(file=name, caption=f"a dog, {name[-5]}", score=-0.5, candidates=list(candidates))
            for name in names
        ]
    )
    file.finish(names, confidence=lambda score: 0.25)


@pytest.fixture
def two_kinds(tmp_path):
    Image.new("RGB", (8, 6), (1, 9, 200)).save(tmp_path / "a.png")
    Image.new("RGB", (10, 12), (200, 9, 1)).save(tmp_path / "b.jpg")
    return tmp_path


def check_own_source(out):
    source = open_source(str(out))
    assert [source.captions(i) for i in range(len(source))] == [["a dog, a"], ["a dog, b"]]
    assert source.image(1, 8).shape == (8, 8, 3)
    assert source.image(1, 8)[..., 0].mean() > 150


def test_datasets_reads_parquet_with_images(datasets, two_kinds, tmp_path_factory):
    out = two_kinds / "c.images.parquet"
    write_with_images(out, candidates=["a dog", "a cat"])
    cache = str(tmp_path_factory.mktemp("cache"))
    found = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=cache)
    assert found.column_names == ["image", "text", "score", "confidence", "candidates"]
    assert [image.size for image in found["image"]] == [(8, 6), (10, 12)]
    assert list(found["text"]) == ["a dog, a", "a dog, b"]
    assert (found[0]["confidence"], found[1]["candidates"]) == (0.25, ["a dog", "a cat"])
    check_own_source(out)


def test_a_tar_is_laid_out_as_img2dataset_does(two_kinds):
    out = two_kinds / "00000.tar"
    write_with_images(out)
    with tarfile.open(out) as tar:
        names = tar.getnames()
        assert tar.extractfile("000000000.png").read() == (two_kinds / "a.png").read_bytes()
    assert names == [f"00000000{key}" for key in ("0.png", "0.txt", "0.json", "1.jpg", "1.txt", "1.json")]
    check_own_source(out)


def test_datasets_reads_a_tar_of_images_of_one_format(datasets, two_kinds, tmp_path_factory):
    out = two_kinds / "00000.tar"
    Image.open(two_kinds / "a.png").save(two_kinds / "a.jpg")
    write_with_images(out, names=("a.jpg", "b.jpg"))
    cache = str(tmp_path_factory.mktemp("cache"))
    found = datasets.load_dataset("webdataset", data_files={"train": str(out)}, split="train", cache_dir=cache)
    assert list(found["txt"]) == ["a dog, a", "a dog, b"]
    assert [image.size for image in found["jpg"]] == [(8, 6), (10, 12)]
    about = found[1]["json"]
    assert (about["file_name"], about["width"], about["height"], about["confidence"]) == ("b.jpg", 10, 12, 0.25)


def test_webdataset_reads_the_tar(two_kinds):
    webdataset = pytest.importorskip("webdataset")
    write_with_images(two_kinds / "00000.tar")
    samples = list(webdataset.WebDataset(str(two_kinds / "00000.tar"), shardshuffle=False).decode("pil"))
    assert [sample["txt"] for sample in samples] == ["a dog, a", "a dog, b"]
    assert samples[1]["jpg"].size == (10, 12)
    assert samples[1]["json"]["file_name"] == "b.jpg"


def test_pycocotools_reads_coco(two_kinds, capsys):
    from pycocotools.coco import COCO

    write_with_images(two_kinds / "c.json")
    coco = COCO(str(two_kinds / "c.json"))
    coco.info()
    assert "captions by diptych" in capsys.readouterr().out
    image = coco.loadImgs(2)[0]
    assert (image["file_name"], image["width"], image["height"]) == ("b.jpg", 10, 12)
    [found] = coco.loadAnns(coco.getAnnIds(imgIds=[2]))
    assert found["caption"] == "a dog, b"
    # What the format of FiftyOne's COCODetectionDataset demands beside `image_id`.
    assert coco.loadCats(found["category_id"]) == [{"id": 1, "name": "image"}]
    assert (found["bbox"], found["area"], found["iscrowd"]) == ([0, 0, 10, 12], 120, 0)
    check_own_source(two_kinds / "c.json")


def test_fiftyone_reads_coco_and_csv(two_kinds):
    """Its importers, without the database that its data sets lie in."""
    coco, table = (pytest.importorskip(f"fiftyone.utils.{name}") for name in ("coco", "csv"))
    write_with_images(two_kinds / "c.json")
    write_with_images(two_kinds / "c.csv")
    where = {"data_path": str(two_kinds)}
    boxes = coco.COCODetectionDatasetImporter(labels_path=str(two_kinds / "c.json"), **where)
    rows = table.CSVDatasetImporter(labels_path=str(two_kinds / "c.csv"), media_field="file_name", **where)
    boxes.setup()
    rows.setup()
    read = [(Path(path).name, labels["detections"].detections[0]) for path, _, labels in boxes]
    assert [(name, box.caption, box.bounding_box) for name, box in read] == [
        ("a.png", "a dog, a", [0, 0, 1, 1]),
        ("b.jpg", "a dog, b", [0, 0, 1, 1]),
    ]
    assert [(Path(row.filepath).name, row.caption) for row in rows] == [("a.png", "a dog, a"), ("b.jpg", "a dog, b")]


def test_images_inside_other_files_are_handed_on(two_kinds):
    data = (two_kinds / "b.jpg").read_bytes()
    file = CaptionFile(two_kinds / "c.tar", made_by={}, files={"row 0": lambda: data})
    file.add([MadeCaption(file="row 0", caption="a dog", score=None)])
    (two_kinds / ".c.tar.fresh").write_bytes(b"what a kill left")
    file.finish(["row 0"])
    with tarfile.open(two_kinds / "c.tar") as tar:
        assert tar.extractfile("000000000.jpg").read() == data
    assert not list(two_kinds.glob(".c.tar*"))


def test_an_image_that_has_gone_is_told(two_kinds):
    gone = two_kinds / "gone.png"
    file = CaptionFile(two_kinds / "c.tar", made_by={}, files={str(gone): lambda: gone})
    file.add([MadeCaption(file=str(gone), caption="a dog", score=None)])
    with pytest.raises(UserError, match=r"gone\.png: can no longer be read"):
        file.finish([str(gone)])
    assert not (two_kinds / "c.tar").exists()
