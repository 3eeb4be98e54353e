from collections import Counter

import numpy as np
import pytest

from diptych.data.scenes.world import JITTER, Scene, Thing, all_scenes, jitter, scene, scenes


@pytest.mark.parametrize(("level", "total"), [(1, 80), (2, 2400), (3, 32_000)])
def test_split_is_a_fifth_and_shares_nothing(level, total):
    train, test = all_scenes(level, "train"), all_scenes(level, "test")
    assert len(train) + len(test) == total == len(set(train) | set(test))
    assert len(test) / total == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_training_shows_every_value_about_as_often_as_the_whole(level):
    every = {1: 1, 2: 7, 3: 97}[level]
    held = {*all_scenes(level, "test")}
    chosen = all_scenes(level)[::every]
    whole, train = (
        Counter(item for found in chosen if all_of or found not in held for item in found.attributes().items())
        for all_of in (True, False)
    )
    assert whole.keys() == train.keys()
    for value, count in whole.items():
        assert train[value] / count == pytest.approx(0.8, abs=0.12), value


@pytest.mark.parametrize("level", [1, 2])
def test_all_attributes_but_one_are_met_in_training(level):
    def seen(split, without):
        return {tuple(v for n, v in s.attributes().items() if n != without) for s in all_scenes(level, split)}

    for name in all_scenes(level)[0].attributes():
        if not name.startswith("place"):  # places depend on each other
            assert seen("test", name) <= seen("train", name)


def test_training_on_36000_pictures_meets_a_scene_once_or_twice():
    counts = Counter(scenes(np.arange(36_000), split="train", level=3, seed=0))
    assert len(counts) > 19_000
    assert np.mean([*counts.values()]) < 2


def test_things_are_told_apart_by_their_quarters_in_the_order_of_reading():
    for found in all_scenes(3)[::501]:
        assert len({*found.places}) == 3
        assert list(found.places) == [
            p for p in ("top left", "top right", "bottom left", "bottom right") if p in found.places
        ]


def test_scene_is_a_pure_function_of_its_index():
    batch = scenes(np.arange(50), split="train", level=2, seed=3)
    assert batch == [scene(i, split="train", level=2, seed=3) for i in range(50)]
    assert batch != scenes(np.arange(50), split="train", level=2, seed=4)
    assert len({*batch}) > 40
    # Pinned: a run must find the same world after an update.
    assert scene(7) == Scene((Thing("cross", "white"),), ("top right",))


def test_indices_cover_the_world_evenly():
    counts = Counter(scenes(np.arange(1_600), split="test", level=1, seed=0))
    assert len(counts) == 16
    assert min(counts.values()) > 60
    assert max(counts.values()) < 140


def test_jitter_fills_its_bounds_and_is_not_shared():
    moves = jitter(np.arange(4000), split="train", level=2, seed=0)
    assert moves.shape == (4000, 2, 5)
    assert np.abs(moves).max((0, 1)) == pytest.approx(JITTER, rel=0.01)
    assert np.abs(moves.mean((0, 1)) / JITTER).max() < 0.05
    assert np.abs(np.corrcoef(moves.reshape(4000, 10).T) - np.eye(10)).max() < 0.08


def test_unknown_level_or_split_is_refused():
    with pytest.raises(Exception, match="valid"):  # under pytest the type check speaks first
        all_scenes(1, "valid")
