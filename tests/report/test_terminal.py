import io
import re

import pytest

from diptych.report import terminal
from diptych.report.terminal import ProgressLine, WholeBar, clock, meaning_of, print_metrics


@pytest.mark.parametrize(
    ("name", "better", "value", "written"),
    [
        ("cider", "higher", 32.123, "32.12"),
        ("bleu_4", "higher", 0.0712, "7.1 %"),
        ("most_common_share", "lower", 1.0, "100.0 %"),
        ("frechet/random-conv-0", "lower", 528.08, "528.1"),
        ("caption_information_gain", "higher", 0.25, "0.25 nats"),
        ("caption_shape_1", "higher", 0.5, "50.0 %"),
        ("image_accuracy", "higher", 0.97, "97.0 %"),
        ("valid/cider", "higher", 3.0, "3"),
        ("retrieval/image_to_text/r10", "higher", 0.141, "14.1 %"),
        ("valid/mean_r1", "higher", 0.025, "2.5 %"),
        ("retrieval/text_to_image/median_rank", "lower", 12.0, "12"),
        ("modality/accuracy", "lower", 0.99, "99.0 %"),
        ("zero_shot_one_prompt/top5", "higher", 0.3, "30.0 %"),
        ("psnr", "higher", 20.7, "20.7 dB"),
        ("images", "", 1000, "1,000"),
        ("linear_probe/l2", "", 0.01, "0.01"),
    ],
)
def test_direction_and_unit(name, better, value, written):
    meaning = meaning_of(name)
    assert (meaning.better, meaning.written(value)) == (better, written)


def test_a_table_under_a_title_that_stays_whole(capsys):
    title = "runs/clip on " + "/very/long" * 30 + "?split=[test]"
    print_metrics({"recall": 0.123456, "images": 1000}, title=title, notes=["it was [dark]"])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == title
    assert "0.1235" in out
    assert "1,000" in out
    assert out.splitlines()[-1] == "Note: it was [dark]"


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_line_every_ten_seconds_with_the_time_that_is_left(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "time", time := Clock())
    advance = ProgressLine("captioning")
    for done in range(1, 31):
        time.now += 1.0
        advance(done, 30)
    assert capsys.readouterr().err == "captioning: 10 of 30, 0:00:20 left\ncaptioning: 20 of 30, 0:00:10 left\n"


def test_a_terminal_gets_one_line_that_is_gone_at_the_end(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", screen := Terminal())
    monkeypatch.setattr(terminal, "time", time := Clock())
    advance = ProgressLine("captioning")
    time.now += 1
    advance(1, 2)
    advance(2, 2)
    assert screen.getvalue() == "\rcaptioning: 1 of 2, 0:00:01 left\033[K\r\033[K"


def test_the_bar_of_a_command_is_plain_lines_in_a_pipe(monkeypatch, capsys):
    """A line for each part and every thirty seconds; a part that says nothing is counted down, what follows it not."""
    monkeypatch.setattr(terminal, "time", time := Clock())
    with WholeBar(100.0) as bar:
        bar.show("encoding", left=10.0, later=90.0)
        time.now += 25
        assert bar.left == 90
        bar.show("ITIT", left=60.0, later=15.0)
        for _ in range(6):
            time.now += 10
            bar.show("ITIT", left=bar.left - 15.0, later=15.0)
        time.now += 20
        bar.show("report", left=0.0, later=0.0)
        assert bar.share == 0.99  # it is not over
    assert bar.share == 1
    assert capsys.readouterr() == (
        "",
        "  0%  2 min left in all: encoding\n"
        " 25%  75 s left in all: ITIT\n"
        " 55%  45 s left in all: ITIT\n"
        " 85%  15 s left in all: ITIT\n"
        " 99%  0 s left in all: report\n"
        "100%  done\n",
    )


def test_the_bar_of_a_command_is_one_line_in_a_terminal_below_what_is_printed(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stderr", screen := Terminal())
    monkeypatch.setattr("sys.stdout", screen)
    with WholeBar(100.0) as bar:
        bar.show("ITIT", left=60.0, later=15.0)
        print("a line of a [part]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    assert "a line of a [part]" in lines
    assert any(line.endswith(" 0% 75 s left in all: ITIT") for line in lines)
    assert lines[-1].endswith("100% done")
    assert max(map(len, lines)) <= 80


def test_a_bar_that_an_error_ends_is_not_full(capsys):
    with pytest.raises(ValueError, match="no"), WholeBar(100.0) as bar:
        raise ValueError("no")
    assert bar.share < 1
    assert capsys.readouterr().err == ""


def test_clock():
    assert [clock(seconds) for seconds in (0.2, 61, 3600)] == ["0:00:01", "0:01:01", "1:00:00"]
