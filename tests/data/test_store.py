import json
import os
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data import engine
from diptych.data import store as store_module
from diptych.data.batch import ImageTokenExamples, TextExamples
from diptych.data.sources import open_source
from diptych.data.sources.text import TextSource
from diptych.data.store import (
    STORE_MANIFEST,
    CaptionIndex,
    DataTokenizers,
    Store,
    VectorStore,
    encode,
    write_vectors,
)
from diptych.data.streams import BatchSampler, shuffled
from diptych.errors import UserError

LENGTH = 20
WORDS = [3, 0, 1, 9, 2]
"""Captions of each item; caption n of item i is n + 1 times the letter of the item."""
VECTORS = np.random.default_rng(0).standard_normal((10_003, 3)).astype(np.float16)
KEYS = [f"item {number}" for number in range(len(VECTORS))]


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
    rows = [[*(ord(letter) for letter in text[: LENGTH - 1]), 1] for text in texts]
    return torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in rows])


def read(ids_BL: torch.Tensor) -> list[str]:
    return ["".join(chr(i) for i in row if i > 1) for row in ids_BL.tolist()]


@pytest.fixture
def store(tmp_path) -> Store:
    tokenizers = DataTokenizers(
        image_size=2,
        tokenize_images=lambda pixels: pixels[:, 0].flatten(1).long(),
        tokenize_texts=ids_of,
        text_features=lambda ids: ids[..., None] / torch.tensor([3.0, 7.0]),
        fingerprint="made",
    )
    encode(Made(), tmp_path / "store", tokenizers)
    return Store.open(tmp_path / "store")


ALL = np.arange(len(WORDS))
AT_ONCE = np.zeros(50, np.int64)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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


def test_unpaired_texts_are_every_caption_once_an_epoch(store):
    for items in (ALL, np.array([3, 0]), np.array([4])):
        stream = store.texts(items)
        wanted = sorted(text for item in items for text in Made().captions(int(item)))
        for epoch in range(2):
            index, _ = shuffled(epoch * stream.size + np.arange(stream.size), stream.size, seed=0)
            found = stream.take(index, AT_ONCE[: len(index)] + epoch)
            assert sorted(read(found.ids_BL)) == wanted
            assert isinstance(found, TextExamples)


def test_a_range_of_all_items_gives_what_their_numbers_give(store):
    for make in (lambda items: store.pairs(items, seed=3), store.images, store.texts):
        given, listed = make(range(len(WORDS))), make(ALL)
        assert given.size == listed.size
        rows = np.arange(given.size)
        one, other = given.take(rows, rows % 3), listed.take(rows, rows % 3)
        for name in ("tokens_BN", "ids_BL"):
            if hasattr(one, name):
                assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("items", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("least", [0, 1])
def test_captions_are_found_without_a_table(items, least):
    draw = np.random.default_rng(items)
    counts = draw.integers(least, 4, items).astype(np.int32)
    counts[0] = 1
    index, starts = CaptionIndex(counts), np.concatenate([[0], np.cumsum(counts)])
    assert np.array_equal(index.first(np.arange(items)), starts[:-1])
    captioned = np.flatnonzero(counts)
    assert index.captioned_items == len(captioned)
    assert np.array_equal(index.captioned(np.arange(len(captioned))), captioned)
    some = draw.permutation(items)[: items // 2 + 1]
    assert index.rows(some).tolist() == [row for item in some for row in range(starts[item], starts[item + 1])]
    assert index.rows(some[:0]).tolist() == []


ITEMS = 2_000_000


@pytest.fixture
def large(tmp_path) -> Store:
    """Two million items of four tokens and one text, nearly all in sparse files."""
    arrays = {"tokens": [ITEMS, 4], "ids": [ITEMS, 8], "counts": [ITEMS]}
    for name, shape in arrays.items():
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", "<i4", tuple(shape)).flush()
    np.save(tmp_path / "counts.npy", np.ones(ITEMS, np.int32))
    manifest = {"version": 2, "made_by": {}, "items": ITEMS, "skipped": 0}
    manifest["arrays"] = {name: {"shape": shape, "dtype": "<i4"} for name, shape in arrays.items()}
    (tmp_path / STORE_MANIFEST).write_text(json.dumps(manifest))
    return Store.open(tmp_path)


def batches_of(store: Store) -> BatchSampler:
    items = range(len(store))
    kinds = {"pairs": store.pairs(items, seed=0), "images": store.images(items), "texts": store.texts(items)}
    return BatchSampler(kinds, multiples={"pairs": 2, "images": 1, "texts": 1}, batch_size=8, seed=0)


def test_a_large_store_needs_no_table_of_its_items(large):
    tracemalloc.start()
    batch = batches_of(large)(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(batch["pairs"]) == 16
    assert peak < 8 * ITEMS  # bytes of a single table of numbers


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
def test_what_a_large_store_maps_does_not_stay(large, monkeypatch):
    monkeypatch.setattr(store_module, "_MOST_MAPPED", 2**22)
    batches = batches_of(large)
    before = store_module._mapped_bytes()
    for step in range(0, 20_000, 500):  # from all of its files, which have 100 MB
        batches(step)
    assert store_module._mapped_bytes() - before < 3 * 2**22


def test_unpaired_images_carry_no_text(store):
    stream = store.images(np.array([4, 1]))
    found = stream.take(np.array([0, 1]), AT_ONCE[:2])
    assert found.tokens_BN.tolist() == [[4] * 4, [1] * 4]
    assert isinstance(found, ImageTokenExamples)


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
    cut = DataTokenizers(tokenize_texts=lambda texts: ids_of(texts)[:, :10], fingerprint="cut")
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
    file = store.folder / f"{name}.npy"
    data = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(data))
    with pytest.raises(UserError, match=rf"{name}\.npy.*encode it again") as caught:
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
    assert (made_by["source"], made_by["tokenizers"]) == ("made", "made")


def test_arrays_are_numpy_files_that_are_mapped(store):
    for name in ("tokens", "ids", "counts", "features"):
        assert isinstance(store.arrays.get(name).base, np.memmap)
        np.testing.assert_array_equal(np.load(store.folder / f"{name}.npy"), store.arrays.get(name))
    assert store.arrays.get("labels") is None


def test_a_damaged_header_is_noticed(store):
    file = store.folder / "ids.npy"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data.replace(b"(15, 20)", b"(20, 15)"))
    with pytest.raises(UserError, match=r"not a folder of encoded data \(ids\.npy holds .*encode it again"):
        Store.open(store.folder)


def test_data_of_an_earlier_version_is_to_be_encoded_again(store):
    manifest = json.loads((store.folder / "store.json").read_text())
    del manifest["version"]
    (store.folder / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"store: .*its version is 1, not 2.*: encode it again") as caught:
        Store.open(store.folder)
    assert "\n" not in str(caught.value)
    assert len(encode(Made(), store.folder, DataTokenizers(tokenize_texts=ids_of))) == 5


@pytest.fixture
def vectors(tmp_path) -> VectorStore:
    return write_vectors(tmp_path / "store", np.array_split(VECTORS, 7), keys=KEYS, manifest={"model": "abc"})


def test_what_is_written_is_read(vectors, tmp_path):
    assert (len(vectors), vectors.keys, vectors.manifest) == (len(VECTORS), KEYS, {"model": "abc"})
    assert isinstance(vectors.vectors, np.memmap)
    assert vectors.vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors.vectors, VECTORS)
    np.testing.assert_array_equal(np.load(vectors.folder / "vectors.npy"), VECTORS)
    assert vectors.array("labels") is None
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_further_arrays_and_sequences(tmp_path):
    vectors = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    labels = np.array([3, 1, 2, 0])
    batches = ({"vectors": vectors[i : i + 2], "labels": labels[i : i + 2]} for i in (0, 2))
    store = write_vectors(tmp_path / "store", batches, keys="abcd", manifest={})
    np.testing.assert_array_equal(store.vectors, vectors)
    np.testing.assert_array_equal(store.array("labels"), labels)


def test_keys_and_manifest_may_be_filled_by_the_maker_of_the_batches(tmp_path):
    keys: list[str] = []
    manifest = {"skipped": 0}

    def batches():
        for key in ("two\nlines", "any \udcff byte", " spaces "):
            keys.append(key)
            manifest["skipped"] += 1
            yield np.ones((1, 2), np.float32)

    store = write_vectors(tmp_path / "store", batches(), keys=keys, manifest=manifest)
    assert store.keys == ["two lines", "any \udcff byte", " spaces "]
    assert store.manifest == {"skipped": 3}


def test_a_store_is_replaced_and_nothing_else(vectors, tmp_path):
    write_vectors(vectors.folder, [VECTORS[:2]], keys=KEYS[:2], manifest={})
    assert len(VectorStore.open(vectors.folder)) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for taken in ("mine", "file"):
        with pytest.raises(UserError, match=taken):
            write_vectors(tmp_path / taken, [VECTORS[:2]], keys=KEYS[:2], manifest={})
    assert (tmp_path / "mine/photo.png").exists()


def test_an_interruption_leaves_the_old_store_and_nothing_else(vectors, tmp_path):
    def batches():
        yield VECTORS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_vectors(vectors.folder, batches(), keys=KEYS, manifest={})
    assert len(VectorStore.open(vectors.folder)) == len(VECTORS)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_nothing_to_write(tmp_path):
    with pytest.raises(UserError, match="store: nothing to write"):
        write_vectors(tmp_path / "store", [], keys=[], manifest={})
    with pytest.raises(UserError, match="2 rows for 3 keys"):
        write_vectors(tmp_path / "store", [VECTORS[:2]], keys=KEYS[:3], manifest={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("manifest.json", lambda content: b"{"),
        ("manifest.json", None),
        ("keys.txt", lambda content: b"one\n"),
        ("vectors.npy", None),
        ("vectors.npy", lambda content: content[:-1]),
        ("vectors.npy", lambda content: content[:20]),
        ("vectors.npy", lambda content: b""),
        ("vectors.npy", lambda content: bytes(range(256))),
    ],
)
def test_a_damaged_store_is_named(vectors, file, damage):
    content = (vectors.folder / file).read_bytes()
    (vectors.folder / file).unlink()  # it is mapped: cutting it in place would be a bus error
    if damage is not None:
        (vectors.folder / file).write_bytes(damage(content))
    with pytest.raises(UserError, match=r"store: not a complete store of vectors \([^\n]+\): make it again$"):
        VectorStore.open(vectors.folder)


def test_no_store(tmp_path):
    assert not VectorStore.is_one(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        VectorStore.open(tmp_path / "nowhere")


SIZE, WIDTH = 4, 3


def tokens_of(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    return pixels_B3HW[:, 0].flatten(1).long()


def features_of(ids_BL: torch.Tensor) -> torch.Tensor:
    return ids_BL[..., None] * torch.tensor([1.0, 0.1, -1 / 3])


def tokenizers(**changes) -> DataTokenizers:
    made = {"tokenize_images": tokens_of, "tokenize_texts": ids_of, "text_features": features_of}
    return DataTokenizers(**{"image_size": SIZE, "fingerprint": "one", **made, **changes})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK", 5)


@pytest.fixture
def photos(tmp_path):
    """Twelve images of one grey each; number i has i % 3 captions."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i:02d}.png")
        if i % 3:
            (folder / f"{i:02d}.txt").write_text("".join(f"{'abc'[n]}{i}\n" for n in range(i % 3)))
    return folder


def test_what_is_stored_is_what_the_tokenizers_gave(photos, tmp_path):
    source = open_source(str(photos))
    store = encode(source, tmp_path / "store", tokenizers())
    texts = [text for i in range(12) for text in source.captions(i)]
    assert (len(store), store.has_images, store.has_captions) == (12, True, True)
    assert store.arrays.get("tokens").tolist() == [[i] * SIZE**2 for i in range(12)]
    assert store.arrays.get("counts").tolist() == [i % 3 for i in range(12)]
    assert store.arrays.get("ids").tolist() == ids_of(texts).tolist()
    assert store.arrays.get("features").dtype == np.float16
    np.testing.assert_array_equal(store.arrays.get("features"), features_of(ids_of(texts)).half().numpy())
    assert (tmp_path / "store/keys.txt").read_text().split() == [f"{i:02d}.png" for i in range(12)]
    assert not (tmp_path / "store/skipped.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_features_of_images_are_stored_beside_their_tokens(photos, tmp_path):
    made = tokenizers(image_features=lambda pixels_B3HW: pixels_B3HW.float().mean((2, 3)) / 7)
    store = encode(open_source(str(photos)), tmp_path / "store", made)
    expected_BG = torch.arange(12.0)[:, None].expand(-1, 3).div(7).half()
    np.testing.assert_array_equal(store.arrays.get("image_features")[:, 0], expected_BG[:, 0].numpy())
    rows = np.array([3, 5])
    images = store.images(np.arange(12)).take(rows, np.zeros_like(rows))
    assert images.image_features_BG[:, 0].tolist() == expected_BG[rows, 0].float().tolist()
    pairs = store.pairs(np.arange(12), seed=0)
    taken = pairs.take(np.array([0]), np.array([0]))
    assert taken.image_features_BG[0, 0] == expected_BG[int(taken.tokens_BN[0, 0]), 0]


def test_chosen_items_only_and_in_that_order(photos, tmp_path):
    store = encode(open_source(str(photos)), tmp_path / "store", tokenizers(), indices=np.array([7, 2, 4]))
    assert store.arrays.get("tokens")[:, 0].tolist() == [7, 2, 4]
    assert store.arrays.get("counts").tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("left_out", "array"), [("tokenize_images", "tokens"), ("tokenize_texts", "ids"), ("text_features", "features")]
)
def test_a_side_without_tokenizer_is_left_out(photos, tmp_path, left_out, array):
    store = encode(open_source(str(photos)), tmp_path / "store", tokenizers(**{left_out: None}))
    assert (store.has_images, store.has_captions) == (array != "tokens", array != "ids")
    assert hasattr(store, "captions") == (array != "ids")  # isinstance asks in random order and failed now and then
    assert store.arrays.get(array) is None


class Failing:
    """A tokenizer that is killed at its ``at``-th call."""

    def __init__(self, tokenizer, at: int) -> None:
        self.tokenizer, self.calls, self.at = tokenizer, 0, at

    def __call__(self, value):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.tokenizer(value)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_encoding_goes_on_to_the_same_bytes(photos, tmp_path, at):
    source = open_source(str(photos))
    encode(source, tmp_path / "whole", tokenizers())
    with pytest.raises(KeyboardInterrupt):
        encode(source, tmp_path / "cut", tokenizers(tokenize_texts=Failing(ids_of, at)))
    assert not (tmp_path / "cut").exists()
    counting = Failing(tokens_of, 100)
    encode(source, tmp_path / "cut", tokenizers(tokenize_images=counting))
    assert counting.calls == 3 - (at - 1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_kill_between_the_files_of_a_chunk_leaves_no_trace(photos, tmp_path, monkeypatch):
    """No caption in the first chunk: `ids` begins in the one that is killed after its files are written."""
    source, order = open_source(str(photos)), np.array([0, 3, 6, 9, 0, 1, 2, 4])
    encode(source, tmp_path / "whole", tokenizers(), indices=order)
    write, calls = engine._write_json, []

    def killed_the_second_time(path, value):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(engine, "_write_json", killed_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        encode(source, tmp_path / "cut", tokenizers(), indices=order)
    assert (tmp_path / ".cut.partial/ids.npy").stat().st_size > 0
    encode(source, tmp_path / "cut", tokenizers(), indices=order)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", [{"fingerprint": "two"}, {"indices": np.arange(11)}, {"source": "other"}], ids=lambda c: next(iter(c))
)
def test_half_an_encoding_of_something_else_is_not_continued(photos, tmp_path, change):
    source = open_source(str(photos))
    with pytest.raises(KeyboardInterrupt):
        encode(source, tmp_path / "store", tokenizers(tokenize_images=Failing(tokens_of, 2)))
    counting = Failing(tokens_of, 100)
    if "source" in change:
        photos.rename(photos.with_name("other"))
        source = open_source(str(photos.with_name("other")))
    now = tokenizers(tokenize_images=counting, fingerprint=change.get("fingerprint", "one"))
    store = encode(source, tmp_path / "store", now, indices=change.get("indices"))
    assert counting.calls == 3
    assert len(store) == len(change.get("indices", range(12)))
    assert store.manifest["made_by"]["tokenizers"] == now.fingerprint


def test_unreadable_images_are_left_out_with_their_captions_and_listed(photos, tmp_path):
    (photos / "04.png").write_bytes(b"\x89PNG no more")
    store = encode(open_source(str(photos)), tmp_path / "store", tokenizers(), max_skipped_share=0.1)
    assert store.arrays.get("tokens")[:, 0].tolist() == [i for i in range(12) if i != 4]
    assert store.arrays.get("counts").tolist() == [i % 3 for i in range(12) if i != 4]
    (line,) = (tmp_path / "store/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "04.png"
    assert "04.png" in json.loads(line)["reason"]
    assert store.manifest["skipped"] == 1


def test_more_than_one_percent_unreadable_stops(photos, tmp_path):
    (photos / "04.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 12 items are unreadable.*04\.png.*empty") as caught:
        encode(open_source(str(photos)), tmp_path / "store", tokenizers())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_a_chunk_without_a_readable_image(photos, tmp_path):
    for i in range(5):
        (photos / f"{i:02d}.png").write_bytes(b"")
    store = encode(open_source(str(photos)), tmp_path / "store", tokenizers(), max_skipped_share=0.5)
    assert store.arrays.get("tokens")[:, 0].tolist() == list(range(5, 12))
    assert store.arrays.get("counts").tolist() == [i % 3 for i in range(5, 12)]
    cut = tokenizers(tokenize_texts=Failing(ids_of, 2))  # the array of counts has no row yet
    with pytest.raises(KeyboardInterrupt):
        encode(open_source(str(photos)), tmp_path / "cut", cut, max_skipped_share=0.5)
    encode(open_source(str(photos)), tmp_path / "cut", tokenizers(), max_skipped_share=0.5)
    assert contents(tmp_path / "cut") == contents(tmp_path / "store")


def test_nothing_to_encode(photos, tmp_path):
    with pytest.raises(UserError, match="nothing to encode"):
        encode(open_source(str(photos)), tmp_path / "store", tokenizers(), indices=np.empty(0, np.int64))
    assert not (tmp_path / "store").exists()


def test_only_encoded_data_is_replaced(photos, tmp_path):
    before = contents(photos)
    for out in (photos, photos / "01.png"):
        with pytest.raises(UserError, match="holds no encoded data"):
            encode(open_source(str(photos)), out, tokenizers())
    assert contents(photos) == before
    (tmp_path / "store").mkdir()
    for indices in (np.arange(3), np.arange(6)):
        encode(open_source(str(photos)), tmp_path / "store", tokenizers(), indices=indices)
    assert len(Store.open(tmp_path / "store")) == 6


def test_keys_that_are_no_text(photos, tmp_path):
    for name in (b"\xff\xfe.png", b"two\nlines.png"):
        os.link(photos / "01.png", os.fsencode(photos) + b"/" + name)
    store = encode(open_source(str(photos)), tmp_path / "store", tokenizers())
    assert len(store) == 14
    assert (tmp_path / "store/keys.txt").read_bytes().splitlines()[-2:] == [b"two lines.png", b"\xff\xfe.png"]


def test_texts_and_progress(tmp_path):
    (tmp_path / "texts.txt").write_text("".join(f"t{i}\n" for i in range(7)))
    seen = []
    source = TextSource([tmp_path / "texts.txt"], name="texts")
    store = encode(source, tmp_path / "store", tokenizers(tokenize_images=None), advance=lambda *at: seen.append(at))
    assert store.arrays.get("counts").tolist() == [1] * 7
    assert seen == [(5, 7), (7, 7)]
