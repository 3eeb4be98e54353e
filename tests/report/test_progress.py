import io

from diptych.report import progress
from diptych.report.progress import ProgressLine, clock


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_line_every_ten_seconds_with_the_time_that_is_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "time", time := Clock())
    advance = ProgressLine("captioning")
    for done in range(1, 31):
        time.now += 1.0
        advance(done, 30)
    assert capsys.readouterr().err == "captioning: 10 of 30, 0:00:20 left\ncaptioning: 20 of 30, 0:00:10 left\n"


def test_a_terminal_gets_one_line_that_is_gone_at_the_end(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setattr(progress, "time", time := Clock())
    advance = ProgressLine("captioning")
    time.now += 1
    advance(1, 2)
    advance(2, 2)
    assert terminal.getvalue() == "\rcaptioning: 1 of 2, 0:00:01 left\033[K\r\033[K"


def test_clock():
    assert [clock(seconds) for seconds in (0.2, 61, 3600)] == ["0:00:01", "0:01:01", "1:00:00"]
