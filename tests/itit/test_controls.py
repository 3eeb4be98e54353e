import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from diptych.data.scenes import ScenesSource
from diptych.errors import UserError
from diptych.itit import controls
from diptych.itit.controls import regression_on_pixels, seconds_trained
from diptych.itit.data import DataConfig
from diptych.itit.recipes import itit_tiny

RUN = replace(itit_tiny(), data=DataConfig(pairs="scenes:?level=1&count=200", max_pairs=100))


def test_pairs_only_leaves_out_all_that_is_unpaired():
    alone = RUN.pairs_only()
    assert (alone.objective.texts, alone.objective.images) == ("off", "off")
    assert (alone.objective.weights.t2t, alone.objective.weights.unpaired_i2i) == (0, 0)


def test_regression_reads_pixels_and_learns_from_the_pairs_alone():
    test = ScenesSource(level=1, split="test", seed=1, count=60)
    found = regression_on_pixels(RUN, test)
    assert found.exact > 0.15  # by chance: 1 of 80
    assert found.readable == 1
    fewer = regression_on_pixels(replace(RUN, data=replace(RUN.data, max_pairs=10)), test)
    assert fewer.exact < found.exact


def test_seconds_of_a_run(tmp_path):
    assert seconds_trained(tmp_path) == 0
    lines = [{"step": 1, "loss": 2.0, "seconds": 3.5}, {"step": 2, "loss": 2.0, "seconds": 5.0}, {"step": 2, "x": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert seconds_trained(tmp_path) == 5.0


def test_a_control_that_stopped_early_is_not_waited_for(tmp_path, monkeypatch):
    dead = SimpleNamespace(start=lambda: None, is_alive=lambda: False, terminate=lambda: None, join=lambda: None)
    monkeypatch.setattr(controls.multiprocessing, "get_context", lambda kind: SimpleNamespace(Process=lambda **_: dead))
    with (
        pytest.raises(UserError, match="paired_only: the control stopped early"),
        controls.controls_beside(RUN, tmp_path, ScenesSource(level=1, split="test"), waiting=print) as finished,
    ):
        finished("paired_only")
