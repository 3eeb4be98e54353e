"""Words broken into lines that fit."""

import pytest

from diptych.report.sheet import font, wrap

TEXT = "a small red circle to the left of a large blue square on a grey ground"


@pytest.mark.parametrize("text", [TEXT, "Donaudampfschifffahrtsgesellschaft" * 3, f"{TEXT} {'x' * 60} {TEXT}"])
def test_every_line_fits_and_no_letter_is_lost(text):
    lines = wrap(text, width=150, size=13, lines=99)
    assert all(font(13).getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_words_stay_whole_where_they_fit():
    assert " ".join(wrap(TEXT, width=150, size=13, lines=99)) == TEXT


def test_too_much_ends_in_an_ellipsis():
    lines = wrap(TEXT * 5, width=150, size=13, lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert font(13).getlength(lines[-1]) <= 150


def test_nothing_and_no_room():
    assert wrap("", width=150, size=13) == []
    assert wrap("ab", width=1, size=13) == ["a", "b"]  # ends, though nothing fits


def test_the_font_has_letters_beyond_english():
    shapes = {bytes(font(20).getmask(letter)) for letter in "éüßжα→"}
    assert len(shapes) == 6  # missing letters would all be the same box
