"""Which tabs runs give, and the limits on what users send."""

import pytest

from diptych.app.runs import AT_ONCE, networks, open_runs, read_images, tabs_of
from diptych.errors import UserError


def test_a_finished_run_gives_the_tabs_of_its_kind(itit_run):
    runs = open_runs([itit_run, itit_run], device="cpu")
    assert len(runs) == 1
    assert list(networks(runs, "itit")) == [str(itit_run)]
    assert "Caption" in tabs_of(runs)


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        open_runs([tmp_path], device="cpu")


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
