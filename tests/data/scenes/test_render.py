import numpy as np
import pytest

from diptych.data.scenes.render import coverage, render
from diptych.data.scenes.world import COLOURS, GROUND, JITTER, SHAPES, Scene, Thing, all_scenes

AREAS = {"square": 1.72**2, "cross": 4 * 0.66 - 0.66**2, "triangle": 0.52**2 * 3**1.5, "ring": np.pi * (1 - 0.25)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("angle", [0.0, 0.2])
def test_area_and_place_hold_at_any_size_and_angle(shape, size, angle):
    cover = coverage(shape, np.array([[0.4, 0.55, 0.2, angle]], np.float32), size=size)[0]
    assert cover.sum() / size**2 == pytest.approx(AREAS[shape] * 0.2**2, rel=0.03)
    centres = (np.arange(size) + 0.5) / size
    assert (cover.sum(0) @ centres) / cover.sum() == pytest.approx(0.4, abs=0.006 if angle == 0 else 0.012)


def test_edges_match_super_sampling():
    disk = np.array([[0.47, 0.52, 0.2, 0.1]], np.float32)
    for shape in SHAPES:
        fine = coverage(shape, disk, size=512)[0].reshape(32, 16, 32, 16).mean((1, 3))
        assert np.abs(coverage(shape, disk, size=32)[0] - fine).max() < 0.35
        assert np.abs(coverage(shape, disk, size=32)[0] - fine).mean() < 0.006


def test_colours_and_places():
    scene = Scene((Thing("square", "red"), Thing("cross", "green")), ("top left", "bottom right"))
    picture = render([scene], size=64)[0]
    assert tuple(picture[0, 0]) == tuple(picture[16, 48]) == GROUND
    assert tuple(picture[16, 16]) == COLOURS["red"]
    assert tuple(picture[48, 48]) == COLOURS["green"]


def test_brightness_varies():
    scene = Scene((Thing("square", "red"),), ("top left",))
    dark = np.array([[[0, 0, 0, 0, -0.1]]], np.float32)
    assert render([scene], size=64, jitter=dark)[0, 16, 16, 0] == round(235 * 0.9)


@pytest.mark.parametrize("shape", SHAPES)
def test_things_stay_in_their_quarters(shape):
    scene = Scene((Thing(shape, "white"),), ("bottom right",))
    for signs in np.array(np.meshgrid([-1, 1], [-1, 1], [1], [-1, 1], [1])).reshape(5, -1).T:
        jitter = (np.array(JITTER) * signs).astype(np.float32)[None, None]
        picture = render([scene], size=64, jitter=jitter)[0].astype(int)
        picture[32:, 32:] = GROUND
        assert np.abs(picture - GROUND).max() <= 60  # no more than the soft edge of an outline


def test_a_batch_equals_its_rows():
    scenes = all_scenes(3)[::3001]
    moves = np.random.default_rng(0).uniform(-0.01, 0.01, (len(scenes), 3, 5)).astype(np.float32)
    batch = render(scenes, size=32, jitter=moves)
    for row, scene in enumerate(scenes):
        assert (batch[row] == render([scene], size=32, jitter=moves[row : row + 1])[0]).all()


def test_every_scene_looks_different():
    pictures = render(all_scenes(2), size=32).reshape(2400, -1)
    assert len(np.unique(pictures, axis=0)) == 2400
