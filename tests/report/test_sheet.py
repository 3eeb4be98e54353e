"""Contact sheets hold the images unharmed and in order, and words are broken into lines that fit."""

import numpy as np
import pytest
from PIL import Image

from diptych.report import sheet
from diptych.report.sheet import Cell, font, wrap

# Sheets


RED, GREEN, BLUE = (200, 10, 20), (10, 200, 20), (10, 20, 200)


def plain(colour, size=32):
    return np.full((size, size, 3), colour, np.uint8)


def centre(image, colour):
    """(x, y) of the middle of a colour's pixels."""
    found = np.argwhere((np.asarray(image) == colour).all(-1))
    assert len(found), f"{colour} is not in the image"
    return found.mean(0)[::-1]


def test_small_images_grow_by_whole_factors_without_new_colours():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    scaled = np.asarray(sheet.scale(picture, side=170))
    assert np.array_equal(scaled, picture.repeat(5, 0).repeat(5, 1))


def test_large_images_shrink_and_keep_their_shape():
    assert sheet.scale(np.zeros((400, 800, 3), np.uint8), side=160).size == (160, 80)


def test_contact_sheet_is_in_reading_order():
    image = sheet.contact_sheet([plain(RED), plain(GREEN), plain(BLUE)], columns=2)
    (red_x, red_y), (green_x, green_y), (blue_x, blue_y) = (centre(image, c) for c in (RED, GREEN, BLUE))
    assert red_y == green_y < blue_y
    assert red_x == blue_x < green_x


def test_captions_and_title_make_room_for_themselves():
    bare = sheet.contact_sheet([plain(RED)])
    assert sheet.contact_sheet([plain(RED)], captions=["a red square"]).height > bare.height
    short, long = (sheet.contact_sheet([plain(RED)], captions=["a red square " * n]).height for n in (1, 5))
    assert long > short
    assert sheet.contact_sheet([plain(RED)], title="Red").height > bare.height


def test_captions_must_match_the_images():
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        sheet.contact_sheet([plain(RED), plain(RED)], captions=["one"])


def test_no_images_is_an_empty_sheet():
    assert sheet.contact_sheet([], title="Nothing").size[0] > 0


def test_comparison_has_a_row_per_model_beside_its_label():
    rows = {"truth": [Cell(image=plain(RED)), Cell(image=plain(GREEN))], "ITIT": [Cell(image=plain(BLUE))]}
    image = sheet.comparison(rows, headings=["a red square", "a green square"])
    assert centre(image, RED)[1] == centre(image, GREEN)[1] < centre(image, BLUE)[1]
    assert centre(image, RED)[0] == centre(image, BLUE)[0]
    beside = np.asarray(image)[:, : sheet.MARGIN + sheet.LABEL_WIDTH]
    assert (beside < 128).any(), "no label beside the rows"


def test_cycle_strip_wraps_and_shows_texts_and_images():
    image = sheet.cycle_strip(["a red square", plain(RED), "a green square", plain(GREEN)], columns=2)
    assert centre(image, RED)[0] == centre(image, GREEN)[0]
    assert centre(image, RED)[1] < centre(image, GREEN)[1]
    one_row = sheet.cycle_strip(["a red square", plain(RED), "a green square", plain(GREEN)])
    assert one_row.width > image.width
    assert one_row.height < image.height


def test_pixels_are_the_same_when_read_back_from_a_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    read = np.asarray(Image.open(sheet.save_png(tmp_path / "one.png", pixels)))
    assert np.array_equal(read, pixels)


# Lettering


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
