import numpy as np
import pytest
import torch
from small_towers import encoder_of

from diptych.data.augment import ViewConfig, whole_view
from diptych.data.pixels import SkippedItems
from diptych.data.scenes import ScenesSource
from diptych.data.sources.decode import UnreadableImage
from diptych.dual import data as dual_data
from diptych.dual.data import CaptionIds, StatesConfig, cached_states, pair_stream
from diptych.errors import UserError

PAD = 9


class Counted:
    """Item i is an image of the value i; its captions are i % 4 texts: "i", "i i", "i i i"."""

    has_images, has_captions, name = True, True, "counted"

    def __init__(self, count: int, *, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken, self.decoded = count, broken, 0

    def __len__(self) -> int:
        return self.count

    def key(self, i: int) -> str:
        return str(i)

    def captions(self, i: int) -> list[str]:
        return [" ".join([str(i)] * n) for n in range(1, i % 4 + 1)]

    def label(self, i: int) -> str | None:
        return None

    def image(self, i: int, size: int) -> np.ndarray:
        self.decoded += 1
        if i in self.broken:
            raise UnreadableImage(f"{i}: cannot be decoded")
        return np.full((size, size, 3), i, np.uint8)


def tokenize(texts):
    return [[int(word) for word in text.split()] for text in texts]


def stream_of(source, *, per_image=1, cache_mb=0, skipped=None):
    captions = CaptionIds.read(source, np.arange(len(source)), tokenize)
    return pair_stream(
        source,
        captions,
        size=2,
        per_image=per_image,
        pad=PAD,
        skipped=SkippedItems() if skipped is None else skipped,
        cache_mb=cache_mb,
        seed=0,
    )


def take(stream, rows, epoch=0):
    return stream.take(np.array(rows), np.full(len(rows), epoch))


def test_an_image_comes_with_a_caption_of_its_own():
    stream = stream_of(Counted(40))
    assert stream.size == 30  # every fourth has no caption
    items = take(stream, range(30))
    shown = items.pixels_B3HW[:, 0, 0, 0]
    assert shown.tolist() == [i for i in range(40) if i % 4]
    assert torch.equal(torch.where(items.valid_BL, shown[:, None], PAD), items.ids_BL)
    lengths = items.valid_BL.sum(1)
    assert set(lengths[shown % 4 == 3].tolist()) == {1, 2, 3}  # all captions serve
    assert (lengths <= shown % 4).all()


def test_an_epoch_shows_other_captions():
    stream = stream_of(Counted(40))
    first, later = (take(stream, range(30), epoch).valid_BL.sum(1) for epoch in (0, 1))
    assert not torch.equal(first, later)
    assert torch.equal(take(stream, range(30)).valid_BL.sum(1), first)


def test_several_captions_lie_side_by_side_and_differ():
    items = take(stream_of(Counted(8), per_image=3), [2, 5])  # items 3 and 7, which have three captions
    ids_BML = items.ids_BL.unflatten(1, (3, -1))
    assert [sorted((row != PAD).sum(1).tolist()) for row in ids_BML] == [[1, 2, 3], [1, 2, 3]]
    few = take(stream_of(Counted(8), per_image=3), [0])  # item 1 has one caption
    assert few.ids_BL.tolist() == [[1, 1, 1]]


def test_an_image_that_replaces_another_brings_its_own_caption():
    items = take(stream_of(Counted(40, broken=(1, 2)), skipped=SkippedItems(max_skipped_share=0.5)), [0, 1, 2])
    assert items.pixels_B3HW[:, 0, 0, 0].tolist() == [3, 3, 3]
    assert items.ids_BL[:, 0].tolist() == [3, 3, 3]


@pytest.mark.parametrize(("cache_mb", "decoded"), [(0, 6), (1, 3)])
def test_images_that_fit_are_decoded_once(cache_mb, decoded):
    source = Counted(40, broken=(1,))
    stream = stream_of(source, cache_mb=cache_mb, skipped=SkippedItems(max_skipped_share=0.5))
    before = source.decoded
    first, again = take(stream, [3, 4]), take(stream, [3, 4])
    assert torch.equal(first.pixels_B3HW, again.pixels_B3HW)
    take(stream, [5]), take(stream, [5])
    assert source.decoded - before == decoded
    assert take(stream, [0]).ids_BL[0, 0] == take(stream, [0]).ids_BL[0, 0] == 2


def test_a_source_without_captions_is_refused():
    with pytest.raises(UserError, match="counted: no item has a caption"):
        CaptionIds.read(Counted(4), np.array([0]), tokenize)


def test_items_in_random_order_keep_their_captions():
    captions = CaptionIds.read(Counted(40), np.arange(40), tokenize)
    mixed = captions.in_random_order()
    assert sorted(mixed.items.tolist()) == captions.items.tolist() != mixed.items.tolist()
    for row, item in enumerate(mixed.items):
        numbers = np.arange(mixed.first[row], mixed.first[row + 1])
        texts = [mixed.ids[mixed.starts[number] : mixed.starts[number + 1]].tolist() for number in numbers]
        assert texts == tokenize(Counted(40).captions(int(item)))
    assert np.array_equal(captions.in_random_order().items, mixed.items)


SOURCE = ScenesSource(count=10)
VIEWS = [whole_view(), ViewConfig()]


def config_of(**more) -> StatesConfig:
    return StatesConfig(**{"views": VIEWS, "keep_tokens": True, "size": 16, "precision": "fp32"} | more)


@pytest.fixture
def given(towers):
    """An encoder and the ids of all captions."""
    encoder = encoder_of(towers).eval()
    return encoder, CaptionIds.read(SOURCE, np.arange(len(SOURCE)), encoder.ids)


def states_of(given, cache, *, enough=lambda items: False, **more):
    found, items = cached_states(
        given[0], SOURCE, given[1], config_of(**more), cache=cache, skipped=SkippedItems(), enough=enough
    )
    assert items == len(SOURCE) or enough(items)
    return found


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_cached_states_are_those_of_the_towers(mixed, keep, given, tmp_path):
    encoder, captions = given
    captions = captions.in_random_order() if mixed else captions
    cached = states_of((encoder, captions), tmp_path, keep_tokens=keep)
    assert [view.shape for view in cached.views] == [(10, encoder.image_tokens if keep else 1, 16)] * 2
    rows = np.array([7, 2, 5])
    examples = cached.stream(captions, per_image=2, seed=4).take(rows, np.zeros(3, int))
    pixels = torch.from_numpy(np.stack([SOURCE.image(int(item), 16) for item in captions.items[rows]])).permute(
        0, 3, 1, 2
    )
    with torch.no_grad():
        wanted = encoder.image_states(pixels / 255, keep_tokens=keep)  # the first view is the whole image
    torch.testing.assert_close(examples.images_BVSF[:, 0], wanted, rtol=1e-3, atol=2e-4)
    assert (examples.images_BVSF[:, 1] - wanted).abs().max() > 1e-3
    numbers_BM = captions.choose(rows, np.zeros(3, int), captions=2, seed=4)
    for m in range(2):
        ids_BL, valid_BL = captions.padded(numbers_BM[:, m], pad=0)
        with torch.no_grad():
            wanted = encoder.text_states(ids_BL, valid_BL, keep_tokens=keep)
        found, valid = examples.texts_BMLF[:, m], examples.valid_BML[:, m]
        torch.testing.assert_close(found[:, 0], wanted[:, 0], rtol=1e-3, atol=2e-4)
        if keep:
            length = valid_BL.shape[1]
            assert torch.equal(valid[:, :length], valid_BL)
            assert not valid[:, length:].any()
            at = valid_BL
            torch.testing.assert_close(found[:, 1 : length + 1][at], wanted[:, 1:][at], rtol=1e-3, atol=2e-4)
        else:
            assert valid.shape == (3, 0)


def test_an_interrupted_computation_goes_on(given, tmp_path, monkeypatch):
    whole = states_of(given, tmp_path / "whole")
    monkeypatch.setattr("diptych.dual.data._ITEMS", 4)
    plain, computed = dual_data.image_states, []

    def stop(encoder, pixels_B3HW, items, view, draw, config):
        computed.append((VIEWS.index(view), items.tolist()))
        if len(computed) == 4:
            raise KeyboardInterrupt
        return plain(encoder, pixels_B3HW, items, view, draw, config)

    monkeypatch.setattr("diptych.dual.data.image_states", stop)
    with pytest.raises(KeyboardInterrupt):
        states_of(given, tmp_path / "stopped")
    again = states_of(given, tmp_path / "stopped")
    first, second, third = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]
    assert computed[:4] == [(0, first), (1, first), (0, second), (1, second)]
    assert computed[4:] == [(1, second), (0, third), (1, third)]
    for one, other in zip(again.views, whole.views, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    np.testing.assert_allclose(again.texts, whole.texts, atol=2e-4)
    assert np.array_equal(again.starts, whole.starts)


def test_what_is_decided_alike_is_computed_once(given, tmp_path):
    def count(**more):
        found = states_of(given, tmp_path, **more)
        return len(list(tmp_path.iterdir())), found

    assert count()[0] == 3  # two views and the captions
    assert count(views=VIEWS[1:])[0] == 3
    number, both = count(views=[ViewConfig(), ViewConfig()])  # one more draw
    assert number == 4
    assert not np.array_equal(*both.views)
    number, pooled = count(keep_tokens=False)  # what has tokens serves
    assert number == 4
    assert [view.shape[1] for view in pooled.views] == [1, 1]
    assert set(pooled.lengths) == {1}
    assert count(size=20)[0] == 6
    given[0].clip.text_model.embeddings.word_embeddings.weight.data += 0.1
    assert count()[0] == 7


def test_a_stream_is_a_function_of_its_index(given, tmp_path):
    stream = states_of(given, tmp_path).stream(given[1], per_image=1, seed=0)
    assert stream.size == 10
    first, again = (stream.take(np.arange(4), np.ones(4, int)) for _ in range(2))
    assert torch.equal(first.texts_BMLF, again.texts_BMLF)


def test_a_part_is_the_beginning_of_the_whole_and_is_continued(given, tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.dual.data._ITEMS", 4)
    whole = states_of(given, tmp_path / "whole")
    part = states_of(given, tmp_path / "part", enough=lambda items: items >= 7)
    assert part.rows_N.tolist() == [*range(8)]
    assert len(part.starts) == given[1].first[8]
    stream = part.stream(given[1], per_image=2, seed=0)
    of_whole = whole.stream(given[1], per_image=2, seed=0).take(np.arange(8), np.zeros(8, int))
    of_part = stream.take(np.arange(8), np.zeros(8, int))
    torch.testing.assert_close(of_part.images_BVSF, of_whole.images_BVSF, atol=2e-4, rtol=0)
    torch.testing.assert_close(of_part.texts_BMLF, of_whole.texts_BMLF, atol=2e-4, rtol=0)
    plain, computed = dual_data.image_states, []

    def count(encoder, pixels_B3HW, items, *rest):
        computed.append(items.tolist())
        return plain(encoder, pixels_B3HW, items, *rest)

    monkeypatch.setattr("diptych.dual.data.image_states", count)
    smaller = states_of(given, tmp_path / "part", enough=lambda items: items >= 4)  # it has them already
    assert not computed
    assert smaller.rows_N.tolist() == [*range(4)]
    continued = states_of(given, tmp_path / "part")
    assert computed == [[8, 9], [8, 9]]
    assert continued.rows_N.tolist() == [*range(10)]
    np.testing.assert_allclose(continued.texts, whole.texts, atol=2e-4)
