import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from diptych.data.scenes import GROUND, Scene, ScenesSource, Thing, caption, render
from diptych.eval.scenes import caption_accuracy, image_accuracy, recognize

ONE = Scene((Thing("ring", "red"),), ("top left",))


def worn(pixels):
    """Blurred, noisy and through JPEG."""
    noise = np.random.default_rng(0).normal(0, 8, pixels.shape)
    rough = (gaussian_filter(pixels.astype(np.float32), (0, 0.7, 0.7, 0)) + noise).clip(0, 255).astype(np.uint8)
    files = [io.BytesIO() for _ in rough]
    for picture, file in zip(rough, files, strict=True):
        Image.fromarray(picture).save(file, "JPEG", quality=75)
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("size", [32, 48])
def test_reads_what_was_drawn(level, size):
    source = ScenesSource(level=level, split="test")
    pixels, scenes = source.images(range(300), size), source.scenes(range(300))
    assert image_accuracy(pixels, scenes).exact >= 0.995
    assert image_accuracy(worn(pixels), scenes).exact >= 0.99


@pytest.mark.parametrize("level", [1, 2, 3])
def test_reads_nothing_where_nothing_is(level):
    random = np.random.default_rng(0)
    plain = np.full((1, 32, 32, 3), GROUND, np.uint8)
    flat = np.tile(random.integers(0, 256, (200, 1, 1, 3), dtype=np.uint8), (1, 32, 32, 1))
    noise = random.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    clouds = gaussian_filter(random.normal(128, 400, (100, 32, 32, 3)), (0, 3, 3, 0)).clip(0, 255).astype(np.uint8)
    for pictures in (plain, worn(plain), flat, noise, clouds):
        assert recognize(pictures, level=level) == [None] * len(pictures)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_scenes_of_the_other_level_are_not_read(level):
    for other in {1, 2, 3} - {level}:
        pixels = ScenesSource(level=other).images(range(100), 32)
        assert recognize(pixels, level=level) == [None] * 100


def test_a_spoiled_picture_is_not_read():
    pixels = ScenesSource(level=3).images(range(100), 32)
    spoiled = pixels.copy()
    spoiled[:, ::2] = (140, 40, 170)
    assert recognize(spoiled, level=3) == [None] * 100
    torn = np.roll(pixels, 8, axis=1)
    assert sum(found is not None for found in recognize(torn, level=3)) <= 2


def test_every_wrong_attribute_is_counted_and_only_that_one():
    wrong = {
        "shape": Scene((Thing("square", "red"),), ("top left",)),
        "colour": Scene((Thing("ring", "green"),), ("top left",)),
        "place": Scene((Thing("ring", "red"),), ("bottom left",)),
    }
    for name, scene in wrong.items():
        for score in (
            image_accuracy(render([scene, ONE], size=32), [ONE, ONE]),
            caption_accuracy([caption(scene), caption(ONE, 1)], [ONE, ONE]),
        ):
            assert score.exact == 0.5
            assert score.readable == 1
            assert score.attributes == {other: 0.5 if other == name else 1.0 for other in ONE.attributes()}


def test_swapped_things_are_wrong():
    things, places = (Thing("ring", "red"), Thing("square", "blue")), ("top left", "bottom left")
    scene, swapped = (Scene(order, places) for order in (things, things[::-1]))
    assert image_accuracy(render([scene], size=32), [swapped]).exact == 0
    assert caption_accuracy([caption(scene)], [swapped]).exact == 0
    assert caption_accuracy([caption(scene, 7)], [scene]).exact == 1


def test_what_cannot_be_read_is_wrong_in_everything():
    score = caption_accuracy(["a dog"], [ONE])
    assert (score.exact, score.readable, set(score.attributes.values())) == (0, 0, {0.0})
    score = image_accuracy(np.zeros((1, 32, 32, 3), np.uint8), [ONE])
    assert (score.exact, score.readable, set(score.attributes.values())) == (0, 0, {0.0})


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="2 readings for 1 scenes"):
        caption_accuracy(["a", "b"], [ONE])
    with pytest.raises(ValueError, match="at least one"):
        caption_accuracy([], [])
    with pytest.raises(ValueError, match="at least one"):
        image_accuracy(np.zeros((0, 32, 32, 3), np.uint8), [])
