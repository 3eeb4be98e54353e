"""Splits: disjoint, complete, pure functions of their arguments."""

from dataclasses import dataclass

import numpy as np
import pytest

from diptych.data.splits import Labelled, draw_episode, given_episodes, hold_back, hold_out
from diptych.errors import UserError

LABELS = np.repeat([0, 1, 2], [9, 12, 8])


@pytest.mark.parametrize("rest", ["split", "images", "texts", "unused"])
@pytest.mark.parametrize(("count", "pairs"), [(1, 1), (10, 3), (101, 50), (6000, 600)])
def test_no_item_is_used_twice(count, pairs, rest):
    split = hold_back(count, pairs, 0, rest=rest)
    used = np.concatenate([split.pairs, split.images, split.texts])
    assert len(set(used.tolist())) == len(used)
    assert len(split.pairs) == pairs
    others = count - pairs
    assert (len(split.images), len(split.texts)) == {
        "split": (others - others // 2, others // 2),
        "images": (others, 0),
        "texts": (0, others),
        "unused": (0, 0),
    }[rest]
    for part in (split.pairs, split.images, split.texts):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


def test_depends_on_the_seed_and_on_nothing_else():
    np.random.seed(1)
    first = hold_back(100, 20, 5)
    np.random.seed(2)
    again, other = hold_back(100, 20, 5), hold_back(100, 20, 6)
    np.testing.assert_array_equal(first.pairs, again.pairs)
    np.testing.assert_array_equal(first.images, again.images)
    assert not np.array_equal(first.pairs, other.pairs)


def test_is_the_same_for_ever():
    """A changed split would silently change what earlier runs held out."""
    assert hold_back(12, 4, 0).pairs.tolist() == [3, 4, 5, 6]


def test_fewer_pairs_are_among_more_pairs():
    few, many = hold_back(100, 10, 0).pairs, hold_back(100, 40, 0).pairs
    assert set(few) <= set(many)


def test_all_pairs_by_default():
    split = hold_back(7, None, 0)
    assert split.pairs == range(7)
    assert len(split.images) == len(split.texts) == 0


@pytest.mark.parametrize("pairs", [0, -1, 8])
def test_impossible_numbers(pairs):
    with pytest.raises(UserError, match=f"max-pairs {pairs}: must be from 1 to 7"):
        hold_back(7, pairs, 0)


@dataclass
class Labels:
    """A source that knows labels and nothing else."""

    labels: tuple
    name = "photos"
    has_images = has_captions = False

    def captions(self, i): ...

    def image(self, i, size): ...

    def __len__(self):
        return len(self.labels)

    def key(self, i):
        return f"image{i}"

    def label(self, i):
        return self.labels[i]


def test_classes_are_sorted_or_given():
    found = Labelled.of(Labels(("dog", "cat", "dog")))
    assert (found.classes, found.labels_N.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert Labelled.of(Labels(("dog",)), ("dog", "cat")).labels_N.tolist() == [0]
    with pytest.raises(UserError, match="'cow' is none of the 2"):
        Labelled.of(Labels(("cow",)), ("dog", "cat"))
    with pytest.raises(UserError, match="1 of 2 items have no label, such as image1; label them in a column"):
        Labelled.of(Labels(("dog", None)))


@pytest.mark.parametrize("shots", [1, 2, 4])
def test_an_episode_has_so_many_of_each_class_and_keeps_some_to_select_on(shots):
    episode = draw_episode(LABELS, shots, seed=0)
    assert np.bincount(LABELS[episode.train]).tolist() == [shots] * 3
    assert np.bincount(LABELS[episode.valid]).tolist() == [min(4, shots)] * 3
    assert not set(episode.train) & set(episode.valid)
    assert np.array_equal(episode.train, draw_episode(LABELS, shots, seed=0).train)
    assert not np.array_equal(episode.train, draw_episode(LABELS, shots, seed=1).train)
    assert set(draw_episode(LABELS, 1, seed=0).train) <= set(episode.train)


def test_too_few_images_are_told():
    with pytest.raises(UserError, match="need 9 images of each class; class 2 has 8"):
        draw_episode(LABELS, 5, seed=0)
    with pytest.raises(UserError, match="the class 'cat' has one image only"):
        hold_out(np.array([0, 1, 1]), 0.1, seed=0, classes=("cat", "dog"))
    with pytest.raises(UserError, match="between 0 and 1"):
        hold_out(LABELS, 1.0, seed=0)


def test_a_share_of_every_class_is_held_out():
    episode = hold_out(LABELS, 0.25, seed=0)
    assert np.bincount(LABELS[episode.valid]).tolist() == [2, 3, 2]
    assert sorted([*episode.train, *episode.valid]) == list(range(len(LABELS)))


def test_given_indices_are_found_by_file():
    meta = {"fewshot": {"shot_2-seed_3": {"train": ["a/1.jpg", "b/2.jpg"], "val": ["c.d/3.jpg"]}}}
    episode = given_episodes(meta, ["c.d/3", "b/2.jpg", "a/1"])[2, 3]
    assert (episode.train.tolist(), episode.valid.tolist()) == ([2, 1], [0])
    with pytest.raises(UserError, match="a/1"):
        given_episodes(meta, ["b/2"])
