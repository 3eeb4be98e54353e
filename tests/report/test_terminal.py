import io

import pytest

from diptych.report import terminal
from diptych.report.terminal import ProgressLine, clock, meaning_of, print_metrics


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


def test_clock():
    assert [clock(seconds) for seconds in (0.2, 61, 3600)] == ["0:00:01", "0:01:01", "1:00:00"]
