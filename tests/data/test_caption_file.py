"""A file of captions: whole under its name, or in parts that are continued."""

import json

import pytest

from diptych.data.caption_file import CaptionFile, MadeCaption, Sidecars
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
    assert found["annotations"][1] == {"id": 2, "image_id": 2, "caption": "a cat", "score": None}


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
