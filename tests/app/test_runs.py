"""Which tabs runs give, and the limits on what users send."""

import pytest

from diptych.app.runs import AT_ONCE, open_given, read_images
from diptych.dual.search import embed_run
from diptych.errors import UserError

ITIT = ["Caption", "Draw", "Cycle"]


def test_tabs_are_those_of_the_runs(itit_run, dual_run, photos, tmp_path):
    index = tmp_path / "index"
    embed_run(dual_run, str(photos), side="images", out=index, workers=1, device="cpu")

    def tabs(*runs, **more):
        return open_given(runs, device="cpu", **more).tabs

    assert tabs(itit_run, itit_run) == ITIT
    assert tabs(dual_run) == ["Classify"]
    assert tabs(dual_run, indexes=[index]) == ["Search", "Classify"]
    data = {"data": str(photos), "out": tmp_path / "out"}
    assert tabs(itit_run, **data) == [*ITIT, "Label"]
    (photos / "0.txt").write_text("a dog")
    assert tabs(itit_run, **data) == [*ITIT, "Label", "Audit"]
    for number in range(1, 4):
        (photos / f"{number}.txt").write_text("a dog")
    assert tabs(itit_run, dual_run, **data) == [*ITIT, "Classify", "Audit"]
    (itit_run / "metrics.jsonl").touch()
    assert tabs(itit_run) == [*ITIT, "Train"]
    (itit_run / "model").rename(itit_run / "hidden")
    assert tabs(itit_run) == ["Train"]


def test_what_cannot_be_opened_is_told(itit_run, dual_run, photos, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        open_given([tmp_path], device="cpu")
    embed_run(dual_run, str(photos), side="images", out=tmp_path / "index", workers=1, device="cpu")
    with pytest.raises(UserError, match="with the run that made it"):
        open_given([itit_run], indexes=[tmp_path / "index"], device="cpu")


def test_images_are_what_a_network_sees(photos):
    [image] = read_images([str(photos / "0.png")], 32)
    assert image.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [(None, "drop one"), ([], "drop one"), (["x.png"] * (AT_ONCE + 1), f"at most {AT_ONCE}"), (["/no.png"], "no.png")],
)
def test_what_cannot_be_taken_is_told_in_a_line(files, message):
    with pytest.raises(UserError, match=message) as caught:
        read_images(files, 32)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(bomb):
    with pytest.raises(UserError, match=r"^bomb\.png: is 20000 x 20000 pixels, over the limit of 50,000,000"):
        read_images([str(bomb)], 32)
