import numpy as np
import pytest

from diptych.data.scenes.render import coverage, render
from diptych.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, all_scenes

AREAS = {"circle": np.pi, "square": 1.72**2, "cross": 4 * 0.7 - 0.49, "triangle": 0.6**2 * 3**1.5}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 128])
def test_area_and_place_hold_at_any_size(shape, size):
    cover = coverage(shape, np.array([[0.4, 0.55, 0.2]], np.float32), size=size)[0]
    assert cover.sum() / size**2 == pytest.approx(AREAS[shape] * 0.2**2, rel=0.03)
    centres = (np.arange(size) + 0.5) / size
    assert (cover.sum(0) @ centres) / cover.sum() == pytest.approx(0.4, abs=0.005)
    rows = np.flatnonzero((cover > 0.5).any(1))
    assert centres[rows[[0, -1]]].mean() == pytest.approx(0.55, abs=0.02)


def test_edges_match_super_sampling():
    disk = np.array([[0.47, 0.52, 0.2]], np.float32)
    for shape in SHAPES:
        fine = coverage(shape, disk, size=512)[0].reshape(32, 16, 32, 16).mean((1, 3))
        assert np.abs(coverage(shape, disk, size=32)[0] - fine).max() < 0.3
        assert np.abs(coverage(shape, disk, size=32)[0] - fine).mean() < 0.005


def test_colours_and_order():
    scene = Scene((Thing("circle", "red", "large"), Thing("square", "cyan", "small")), "above", "grey")
    picture = render([scene], size=64)[0]
    assert tuple(picture[0, 0]) == BACKGROUNDS["grey"]
    assert tuple(picture[16, 32]) == COLOURS["red"]
    assert tuple(picture[47, 32]) == COLOURS["cyan"]


def test_things_stay_inside_and_apart():
    largest = np.array([[[0.015, 0.015, 0.04]] * 2], np.float32)
    for layout in ("left of", "above"):
        scene = Scene((Thing("square", "red", "large"), Thing("square", "blue", "large")), layout, "white")
        for sign in (1, -1):
            picture = render([scene], size=64, jitter=largest * (sign, sign, 1))[0].astype(int)
            border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert (border == BACKGROUNDS["white"]).all()


def test_a_batch_equals_its_rows():
    scenes = all_scenes(2)[::997]
    moves = np.random.default_rng(0).uniform(-0.01, 0.01, (len(scenes), 2, 3)).astype(np.float32)
    batch = render(scenes, size=32, jitter=moves)
    for row, scene in enumerate(scenes):
        assert (batch[row] == render([scene], size=32, jitter=moves[row : row + 1])[0]).all()


def test_every_scene_looks_different():
    pictures = render(all_scenes(1), size=32).reshape(600, -1)
    assert len(np.unique(pictures, axis=0)) == 600
