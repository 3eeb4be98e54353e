from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.scenes import ScenesSource
from diptych.data.store import DataTokenizers, Store, encode
from diptych.errors import UserError
from diptych.itit import data as module
from diptych.itit.data import DataConfig, Subset, encode_subset, open_data

PAIRS = DataConfig(pairs="scenes:?count=21", max_pairs=6)
IMAGES, TEXTS = "scenes:?count=9&seed=1", "scenes:?count=8&seed=2"


def tokenizers(fingerprint: str = "a-b-24-False", **changes) -> DataTokenizers:
    made = {"image_size": 16, "tokenize_images": tokens_of, "tokenize_texts": ids_of, "fingerprint": fingerprint}
    return DataTokenizers(**(made | changes))


def tokens_of(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    return pixels_B3HW[:, 0, :2, 0].long() + 1


def ids_of(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), 1, 0, 0] for text in texts])


def items(part: Subset) -> set[int]:
    assert len(set(part.items)) == len(part.items)
    return {int(item) for item in part.items}


@pytest.mark.parametrize(
    ("images", "texts", "held_back"),
    [(None, None, (8, 7)), (None, TEXTS, (15, None)), (IMAGES, None, (None, 15)), (IMAGES, TEXTS, (None, None))],
)
def test_what_max_pairs_holds_back_serves_the_side_that_is_not_given(images, texts, held_back):
    parts = open_data(replace(PAIRS, images=images, texts=texts))
    assert len(items(parts.pairs)) == 6
    own = [parts.pairs]
    for part, given, count in ((parts.images, IMAGES, held_back[0]), (parts.texts, TEXTS, held_back[1])):
        if count is None:
            assert part.source == ScenesSource.from_spec(given)
            assert items(part) == set(range(len(part.source)))
        else:
            assert part.source is parts.pairs.source
            assert len(items(part)) == count
            own.append(part)
    for one, other in combinations(own, 2):
        assert not items(one) & items(other)
    if held_back != (None, None):
        assert set.union(*map(items, own)) == set(range(21))


@pytest.mark.parametrize("images", [None, IMAGES])
@pytest.mark.parametrize("texts", [None, TEXTS])
@pytest.mark.parametrize("max_pairs", [None, 21])
def test_with_nothing_held_back_the_pairs_serve_as_both(images, texts, max_pairs):
    parts = open_data(DataConfig(pairs="scenes:?count=21", images=images, texts=texts, max_pairs=max_pairs))
    assert items(parts.pairs) == set(range(21))
    assert (parts.images is parts.pairs) == (images is None)
    assert (parts.texts is parts.pairs) == (texts is None)


def test_the_split_follows_from_its_seed_alone():
    first, again, other = (open_data(replace(PAIRS, split_seed=seed)) for seed in (0, 0, 1))
    assert items(first.pairs) == items(again.pairs) != items(other.pairs)
    fewer = open_data(replace(PAIRS, max_pairs=3))
    assert items(fewer.pairs) < items(first.pairs)


def test_the_tokenizers_learn_from_everything_once():
    parts = open_data(replace(PAIRS, images=IMAGES))
    images, texts = parts.raw_images(), list(parts.raw_texts())
    assert sorted(len(part.items) for part in images) == [6, 9]
    assert sorted(texts) == sorted(ScenesSource(count=21).captions(item)[0] for item in range(21))
    alone = open_data(DataConfig(pairs="scenes:?count=21"))
    assert [len(part.items) for part in alone.raw_images()] == [21]
    assert len(list(alone.raw_texts())) == 21


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pairs": "texts.txt"}, r"texts\.txt: pairs need images and captions, and it has no images"),
        ({"images": "texts.txt"}, r"texts\.txt: it is given as --data\.images but has no images"),
        ({"texts": "photos"}, r"photos: it is given as --data\.texts but has no texts"),
        ({"max_pairs": 0}, "--data.max-pairs 0: must be from 1 to 21"),
        ({"max_pairs": 22}, "--data.max-pairs 22: must be from 1 to 21"),
        ({"texts": "nowhere.txt"}, "does not exist"),
    ],
)
def test_sources_that_cannot_serve(tmp_path, monkeypatch, changes, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("bread\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"")
    with pytest.raises(UserError, match=told) as caught:
        open_data(replace(PAIRS, **changes))
    assert "\n" not in str(caught.value)


@pytest.fixture
def store(tmp_path) -> Store:
    return encode(ScenesSource(count=21), tmp_path / "store", tokenizers())


def test_encoded_data_is_a_source_like_others(store, tmp_path):
    parts = open_data(replace(PAIRS, pairs=str(store.folder)))
    assert isinstance(parts.pairs.source, Store)
    assert items(parts.pairs) == items(open_data(PAIRS).pairs)
    assert encode_subset(parts.pairs, tmp_path / "out", tokenizers(), data=PAIRS) is parts.pairs
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="give --tokenizer and --text-encoder"):
        parts.raw_images()
    with pytest.raises(UserError, match="encoded data has no texts"):
        list(parts.raw_texts())


def test_cached_features_are_no_other_encoding(store, tmp_path):
    part = open_data(replace(PAIRS, pairs=str(store.folder))).pairs
    assert encode_subset(part, tmp_path / "out", tokenizers("a-b-24-True"), data=PAIRS) is part


@pytest.mark.parametrize("fingerprint", ["x-b-24-False", "a-x-24-False", "a-b-32-False"])
def test_data_of_other_coders_is_refused(store, tmp_path, fingerprint):
    part = open_data(replace(PAIRS, pairs=str(store.folder))).pairs
    with pytest.raises(UserError, match="encoded with another tokenizer or text encoder") as caught:
        encode_subset(part, tmp_path / "out", tokenizers(fingerprint), data=PAIRS)
    assert str(store.folder) in str(caught.value)


def test_parts_are_encoded_once(tmp_path):
    def never(pixels):
        raise AssertionError("encoded again")

    part = open_data(PAIRS).pairs
    first = encode_subset(part, tmp_path / "out", tokenizers(), data=PAIRS)
    assert items(first) == set(range(6))
    expected = [ScenesSource(count=21).key(int(item)) for item in part.items]
    assert (tmp_path / "out/keys.txt").read_text().split() == expected
    second = encode_subset(part, tmp_path / "out", tokenizers(tokenize_images=never), data=PAIRS)
    np.testing.assert_array_equal(second.source.arrays["tokens"], first.source.arrays["tokens"])
    third = encode_subset(part, tmp_path / "out", tokenizers("c-d-24-False"), data=PAIRS)
    assert third.source.manifest["made_by"]["tokenizers"] == "c-d-24-False"


def test_edited_captions_and_images_are_noticed(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(ScenesSource(count=3).image(number, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")
    data = DataConfig(pairs=str(folder))
    encode_subset(open_data(data).pairs, tmp_path / "out", tokenizers(), data=data)
    encode_subset(open_data(data).pairs, tmp_path / "out", tokenizers(), data=data)
    (folder / "1.txt").write_text("image 7")
    with pytest.raises(UserError, match=r"out: encoded from .*photos before its captions or images were changed"):
        encode_subset(open_data(data).pairs, tmp_path / "out", tokenizers(), data=data)
    (folder / "1.txt").write_text("image 1")
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    with pytest.raises(UserError, match="before its captions or images were changed"):
        encode_subset(open_data(data).pairs, tmp_path / "out", tokenizers(), data=data)


@pytest.mark.parametrize("changes", [{"split_seed": 1}, {"pairs": "scenes:?count=21&seed=5"}])
def test_a_run_is_not_continued_with_other_data(tmp_path, changes):
    encode_subset(open_data(PAIRS).pairs, tmp_path / "out", tokenizers(), data=PAIRS)
    other = open_data(replace(PAIRS, **changes)).pairs
    with pytest.raises(UserError, match="encoded from other items"):
        encode_subset(other, tmp_path / "out", tokenizers(), data=PAIRS)


def test_the_time_to_encode_counts_every_network_that_reads_an_image(monkeypatch):
    clock, shown = [0.0], []

    def network(name, cost):
        def run(inputs):
            shown.append((name, len(inputs)))
            clock[0] += cost

        return run

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    tokenizers = DataTokenizers(
        image_size=32,
        tokenize_images=network("tokens", 1.0),
        image_features=network("features", 2.0),
        teacher_size=16,
        teacher_features=network("teacher", 4.0),
    )
    some = Subset(ScenesSource(count=96), range(96))
    assert module._seconds_to_encode(some, tokenizers, "images") == pytest.approx(7.0 * 96 / 48)
    assert shown == [("tokens", 48), ("features", 48), ("teacher", 48)]
