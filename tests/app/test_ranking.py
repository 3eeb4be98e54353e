"""The Audit tab: what a user says counts, is on disk at once, and is what ?keep= reads."""

import json

import pytest

from diptych.app.decisions import Ranking
from diptych.data.sources import open_source
from diptych.errors import UserError
from diptych.itit.pipeline import Diptych


@pytest.fixture
def captioned(photos):
    for number in range(3):
        (photos / f"{number}.txt").write_text(f"caption {number}")
    return photos


def kept(photos, out):
    source = open_source(f"{photos}?keep={out}/keep.jsonl")
    return {source.key(i): source.captions(i) for i in range(len(source))}


@pytest.mark.parametrize("kind", ["itit", "dual"])
def test_users_decide_and_the_decision_lasts(captioned, itit_run, dual_encoder, tmp_path, kind):
    network = Diptych.from_pretrained(itit_run, device="cpu") if kind == "itit" else dual_encoder
    ranking = Ranking(open_source(str(captioned)), out=tmp_path / "out")
    seen = []
    ranking.rank(network, worst=0.34, advance=lambda *done: seen.append(done))
    assert {what for what, *_ in seen} == {"reading captions", "comparing images"}
    assert [found.kept for found in ranking.shown] == [False, False, True]
    assert len(ranking.shown) == 3  # not the image without a caption
    assert sum(map(len, kept(captioned, tmp_path / "out").values())) == 1
    worst, _, best = ranking.shown
    ranking.decide(worst, True)
    ranking.decide(best, False)
    found = kept(captioned, tmp_path / "out")
    assert set(found) == {"0.png", "1.png", "2.png", "3.png"}  # images without captions stay
    assert found[worst.key] == [worst.caption]
    assert found[best.key] == []
    again = Ranking(open_source(str(captioned)), out=tmp_path / "out")
    again.rank(network, worst=0.0, advance=lambda *_: None)
    assert {found.key: found.kept for found in again.shown}[best.key] is False


def test_what_cannot_be_is_told(photos, captioned, tmp_path, dual_encoder):
    with pytest.raises(UserError, match="images with captions"):
        Ranking(open_source(str(captioned / "0.png").replace("0.png", "?keep=") + _bare(tmp_path)), out=tmp_path)
    (tmp_path / "audit.jsonl").write_text("[]\n")
    ranking = Ranking(open_source(str(captioned)), out=tmp_path)
    with pytest.raises(UserError, match="not what the page wrote"):
        ranking.rank(dual_encoder, worst=0.1, advance=lambda *_: None)


def _bare(folder):
    """A file that keeps one image without its caption."""
    (folder / "bare.jsonl").write_text(json.dumps({"key": "0.png", "captions": []}) + "\n")
    return str(folder / "bare.jsonl")
