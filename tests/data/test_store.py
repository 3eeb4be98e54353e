import json

import numpy as np
import pytest
import torch

from diptych.data.encode import DataTokenizers, encode
from diptych.data.store import Store
from diptych.data.streams import BatchSampler, shuffled
from diptych.errors import UserError

LENGTH = 20
WORDS = [3, 0, 1, 9, 2]
"""Captions of each item; caption n of item i is n + 1 times the letter of the item."""


class Made:
    """A source of ``WORDS``."""

    name, has_images, has_captions = "made", True, True

    def __len__(self) -> int:
        return len(WORDS)

    def key(self, i: int) -> str:
        return f"item {i}"

    def captions(self, i: int) -> list[str]:
        return [chr(ord("a") + i) * (n + 1) for n in range(WORDS[i])]

    def image(self, i: int, size: int) -> np.ndarray:
        return np.full((size, size, 3), i, np.uint8)

    def label(self, i: int) -> str | None:
        return None


def ids_of(texts: list[str]) -> torch.Tensor:
    rows = [[*map(ord, text), 1] for text in texts]
    return torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in rows])


def read(ids_BL: torch.Tensor) -> list[str]:
    return ["".join(chr(i) for i in row if i > 1) for row in ids_BL.tolist()]


@pytest.fixture
def store(tmp_path) -> Store:
    tokenizers = DataTokenizers(
        image_size=2, tokens=lambda pixels: pixels[:, 0].flatten(1).long(), ids=ids_of,
        features=lambda ids: ids[..., None] / torch.tensor([3.0, 7.0]), fingerprint="made",
    )  # fmt: skip
    encode(Made(), tmp_path / "store", tokenizers)
    return Store.open(tmp_path / "store")


ALL = np.arange(len(WORDS))
AT_ONCE = np.zeros(50, np.int64)


def test_pairs_belong_together_and_leave_out_items_without_captions(store):
    stream = store.pairs(ALL, seed=0)
    assert stream.size == 4
    items = stream.take(np.arange(4), AT_ONCE[:4])
    assert items.tokens_BN[:, 0].tolist() == [0, 2, 3, 4]
    assert [text[0] for text in read(items.ids_BL)] == ["a", "c", "d", "e"]
    assert store.pairs(np.array([1, 4]), seed=0).size == 1


def test_each_epoch_chooses_a_caption_of_its_own(store):
    stream = store.pairs(np.array([3]), seed=0)
    epochs = np.arange(200)
    shown = read(stream.take(np.zeros_like(epochs), epochs).ids_BL)
    assert set(shown) == set(Made().captions(3))
    assert shown == read(stream.take(np.zeros_like(epochs), epochs).ids_BL)
    assert shown != read(store.pairs(np.array([3]), seed=1).take(np.zeros_like(epochs), epochs).ids_BL)


def test_bare_texts_are_every_caption_once_an_epoch(store):
    for items in (ALL, np.array([3, 0]), np.array([4])):
        stream = store.texts(items)
        wanted = sorted(text for item in items for text in Made().captions(int(item)))
        for epoch in range(2):
            index, _ = shuffled(epoch * stream.size + np.arange(stream.size), stream.size, seed=0)
            found = stream.take(index, AT_ONCE[: len(index)] + epoch)
            assert sorted(read(found.ids_BL)) == wanted
            assert found.tokens_BN is None


def test_bare_images_carry_no_text(store):
    stream = store.images(np.array([4, 1]))
    found = stream.take(np.array([0, 1]), AT_ONCE[:2])
    assert found.tokens_BN.tolist() == [[4] * 4, [1] * 4]
    assert (found.ids_BL, found.valid_BL, found.features_BLF) == (None, None, None)


def test_texts_are_cut_to_a_multiple_of_eight_and_nothing_else_changes(store):
    texts = [text for item in ALL for text in Made().captions(int(item))]
    stream = store.texts(ALL)
    for rows, length in (([0], 8), ([4, 10], 8), ([0, 10, 11], 16)):  # 8 ids with the end, and 9
        found = stream.take(np.array(rows), AT_ONCE[: len(rows)])
        whole = ids_of([texts[row] for row in rows])
        assert found.ids_BL.shape == (len(rows), length)
        assert torch.equal(found.ids_BL, whole[:, :length])
        assert not whole[:, length:].any()
        assert torch.equal(found.valid_BL, found.ids_BL != 0)
        exact = found.ids_BL[..., None] / torch.tensor([3.0, 7.0])
        torch.testing.assert_close(found.features_BLF, exact, rtol=1e-3, atol=0)
        assert torch.equal(found.features_BLF, found.features_BLF.half().float())


def test_the_length_of_the_store_is_the_most(tmp_path):
    cut = DataTokenizers(ids=lambda texts: ids_of(texts)[:, :10], fingerprint="cut")
    store = encode(Made(), tmp_path / "store", cut)
    assert store.texts(ALL).take(np.array([12]), AT_ONCE[:1]).ids_BL.shape == (1, 10)


def test_batches_of_a_store_are_pure(store):
    streams = {"pairs": store.pairs(ALL, seed=3), "texts": store.texts(ALL)}
    batches = [BatchSampler(streams, multiples={"pairs": 1, "texts": 2}, batch_size=4, seed=3) for _ in range(2)]
    for step in (5, 0, 7):
        first, second = (made(step) for made in batches)
        assert torch.equal(first["pairs"].ids_BL, second["pairs"].ids_BL)
        assert torch.equal(first["texts"].ids_BL, second["texts"].ids_BL)
        assert len(first["texts"]) == 8


@pytest.mark.parametrize("name", ["tokens", "ids", "counts", "features"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"\0", None])
def test_a_file_of_another_length_is_noticed(store, name, damage):
    file = store.folder / f"{name}.bin"
    data = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(data))
    with pytest.raises(UserError, match=rf"{name}\.bin.*encode it again") as caught:
        Store.open(store.folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"7", b'{"arrays": [1]}', b"\xff", b'{"arrays": {"ids": 1}}'])
def test_a_damaged_manifest_is_noticed(store, content):
    (store.folder / "store.json").write_bytes(content)
    assert Store.is_one(store.folder)
    with pytest.raises(UserError, match="not a folder of encoded data") as caught:
        Store.open(store.folder)
    assert "\n" not in str(caught.value)


def test_any_other_folder_is_none(tmp_path):
    assert not Store.is_one(tmp_path)
    assert not Store.is_one("scenes:?count=3")
    with pytest.raises(UserError, match="not a folder of encoded data"):
        Store.open(tmp_path)


def test_the_manifest_says_what_it_was_made_of(store):
    made_by = json.loads((store.folder / "store.json").read_text())["made_by"]
    assert (made_by["source"], made_by["coders"]) == ("made", "made")
