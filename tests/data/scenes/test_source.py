import numpy as np
import pytest

from diptych.data.scenes import ScenesSource, parse
from diptych.data.scenes.grammar import phrasings
from diptych.errors import UserError


@pytest.mark.parametrize("level", [1, 2, 3])
def test_rows_agree_with_each_other(level):
    source = ScenesSource(level=level, captions_each=3)
    pictures = source.images(range(20), 32)
    assert pictures.shape == (20, 32, 32, 3)
    assert pictures.dtype == np.uint8
    for i in range(20):
        assert (source.image(i, 32) == pictures[i]).all()
        assert len({*source.captions(i)}) == min(3, phrasings(level))
        assert {parse(text) for text in source.captions(i)} == {source.scene(i)}
        assert source.label(i) == (source.scene(i).things[0].shape if level == 1 else None)
    assert len({source.key(i) for i in range(20)}) == 20


def test_another_seed_or_split_is_another_world_and_the_same_is_the_same():
    base, again = ScenesSource(), ScenesSource.from_spec("scenes:")
    assert (base.images(range(50)) == again.images(range(50))).all()
    for other in (ScenesSource(seed=1), ScenesSource(split="test")):
        assert base.scenes(range(50)) != other.scenes(range(50))
        assert base.key(0) != other.key(0)


def test_splits_hold_to_their_side():
    assert all(s.held_out() for s in ScenesSource(split="test").scenes(range(500)))
    assert not any(s.held_out() for s in ScenesSource(split="train").scenes(range(500)))


def test_phrasings_vary_over_the_index():
    source = ScenesSource()
    assert len({source.captions(i)[0].count(" a ") for i in range(100)}) == 2


def test_all_phrasings_can_be_had():
    assert len({*ScenesSource(captions_each=8).captions(0)}) == 2
    assert len({*ScenesSource(level=3, captions_each=8).captions(0)}) == 8


def test_spec():
    source = ScenesSource.from_spec("scenes:?level=2&split=test&count=20000&seed=5&size=64&captions=2")
    assert source == ScenesSource(level=2, split="test", count=20_000, seed=5, size=64, captions_each=2)
    assert len(source) == 20_000
    assert len(ScenesSource()) == 2**31
    assert source.image(19_999).shape == (64, 64, 3)
    assert source.image(0, 48).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("scenes:?levle=1", "levle"),
        ("scenes:?level=4", "level=4"),
        ("scenes:?level=one", "level=one"),
        ("scenes:?level=", "level="),
        ("scenes:?level", "level"),
        ("scenes:?split=valid", "split=valid"),
        ("scenes:?count=0", "count=0"),
        ("scenes:?count=-3", "count=-3"),
        ("scenes:?size=4", "size=4"),
        ("scenes:?captions=0", "captions=0"),
        ("scenes:?seed=1&seed=2", "twice"),
        ("scenes:level=1", "scenes:level=1"),
        ("scene:?level=1", "scene:"),
    ],
)
def test_mistakes_are_named_in_one_line(spec, part):
    with pytest.raises(UserError) as caught:
        ScenesSource.from_spec(spec)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index):
    for read in (ScenesSource(count=10).captions, ScenesSource(count=10).image, ScenesSource(count=10).key):
        with pytest.raises(IndexError):
            read(index)
