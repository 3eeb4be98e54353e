"""Holding captions back: disjoint, complete, a pure function of its arguments."""

import numpy as np
import pytest

from diptych.data.splits import hold_back
from diptych.errors import UserError


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
    np.testing.assert_array_equal(first["pairs"], again.pairs)
    np.testing.assert_array_equal(first["images"], again.images)
    assert not np.array_equal(first["pairs"], other.pairs)


def test_is_the_same_for_ever():
    """A changed split would silently change what earlier runs held out."""
    assert hold_back(12, 4, 0).pairs.tolist() == [3, 4, 5, 6]


def test_fewer_pairs_are_among_more_pairs():
    few, many = hold_back(100, 10, 0).pairs, hold_back(100, 40, 0).pairs
    assert set(few) <= set(many)


def test_all_pairs_by_default():
    split = hold_back(7, None, 0)
    assert split.pairs.tolist() == list(range(7))
    assert len(split.images) == len(split.texts) == 0


@pytest.mark.parametrize("pairs", [0, -1, 8])
def test_impossible_numbers(pairs):
    with pytest.raises(UserError, match=f"max-pairs {pairs}: must be from 1 to 7"):
        hold_back(7, pairs, 0)
