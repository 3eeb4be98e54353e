"""Curves survive whatever a run has written so far."""

import json
import math
from xml.etree import ElementTree

import pytest

from diptych.report.figures import Panel, curves, points, read_metrics, running_mean

LOSS = Panel(title="Loss", keys=["loss"])


def run(steps, **scale):
    return [{"step": s, "seconds": 0.5 * s, **{k: v / (s + 1) for k, v in scale.items()}} for s in range(steps)]


def ids(svg):
    return [e.get("id", "") for e in ElementTree.fromstring(svg).iter()]


def lines(svg):
    return sum(name.startswith("line2d") for name in ids(svg))


def test_reads_what_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n\n[1]\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_points_leave_out_what_is_not_a_finite_number():
    records = [{"step": 1, "a": 2}, {"step": 2}, {"a": 3}, {"step": 3, "a": math.nan}, {"step": 4, "a": "x"}]
    records += [{"step": 5, "a": True}, {"step": 6, "a": None}, {"step": 7, "a": math.inf}, {"step": 8, "a": 0.5}]
    assert points(records, "a", "step") == ([1.0, 8.0], [2.0, 0.5])


def test_running_mean_is_the_weighted_mean_from_the_first_value_on():
    assert running_mean([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0, 4.0, 4.0])
    assert running_mean([1.0, 2.0], 0.5) == pytest.approx([1.0, (0.5 * 1 + 2) / 1.5])
    assert running_mean([1.0, 5.0], 0.0) == [1.0, 5.0]


def test_a_panel_without_numbers_is_left_out():
    images = curves({"itit": run(50, loss=3)}, panels=[LOSS, Panel(title="None", keys=["missing"])])
    assert len(images) == 1
    assert curves({}, panels=[LOSS]) == []
    assert curves({"new": []}, panels=[LOSS]) == []


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_short_and_unequal_runs(steps):
    (svg,) = curves({"a": run(steps, loss=3), "b": run(60, loss=2), "c": []}, panels=[LOSS], smooth=0.9)
    ElementTree.fromstring(svg)


def test_every_run_and_key_has_its_line():
    both = Panel(title="Both", keys=["loss/T2I", "loss/I2T"])
    single = {"loss/T2I": 2.0}
    one = lines(curves({"a": run(40, **single)}, panels=[both])[0])
    more = {"a": run(40, **single), "b": run(40, **single, **{"loss/I2T": 1.0})}
    two_runs_three_lines = curves(more, panels=[both])[0]
    # a line in the axes and one in the legend each; a lone line needs no legend
    assert lines(two_runs_three_lines) == one + 5


def test_over_seconds_and_the_same_bytes_twice():
    runs = {"a": run(40, loss=3)}
    by_step, again, by_second = (curves(runs, panels=[LOSS], over=over)[0] for over in ("step", "step", "seconds"))
    assert by_step == again != by_second


def test_ink_can_be_set_by_the_page():
    (svg,) = curves({"a": run(40, loss=3)}, panels=[LOSS])
    assert b"currentColor" in svg
    assert b"var(--rule" in svg
    assert b"#1d2129" not in svg


def test_names_are_escaped_and_dollars_are_not_mathematics():
    runs = {"<script>": run(40, loss=1), "$a_{$": run(40, loss=2)}
    (svg,) = curves(runs, panels=[Panel(title="a < b & $c", keys=["loss"])])
    ElementTree.fromstring(svg)
    assert b"<script" not in svg


def test_json_round_trip_of_a_typical_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in run(3, loss=1)))
    assert points(read_metrics(path), "loss", "seconds") == ([0.0, 0.5, 1.0], [1.0, 0.5, pytest.approx(1 / 3)])
