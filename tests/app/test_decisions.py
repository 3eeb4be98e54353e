"""Decisions of the Label tab: each is on disk at once, and no caption of a user is touched."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from diptych.app.decisions import Labels, Offers
from diptych.data.sources import open_source
from diptych.errors import UserError
from diptych.itit.pipeline import Diptych


def opened(photos, out, *, sidecars=False):
    return Labels(open_source(str(photos)), file=out / "labels.jsonl", sidecars=sidecars)


def test_decisions_are_rows_and_a_source(photos, tmp_path):
    labels = opened(photos, tmp_path / "out")
    labels.decide(0, "a dog", proposed="a dog")
    labels.decide(1, " a big  cat ", proposed="a cat")
    labels.decide(2, None, proposed="a bird")
    assert labels.counts() == {"accepted": 1, "edited": 1, "rejected": 1, "left": 1}
    again = opened(photos, tmp_path / "out")
    assert again.open == [3]
    source = open_source(str(tmp_path / "out/labels.jsonl"))
    assert [source.captions(i) for i in range(3)] == [["a dog"], ["a big cat"], []]
    assert source.image(0, 8).shape == (8, 8, 3)


def test_a_later_decision_replaces_an_earlier_one(photos, tmp_path):
    labels = opened(photos, tmp_path, sidecars=True)
    labels.decide(0, "a dog", proposed="a dog")
    labels.decide(0, "a wolf", proposed="a dog")
    assert (photos / "0.txt").read_text() == "a wolf\n"
    assert labels.caption_of(0) == "a wolf"
    labels.decide(0, None, proposed="a dog")
    assert not (photos / "0.txt").exists()
    [row] = (tmp_path / "labels.jsonl").read_text().splitlines()
    assert json.loads(row)["decision"] == "rejected"


def test_captions_of_users_are_never_touched(photos, tmp_path):
    (photos / "0.txt").write_text("mine\n")
    labels = opened(photos, tmp_path, sidecars=True)
    assert labels.open == [1, 2, 3]
    (photos / "1.txt").write_text("written meanwhile\n")
    with pytest.raises(UserError, match=r"1\.txt: holds a caption that is not of the page"):
        labels.decide(1, "a cat", proposed="a cat")
    labels.decide(2, "a bird", proposed="a bird")
    (photos / "2.txt").write_text("mended by hand\n")
    for caption in ("a fish", None):
        with pytest.raises(UserError, match=r"2\.txt"):
            labels.decide(2, caption, proposed="a bird")
    assert [(photos / f"{n}.txt").read_text() for n in (0, 1, 2)] == [
        "mine\n", "written meanwhile\n", "mended by hand\n",
    ]  # fmt: skip


def test_rows_of_users_in_the_file_stay(photos, tmp_path):
    mine = {"file_name": "photos/0.png", "caption": "mine", "note": "x"}
    (tmp_path / "labels.jsonl").write_text(json.dumps(mine) + "\n")
    labels = opened(photos, tmp_path)
    assert labels.open == [1, 2, 3]
    labels.decide(1, "a cat", proposed="a cat")
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert rows[0] == mine
    assert len(rows) == 2
    with pytest.raises(UserError, match="not of the page"):
        labels.decide(0, "other", proposed="other")
    (tmp_path / "labels.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="line 1 is no JSON"):
        opened(photos, tmp_path)


def test_what_cannot_be_is_told(photos, tmp_path):
    with pytest.raises(UserError, match="empty caption"):
        opened(photos, tmp_path).decide(0, "  ", proposed="x")
    with pytest.raises(UserError, match="no files"):
        Labels(open_source("scenes:?count=3"), file=tmp_path / "l.jsonl", sidecars=True)


LABEL_ON = """
import sys
from diptych.app.decisions import Labels
from diptych.data.sources import open_source
photos, out = sys.argv[1:]
from pathlib import Path
labels = Labels(open_source(photos), file=Path(out), sidecars=True)
for round in range(10**6):
    for item in range(4):
        labels.decide(item, f"caption {round} {item}", proposed="")
        print(round, item, flush=True)
"""


def test_a_kill_loses_no_decision_that_was_confirmed(photos, tmp_path):
    file = tmp_path / "labels.jsonl"
    page = subprocess.Popen([sys.executable, "-c", LABEL_ON, str(photos), str(file)], stdout=subprocess.PIPE, text=True)
    assert page.stdout is not None
    page.stdout.readline()
    time.sleep(0.3)
    os.kill(page.pid, signal.SIGKILL)
    confirmed = {}
    for line in page.communicate()[0].splitlines():
        number, item = map(int, line.split())
        confirmed[item] = number
    assert len(confirmed) == 4
    rows = {row["file_name"]: row for row in map(json.loads, file.read_text().splitlines())}
    for item, number in confirmed.items():
        saved = rows[f"photos/{item}.png"]["caption"].split()
        assert saved[0] == "caption"
        assert int(saved[1]) in (number, number + 1)  # the one in the making may be there too
        beside = (photos / f"{item}.txt").read_text().split()
        assert int(beside[1]) in (number, number + 1)


def test_each_image_is_offered_to_one_user(itit_run, photos, tmp_path):
    labels = opened(photos, tmp_path)
    offers = Offers(labels, Diptych.from_pretrained(itit_run, device="cpu"))
    first, second = offers.take("ann"), offers.take("bob")
    assert first.item != second.item
    offers.put_back(first)
    following = offers.take("ann")
    assert following.item not in (first.item, second.item)
    labels.decide(following.item, "a dog", proposed="")
    assert offers.take("ann").item not in (second.item, following.item)
    offers.release("bob")
    left = [offers.take("eve").item, offers.take("mia").item]
    assert second.item in left
    assert offers.take("sam") is None


def test_an_unreadable_image_is_not_offered(itit_run, photos, tmp_path):
    for number in (0, 1, 2):
        (photos / f"{number}.png").write_bytes(b"nonsense")
    offers = Offers(opened(photos, tmp_path), Diptych.from_pretrained(itit_run, device="cpu"))
    assert offers.take("ann").item == 3
    assert offers.take("bob") is None
