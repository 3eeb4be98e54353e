"""Contact sheets: the pictures are in them, unharmed and in order."""

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.report import sheet
from diptych.report.sheet import Cell

RED, GREEN, BLUE = (200, 10, 20), (10, 200, 20), (10, 20, 200)


def plain(colour, size=32):
    return np.full((size, size, 3), colour, np.uint8)


def centre(image, colour):
    """(x, y) of the middle of a colour's pixels."""
    found = np.argwhere((np.asarray(image) == colour).all(-1))
    assert len(found), f"{colour} is not in the picture"
    return found.mean(0)[::-1]


def test_small_pictures_grow_by_whole_factors_without_new_colours():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    scaled = np.asarray(sheet.scale(picture, side=170))
    assert np.array_equal(scaled, picture.repeat(5, 0).repeat(5, 1))


def test_large_pictures_shrink_and_keep_their_shape():
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


def test_captions_must_match_the_pictures():
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        sheet.contact_sheet([plain(RED), plain(RED)], captions=["one"])


def test_no_pictures_is_an_empty_sheet():
    assert sheet.contact_sheet([], title="Nothing").size[0] > 0


def test_comparison_has_a_row_per_model_beside_its_label():
    rows = {"truth": [Cell(picture=plain(RED)), Cell(picture=plain(GREEN))], "ITIT": [Cell(picture=plain(BLUE))]}
    image = sheet.comparison(rows, headings=["a red square", "a green square"])
    assert centre(image, RED)[1] == centre(image, GREEN)[1] < centre(image, BLUE)[1]
    assert centre(image, RED)[0] == centre(image, BLUE)[0]
    beside = np.asarray(image)[:, : sheet.MARGIN + sheet.LABEL_WIDTH]
    assert (beside < 128).any(), "no label beside the rows"


def test_cycle_strip_wraps_and_shows_texts_and_pictures():
    image = sheet.cycle_strip(["a red square", plain(RED), "a green square", plain(GREEN)], columns=2)
    assert centre(image, RED)[0] == centre(image, GREEN)[0]
    assert centre(image, RED)[1] < centre(image, GREEN)[1]
    one_row = sheet.cycle_strip(["a red square", plain(RED), "a green square", plain(GREEN)])
    assert one_row.width > image.width
    assert one_row.height < image.height


def test_from_pixels_and_back_through_a_file(tmp_path):
    pixels = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = sheet.from_pixels(pixels)
    assert pictures[1].shape == (8, 6, 3)
    read = np.asarray(Image.open(sheet.save_png(tmp_path / "one.png", pictures[1])))
    assert np.array_equal(read, pixels[1].permute(1, 2, 0).numpy())
