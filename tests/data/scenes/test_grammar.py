import pytest

from diptych.data.scenes.grammar import caption, parse, phrasings
from diptych.data.scenes.world import Scene, Thing, all_scenes

ONE = Scene((Thing("ring", "red"),), ("top left",))
THREE = Scene(
    (Thing("cross", "blue"), Thing("ring", "white"), Thing("square", "red")), ("top left", "top right", "bottom right")
)


@pytest.mark.parametrize(("level", "every"), [(1, 1), (2, 17), (3, 97)])
def test_whatever_is_said_is_read_back(level, every):
    scenes = all_scenes(level)[::every]
    told = [caption(scene, number % phrasings(level)) for number, scene in enumerate(scenes)]
    assert [parse(text) for text in told] == list(scenes)
    assert len({*told}) == len(told)
    assert max(len(text.split()) for text in told) <= 17
    assert all(text == text.lower() for text in told)


@pytest.mark.parametrize("scene", [ONE, THREE])
def test_all_phrasings_of_a_scene_differ_and_are_read_back(scene):
    told = [caption(scene, k) for k in range(phrasings(scene.level))]
    assert [parse(text) for text in told] == [scene] * len(told)
    assert len({*told}) == len(told) == (2 if scene is ONE else 8)


def test_some_captions_word_for_word():
    assert caption(ONE) == "top left a red ring"
    assert caption(ONE, 1) == "top left red ring"
    assert caption(THREE) == "top left a blue cross, top right a white ring, bottom right a red square"
    assert caption(THREE, 6) == "bottom right a red square and top right a white ring and top left a blue cross"
    assert parse("top right white ring, bottom right red square, top left blue cross") == THREE


def test_case_and_white_space_are_free():
    assert parse("  Top left a  red ring ") == ONE
    assert parse("top left blue cross , TOP right white ring, bottom right red square.") == THREE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red ring",
        "top left a red ring and more",
        "top left a mauve ring",
        "top centre a red ring",
        "top left ring red",
        "top left red ring, top left blue ring",
        "top left red ring, blue ring",
        "top left a red ring, top right blue ring",
        "top left red ring, top right red ring, bottom left red ring, bottom right red ring",
    ],
)
def test_what_is_not_in_the_language_is_not_read(text):
    assert parse(text) is None


def test_one_wrong_word_is_another_scene():
    assert parse(caption(ONE).replace("red", "blue")) == Scene((Thing("ring", "blue"),), ("top left",))
    assert parse(caption(THREE).replace("white", "green")) != THREE


@pytest.mark.parametrize("phrasing", [-1, 2])
def test_unknown_phrasing_is_refused(phrasing):
    with pytest.raises(ValueError, match="0 to 1"):
        caption(ONE, phrasing)
