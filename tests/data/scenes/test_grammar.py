import pytest

from diptych.data.scenes.grammar import caption, parse, phrasings
from diptych.data.scenes.world import Scene, Thing, all_scenes

ONE = Scene((Thing("circle", "red", "small"),), "top left", "white")
TWO = Scene((Thing("cross", "blue", "large"), Thing("circle", "pink", "small")), "left of", "black")


@pytest.mark.parametrize(("level", "every"), [(1, 3), (2, 97)])
def test_whatever_is_said_is_read_back(level, every):
    scenes = all_scenes(level)[::every]
    told = [caption(scene, number % phrasings(level)) for number, scene in enumerate(scenes)]
    assert [parse(text) for text in told] == list(scenes)
    assert len({*told}) == len(told)
    assert max(len(text.split()) for text in told) <= 17
    assert all(text == text.lower() for text in told)


@pytest.mark.parametrize("scene", [ONE, TWO])
def test_all_phrasings_of_a_scene_differ_and_are_read_back(scene):
    told = [caption(scene, k) for k in range(phrasings(scene.level))]
    assert [parse(text) for text in told] == [scene] * len(told)
    assert len({*told}) == len(told) == (6 if scene is ONE else 28)


def test_some_captions_word_for_word():
    assert caption(ONE) == "a small red circle in the top left on a white background"
    assert caption(ONE, 3) == "small red circle, top left, white background"
    assert parse("little red disc, upper left, plain white background") == ONE
    assert caption(TWO) == "a large blue cross to the left of a small pink circle on a black background"
    assert parse("a small pink circle to the right of a large blue cross on a black background") == TWO


def test_synonyms_mix_and_case_and_punctuation_are_free():
    assert parse("  A little red circle in the upper left on a WHITE background. ") == ONE
    assert parse("small red circle , top left , white background") == ONE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a small red circle in the top left on a white background and more",
        "a small mauve circle in the top left on a white background",
        "a small white circle in the top left on a red background",
        "a small red circle in the top centre on a white background",
        "red small circle, top left, white background",
        "a small red circle left of on a white background",
        "a small red circle in the top left on a white background " * 2,
    ],
)
def test_what_is_not_in_the_language_is_not_read(text):
    assert parse(text) is None


def test_one_wrong_word_is_another_scene():
    assert parse(caption(ONE).replace("red", "blue")) == Scene((Thing("circle", "blue", "small"),), "top left", "white")
    assert parse(caption(TWO).replace("left", "right")) != TWO


@pytest.mark.parametrize("phrasing", [-1, 6])
def test_unknown_phrasing_is_refused(phrasing):
    with pytest.raises(ValueError, match="0 to 5"):
        caption(ONE, phrasing)
