"""Confidence: a map that never falls from scores to what captions are worth, and how it is measured."""

import json

import numpy as np
import pytest
from PIL import Image

from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.errors import UserError
from diptych.itit import confidence
from diptych.itit.confidence import Confidence, calibrate, calibration_error, isotonic, made_by, qualities, reliability
from diptych.itit.pipeline import Caption, Diptych


def test_isotonic_is_the_best_fit_that_never_falls():
    """Against an independent solver: the max-min formula of isotonic regression."""
    rng = np.random.default_rng(0)
    score, quality = np.sort(rng.normal(size=40)), rng.integers(0, 2, 40).astype(float)
    order = rng.permutation(40)
    knots, values = isotonic(score[order], quality[order], group=1)
    expected = [max(min(quality[a : b + 1].mean() for b in range(k, 40)) for a in range(k + 1)) for k in range(40)]
    np.testing.assert_allclose(values, expected)
    np.testing.assert_allclose(knots, score)


def test_a_group_is_one_point_so_that_no_single_caption_makes_a_certainty():
    score, quality = np.arange(60.0), np.r_[np.zeros(59), 1.0]
    _, values = isotonic(score, quality, group=15)
    assert len(values) == 4
    assert values.max() == pytest.approx(1 / 15)


def test_the_error_of_predictions_that_are_right_in_the_mean_is_that_of_chance():
    rng = np.random.default_rng(1)
    predicted = rng.uniform(size=20_000)
    found = (rng.uniform(size=20_000) < predicted).astype(float)
    right = reliability(predicted, found, order_N=predicted)
    assert [each.count for each in right] == [2000] * 10
    assert calibration_error(right) < 0.015
    wrong = reliability(np.minimum(1, predicted + 0.2), found, order_N=predicted)
    assert calibration_error(wrong) == pytest.approx(0.18, abs=0.02)


class Scored(Diptych):
    """A run whose caption of a scene is right with a probability that its score tells, in a way of its own."""

    def caption_encoded(self, images, *, beams=None, advance=None):
        rng = np.random.default_rng(self.calls)
        self.calls += 1
        made = []
        for texts in self.queue[: len(images)]:
            chance = rng.uniform()
            made.append(Caption(text=texts if rng.uniform() < chance else "a red ring", score=-8 + 3 * chance**2))
        self.queue = self.queue[len(images) :]
        return made


def test_probabilities_are_found_from_scores(save_itit_run, tmp_path):
    source = ScenesSource(level=2, count=1200)
    diptych = Diptych.from_pretrained(save_itit_run(tmp_path / "run", steps=2), device="cpu")
    diptych.__class__ = Scored
    diptych.calls = 0
    diptych.queue = [source.captions(int(n))[0] for n in np.random.default_rng(0).permutation(1200)]
    found = calibrate(diptych, source)
    assert (found.confidence.measure, found.fitted, found.captions) == ("exact", 600, 600)
    for chance in (0.2, 0.5, 0.8):
        assert found.confidence(-8 + 3 * chance**2) == pytest.approx(chance, abs=0.12)
    assert found.error < 2 * found.chance + 0.02
    assert found.raw_error > 5 * found.error  # what is said of a token is nothing about the caption
    surer, other = found.halves
    assert surer - other > 0.35
    settings = made_by(diptych, beams=None)
    folder = found.save(tmp_path)
    assert Confidence.of(tmp_path, settings) == found.confidence
    assert Confidence.of(tmp_path, settings | {"beams": 7}) is None
    assert Confidence.of(tmp_path / "other", settings) is None
    assert (folder / "reliability.svg").read_bytes().startswith(b"<?xml")
    told = json.loads((folder / "confidence.json").read_text())
    assert sum(each["count"] for each in told["bins"]) == 600
    (folder / "confidence.json").write_text('{"map": {"measure": "exact"}}')
    with pytest.raises(UserError, match="not what --calibrate wrote"):
        Confidence.of(tmp_path, settings)


def table(tmp_path, *, people: int):
    rows = ["image,caption"]
    for n in range(3):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / f"{n}.png")
        rows += [f"{n}.png,{text}" for text in TEXTS[n][:people]]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    return open_source(str(tmp_path / "t.csv"))


TEXTS = [
    ["a brown dog runs over the grass", "a dog runs over the green grass", "an animal outside"],
    ["two men play the guitar on a stage", "two men with a guitar on a stage", "a concert"],
    ["a boat lies at the shore of a lake", "a boat at the shore of the lake", "blue water"],
]


def test_a_caption_of_photos_is_compared_with_people(tmp_path):
    good = ["a dog runs over the grass", "two men play a guitar on a stage", "a boat at the shore of a lake"]
    measure, quality = qualities(table(tmp_path, people=3), range(3), good)
    assert measure == "as good"
    assert (quality >= 2 / 3).all()
    _, quality = qualities(table(tmp_path, people=3), range(3), ["x y z"] * 3)
    assert (quality < 0.5).all()


def test_one_caption_an_image_is_compared_by_overlap(tmp_path):
    measure, quality = qualities(table(tmp_path, people=1), range(3), [TEXTS[0][0], "two men", "zebra"])
    assert measure == "overlap"
    assert quality[0] == pytest.approx(1)
    assert 0 < quality[1] < 1
    assert quality[2] == 0


def test_what_cannot_be_calibrated(save_itit_run, tmp_path, monkeypatch):
    diptych = Diptych.from_pretrained(save_itit_run(tmp_path / "run", steps=2), device="cpu")
    with pytest.raises(UserError, match="a confidence needs 100"):
        calibrate(diptych, ScenesSource(count=20))
    with pytest.raises(UserError, match="one beam gives no score"):
        calibrate(diptych, ScenesSource(count=200), beams=1)
    assert made_by(diptych, beams=None, candidates=4)["beams"] == 4
    half = Diptych.from_pretrained(tmp_path / "run", device="cpu", visible=0.5)
    assert made_by(half, beams=None) == made_by(diptych, beams=None) | {"visible": 0.5}
    monkeypatch.setattr(confidence, "FEWEST", 10)
    assert calibrate(diptych, ScenesSource(count=40)).captions == 20
