import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.pixels import (
    ReadableImages,
    SkippedItems,
    check_batch,
    decode_files,
    image_batches,
    one_or_more,
    pixel_stream,
    read_captioned,
    read_first_images,
    to_pixels,
)
from diptych.data.scenes import ScenesSource
from diptych.data.sources.decode import UnreadableImage, decode
from diptych.data.splits import Subset
from diptych.errors import UserError

SIZE = 4


class Ramps:
    """Item i is an image whose left half is ``first + i`` and whose right half is 100 more."""

    has_images, has_captions = True, False

    def __init__(self, count: int, *, first: int = 0, broken: tuple[int, ...] = ()) -> None:
        self.count, self.first, self.broken = count, first, broken
        self.name = f"ramps from {first}"

    def __len__(self) -> int:
        return self.count

    def key(self, i: int) -> str:
        return f"{self.first}/{i}"

    def captions(self, i: int) -> list[str]:
        return []

    def label(self, i: int) -> str | None:
        return None

    def image(self, i: int, size: int) -> np.ndarray:
        if i in self.broken:
            raise UnreadableImage(f"{self.key(i)}: cannot be decoded")
        image = np.full((size, size, 3), self.first + i, np.uint8)
        image[:, size // 2 :] += 100
        return image


def stream_of(*sources, skipped=None, flip=False, seed=0):
    subsets = [Subset(source, np.arange(len(source))) for source in sources]
    skipped = SkippedItems() if skipped is None else skipped
    return pixel_stream(subsets, size=SIZE, skipped=skipped, flip=flip, seed=seed)


def taken(stream, rows, epoch=0) -> torch.Tensor:
    return stream.take(np.array(rows), np.full(len(rows), epoch)).pixels_B3HW


def left(pixels_B3HW) -> list[int]:
    return pixels_B3HW[:, 0, 0, 0].tolist()


def test_images_as_bytes_channels_first():
    stream = stream_of(Ramps(5))
    pixels = taken(stream, [3, 0])
    assert stream.size == 5
    assert (pixels.shape, pixels.dtype) == ((2, 3, SIZE, SIZE), torch.uint8)
    assert left(pixels) == [3, 0]
    assert pixels[0, 0, 0].tolist() == [3, 3, 103, 103]


def test_several_sources_and_chosen_items_are_one_stream():
    subsets = [
        Subset(Ramps(9), np.array([8, 2])),
        Subset(Ramps(3, first=50), np.array([1])),
        Subset(Ramps(9, first=20), np.arange(3)),
    ]
    stream = pixel_stream(subsets, size=SIZE, skipped=SkippedItems(), flip=False, seed=0)
    assert stream.size == 6
    assert left(taken(stream, range(6))) == [8, 2, 51, 20, 21, 22]


def test_about_half_are_mirrored_as_item_and_epoch_say():
    stream = stream_of(Ramps(90), flip=True)
    rows = list(range(90))
    first, again, later = taken(stream, rows), taken(stream, rows), taken(stream, rows, epoch=1)
    mirrored = first[:, 0, 0, 0] >= 100
    assert 30 < mirrored.sum() < 60
    assert torch.equal(first, again)
    assert 25 < (mirrored != (later[:, 0, 0, 0] >= 100)).sum() < 65
    plain = taken(stream_of(Ramps(90)), rows)
    assert torch.equal(first, torch.where(mirrored[:, None, None, None], plain.flip(-1), plain))
    assert torch.equal(taken(stream, [7]), first[7:8])  # whatever else is in the batch
    assert not torch.equal(taken(stream_of(Ramps(90), flip=True, seed=1), rows), first)


def test_the_next_image_stands_in_for_an_unreadable_one():
    skipped = SkippedItems(max_skipped_share=0.7)
    stream = stream_of(Ramps(3, broken=(1, 2)), Ramps(2, first=50, broken=(1,)), skipped=skipped)
    assert left(taken(stream, range(5))) == [0, 50, 50, 50, 0]
    assert sorted(skipped.reasons) == ["0/1", "0/2", "50/1"]
    assert left(taken(stream, [1, 4])) == [50, 0]


def test_too_many_unreadable_images_stop():
    with pytest.raises(UserError, match=r"1 of 3 items are unreadable.*0/1"):
        taken(stream_of(Ramps(3, broken=(1,))), [1])
    with pytest.raises(UserError, match="2 of 2 items are unreadable"):
        taken(stream_of(Ramps(2, broken=(0, 1)), skipped=SkippedItems(max_skipped_share=1.0)), [0])


def test_a_source_that_draws_many_at_once_gives_the_same_images():
    scenes = ScenesSource(count=20)
    some = Subset(scenes, np.arange(5, 20))
    pixels = pixel_stream([some], size=32, skipped=SkippedItems(), flip=False, seed=0)
    expected = np.stack([scenes.image(5 + i, 32) for i in (0, 3, 14)])
    found = taken(pixels, [0, 3, 14]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(found, expected)
    both = [some, Subset(ScenesSource(count=3, seed=1), np.arange(3))]
    one_by_one = pixel_stream(both, size=32, skipped=SkippedItems(), flip=False, seed=0)
    assert one_by_one.size == 18
    np.testing.assert_array_equal(taken(one_by_one, [0, 3, 14]).permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_hold_the_readable_items_in_order(workers):
    skipped = SkippedItems(max_skipped_share=0.5)
    source = Ramps(20, broken=(0, 1, 2, 3, 9, 19))
    found = list(image_batches(source, np.arange(20), size=SIZE, skipped=skipped, workers=workers, rows=4))
    assert [items.tolist() for _, items in found] == [[4, 5, 6, 7], [8, 10, 11], [12, 13, 14, 15], [16, 17, 18]]
    for pixels_B3SS, items in found:
        assert (pixels_B3SS.dtype, pixels_B3SS.shape[1:]) == (torch.uint8, (3, SIZE, SIZE))
        assert left(pixels_B3SS) == items.tolist()
    assert sorted(skipped.reasons) == ["0/0", "0/1", "0/19", "0/2", "0/3", "0/9"]
    with pytest.raises(UserError, match="4 of 20 items are unreadable"):
        next(image_batches(source, np.arange(20), size=SIZE, skipped=SkippedItems(), rows=4))


def test_the_first_readable_images_and_nothing_behind_them(monkeypatch):
    asked = []
    image = Ramps.image
    monkeypatch.setattr(Ramps, "image", lambda self, i, size: (asked.append(i), image(self, i, size))[1])
    source = Ramps(30, broken=(1, 4, 25))
    items, pixels = read_first_images(source, limit=5, size=SIZE, skipped=SkippedItems(max_skipped_share=0.3))
    assert items == [0, 2, 3, 5, 6]
    assert pixels[:, 0, 0, 0].tolist() == items
    assert sorted(asked) == list(range(7))
    even = read_first_images(
        source, limit=None, size=SIZE, skipped=SkippedItems(max_skipped_share=0.3), wanted=lambda item: item % 2 == 0
    )
    assert even[0] == [item for item in range(0, 30, 2) if item != 4]


def test_first_images_that_cannot_be_had():
    with pytest.raises(UserError, match=r"2 of 30 items are unreadable.*0/1"):
        read_first_images(Ramps(30, broken=(1, 4)), limit=5, size=SIZE, skipped=SkippedItems())
    with pytest.raises(UserError, match="a limit of 0 images"):
        read_first_images(Ramps(3), limit=0, size=SIZE, skipped=SkippedItems())
    with pytest.raises(UserError, match="no image to score"):
        read_first_images(Ramps(3), limit=None, size=SIZE, skipped=SkippedItems(), wanted=lambda item: False)
    with pytest.raises(UserError, match="pairs need images and captions"):
        read_captioned(Ramps(3), limit=None, size=SIZE, skipped=SkippedItems())


def test_files_become_one_batch_and_a_damaged_one_is_named(tmp_path):
    colours = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, colour in zip(files, colours, strict=True):
        Image.fromarray(np.broadcast_to(colour, (8, 8, 3)).copy()).save(file)
    pixels_B3SS = decode_files(files, size=4)
    assert torch.equal(pixels_B3SS, torch.from_numpy(colours)[:, :, None, None].expand(2, 3, 4, 4))
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad\.png"):
        decode_files([files[0], tmp_path / "bad.png"], size=4)


def test_one_percent_is_tolerated_and_more_is_not():
    skipped = SkippedItems()
    skipped.check(0)
    skipped.record("a", "a: broken")
    skipped.check(100)
    with pytest.raises(UserError, match=r"1 of 99 items .* 1\.0%: a: broken; mend"):
        skipped.check(99)


def test_the_share_can_be_set_but_everything_is_too_much():
    skipped = SkippedItems(max_skipped_share=1.0)
    skipped.record("a", ValueError("a"))
    skipped.check(2)
    with pytest.raises(UserError):
        skipped.check(1)


def test_lists_only_the_first_few():
    skipped = SkippedItems()
    for i in range(5):
        skipped.record(f"k{i}", f"k{i}: bad")
    with pytest.raises(UserError, match="k0: bad; k1: bad; k2: bad; and 2 more"):
        skipped.check(5)


def test_writes_one_line_each_and_leaves_nothing_else(tmp_path):
    skipped = SkippedItems()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: skipped.record(f"{i:03}", f"bad\n{i}"), range(100)))
    skipped.record("007", "again")
    skipped.write(tmp_path / "run" / "skipped.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert len(rows) == len(skipped) == 100
    assert rows[7] == {"key": "007", "reason": "again"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["skipped.jsonl"]


def test_the_share_is_that_of_the_images_looked_at():
    """Not of the whole source, which may be a thousand times as long as the part that is scored."""
    with pytest.raises(UserError, match=r"1 of 6 items are unreadable.*0/1"):
        read_first_images(Ramps(200, broken=(1,)), limit=5, size=SIZE, skipped=SkippedItems())


def test_a_report_of_what_is_left_out(tmp_path):
    skipped = SkippedItems()
    assert skipped.report(tmp_path / "skipped.jsonl") == []
    assert not (tmp_path / "skipped.jsonl").exists()
    skipped.record("b", "b: is empty")
    assert skipped.report(tmp_path / "skipped.jsonl") == [
        f"1 images cannot be read, listed in {tmp_path}/skipped.jsonl; the first: b: is empty"
    ]
    assert json.loads((tmp_path / "skipped.jsonl").read_text()) == {"key": "b", "reason": "b: is empty"}


@pytest.mark.parametrize(("cache_mb", "reads"), [(0, 2), (1, 1)])
def test_readable_images_are_the_same_each_time(monkeypatch, cache_mb, reads):
    asked = []
    image = Ramps.image
    monkeypatch.setattr(Ramps, "image", lambda self, i, size: (asked.append(i), image(self, i, size))[1])
    skipped = SkippedItems(max_skipped_share=0.3)
    images = ReadableImages(Ramps(9, broken=(4,)), np.arange(9), size=SIZE, skipped=skipped, rows=4, cache_mb=cache_mb)
    for _ in range(2):
        assert [items.tolist() for _, items in images] == [[0, 1, 2, 3], [5, 6, 7], [8]]
    assert len(asked) == 9 * reads
    assert list(skipped.reasons) == ["0/4"]


def test_whatever_holds_an_image_gives_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = decode(tmp_path / "a.png", 4)
    data = (tmp_path / "a.png").read_bytes()
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), data, Image.fromarray(pixels), pixels):
        assert np.array_equal(to_pixels(image, 4), expected)
        assert len(one_or_more(image)) == 1
        assert len(one_or_more([image, image])) == 2
    assert len(one_or_more(np.stack([pixels] * 3))) == 3
    with pytest.raises(UserError, match=r"an image of float32 \(8, 12, 3\): give uint8"):
        to_pixels(pixels.astype(np.float32), 4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 12), np.uint8), r"an image of uint8 \(8, 12\): give uint8 \[height, width, 3\]"),
        (io.BytesIO(b"x"), "of the type BytesIO: give a path, the bytes of a file"),
        ({"bytes": b"x", "path": None}, "of the type dict: give a path"),
        (None, "of the type NoneType"),
        ([torch.zeros(3, 4, 4)], "of the type Tensor"),
        ("https://a.org/a.png", "web addresses are not fetched; download the image first"),
    ],
)
def test_what_is_no_image_is_told_in_one_line(images, message):
    with pytest.raises(UserError, match=message):
        [to_pixels(image, 4) for image in one_or_more(images)]


@pytest.mark.parametrize("batch", [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_a_tensor_is_a_batch_of_bytes_of_the_right_size(batch):
    """Floats from 0 to 1 would be divided by 255."""
    check_batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 4)
    with pytest.raises(UserError, match=r"give uint8 \[images, 3, 4, 4\], or a list of NumPy arrays"):
        check_batch(batch, 4)


def test_paths_in_an_array_are_images_too():
    assert one_or_more(np.array(["a.png", "b.png"])) == ["a.png", "b.png"]
