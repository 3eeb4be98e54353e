import io
import re

import pytest

from diptych.train import logging as progress
from diptych.train.logging import ProgressDisplay


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
    display = ProgressDisplay("toy", start=100, steps=300, quiet=False)
    for step in range(101, 151):
        clock.now += 0.5
        display.update(step, rows=8, loss=1.23456)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "toy: step 101/300  2 steps/s  16 rows/s  loss 1.235  0:01:40 left",
        "toy: step 121/300  2 steps/s  16 rows/s  loss 1.235  0:01:30 left",
        "toy: step 141/300  2 steps/s  16 rows/s  loss 1.235  0:01:20 left",
    ]
    display.close(150, loss=1.0)
    assert capsys.readouterr().err == "toy: step 150/300  2 steps/s  16 rows/s  loss 1  0:01:15 left\n"


def test_quiet_says_only_what_must_be_known(clock, capsys):
    display = ProgressDisplay("toy", start=0, steps=300, quiet=True)
    clock.now += 100
    display.update(1, rows=8, loss=1.0)
    display.say("step 1: skipped")
    display.close(1, loss=1.0)
    assert capsys.readouterr().err == "toy: step 1: skipped\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    display = ProgressDisplay("toy", start=0, steps=300, quiet=False)
    display.say("step 1: [skipped]")
    display.close(30, loss=1.5)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "toy: step 1: [skipped]" in text
    assert re.search(r"30/300 .*loss 1\.5", text)
