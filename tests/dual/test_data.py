import numpy as np
import pytest
import torch

from diptych.data.pixels import SkippedItems
from diptych.data.sources.decode import UnreadableImage
from diptych.dual.data import CaptionIds, pair_stream
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
