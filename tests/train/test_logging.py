import io
import json
import re
import resource

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diptych.errors import UserError
from diptych.train import logging as progress
from diptych.train.logging import MetricsLogger, ProgressDisplay, truncate


def test_truncation_keeps_whole_lines_up_to_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 2, "score": 3.0}, {"step": 3, "loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1, "lo')
    assert truncate(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:3]
    assert not truncate(path, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:1]
    assert not truncate(tmp_path / "none", 1)


def test_numbers_that_json_lacks_become_null(tmp_path):
    log = MetricsLogger(tmp_path, start=0, tensorboard=False, every=1)
    log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "skipped": True, "score": np.float32(0.5)})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "skipped": True,
        "score": 0.5,
    }


def test_tensorboard_gets_thinned_curves_and_every_evaluation(tmp_path):
    log = MetricsLogger(tmp_path, start=0, tensorboard=True, every=5)
    for step in range(1, 11):
        log.write(step, {"loss": 1.0 / step})
    log.write(7, {"score": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (5, pytest.approx(0.2)),
        (10, pytest.approx(0.1)),
    ]
    assert [event.step for event in events.Scalars("score")] == [7]


def test_images_go_to_tensorboard_alone(tmp_path):
    image = Image.new("RGBA", (3, 2), (255, 0, 0, 255))
    log = MetricsLogger(tmp_path, start=0, tensorboard=True, every=5)
    log.write(3, {"score": 0.5, "sheet": image})
    log.close()
    assert log.path.read_text() == '{"step": 3, "score": 0.5}\n'
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Images("sheet")
    shown = Image.open(io.BytesIO(event.encoded_image_string))
    assert (event.step, shown.size, shown.getpixel((2, 1))) == (3, (3, 2), (255, 0, 0))


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written"):
        MetricsLogger(tmp_path / "file", start=0, tensorboard=False, every=1)


def test_a_full_disk_is_one_line(tmp_path):
    """The system refuses files over 4 KB, as a full disk would; closing then adds no error of its own."""
    log = MetricsLogger(tmp_path, start=0, tensorboard=False, every=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        log.write(1, {"text": "x" * 5000})
        with pytest.raises(UserError, match=r"metrics\.jsonl could not be written"):
            log.flush()
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_at_once_and_every_ten_seconds_with_the_rates_of_this_invocation(clock, capsys):
    display = ProgressDisplay("toy", start=100, quiet=False)
    for step in range(101, 151):
        clock.now += 0.5
        display.update(step, 300, rows=8, loss=1.23456, left=((300 - step) / 2, 840.0))
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "toy: step 101/300  2 steps/s  16 rows/s  loss 1.235  0:01:40 left  all: 14 min left",
        "toy: step 121/300  2 steps/s  16 rows/s  loss 1.235  0:01:30 left  all: 14 min left",
        "toy: step 141/300  2 steps/s  16 rows/s  loss 1.235  0:01:20 left  all: 14 min left",
    ]
    display.close(150, 300, loss=1.0, left=(75.0, None))
    assert capsys.readouterr().err == "toy: step 150/300  2 steps/s  16 rows/s  loss 1  0:01:15 left\n"


def test_the_epoch_is_shown_where_it_is_known(clock, capsys):
    display = ProgressDisplay("toy", start=0, quiet=False, epoch_steps=40.0)
    clock.now += 1
    display.update(10, 300, rows=8, loss=1.0)
    assert capsys.readouterr().err == "toy: step 10/300  epoch 0.25  10 steps/s  8 rows/s  loss 1\n"


def test_quiet_says_only_what_must_be_known(clock, capsys):
    display = ProgressDisplay("toy", start=0, quiet=True)
    clock.now += 100
    display.update(1, 300, rows=8, loss=1.0)
    display.say("step 1: skipped")
    display.close(1, 300, loss=1.0)
    assert capsys.readouterr().err == "toy: step 1: skipped\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    display = ProgressDisplay("toy", start=0, quiet=False)
    display.say("step 1: [skipped]")
    display.close(30, 300, loss=1.5)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "toy: step 1: [skipped]" in text
    assert re.search(r"30/300 .*loss 1\.5", text)
