import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data import encode as encode_module
from diptych.data import store as store_module
from diptych.data.encode import DataTokenizers, encode
from diptych.data.sources import open_source
from diptych.data.sources.text import TextSource
from diptych.data.store import Store
from diptych.errors import UserError

SIZE, LENGTH, WIDTH = 4, 12, 3


def tokens_of(pixels_B3HW: torch.Tensor) -> torch.Tensor:
    return pixels_B3HW[:, 0].flatten(1).long()


def ids_of(texts: list[str]) -> torch.Tensor:
    rows = [[*(ord(letter) for letter in text[: LENGTH - 1]), 1] for text in texts]
    return torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in rows])


def features_of(ids_BL: torch.Tensor) -> torch.Tensor:
    return ids_BL[..., None] * torch.tensor([1.0, 0.1, -1 / 3])


def tokenizers(**changes) -> DataTokenizers:
    made = {"tokenize_images": tokens_of, "tokenize_texts": ids_of, "text_features": features_of}
    return DataTokenizers(**{"image_size": SIZE, "fingerprint": "one", **made, **changes})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(encode_module, "_CHUNK", 5)


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


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_stored_is_what_the_tokenizers_gave(photos, tmp_path):
    source = open_source(str(photos))
    store = encode(source, tmp_path / "store", tokenizers())
    texts = [text for i in range(12) for text in source.captions(i)]
    assert (len(store), store.has_images, store.has_captions) == (12, True, True)
    assert store.array("tokens").tolist() == [[i] * SIZE**2 for i in range(12)]
    assert store.array("counts").tolist() == [i % 3 for i in range(12)]
    assert store.array("ids").tolist() == ids_of(texts).tolist()
    assert store.array("features").dtype == np.float16
    np.testing.assert_array_equal(store.array("features"), features_of(ids_of(texts)).half().numpy())
    assert (tmp_path / "store/keys.txt").read_text().split() == [f"{i:02d}.png" for i in range(12)]
    assert not (tmp_path / "store/skipped.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_features_of_images_are_stored_beside_their_tokens(photos, tmp_path):
    made = tokenizers(image_features=lambda pixels_B3HW: pixels_B3HW.float().mean((2, 3)) / 7)
    store = encode(open_source(str(photos)), tmp_path / "store", made)
    expected_BG = torch.arange(12.0)[:, None].expand(-1, 3).div(7).half()
    np.testing.assert_array_equal(store.array("image_features")[:, 0], expected_BG[:, 0].numpy())
    rows = np.array([3, 5])
    images = store.images(np.arange(12)).take(rows, np.zeros_like(rows))
    assert images.image_features_BG[:, 0].tolist() == expected_BG[rows, 0].float().tolist()
    pairs = store.pairs(np.arange(12), seed=0)
    taken = pairs.take(np.array([0]), np.array([0]))
    assert taken.image_features_BG[0, 0] == expected_BG[int(taken.tokens_BN[0, 0]), 0]


def test_chosen_items_only_and_in_that_order(photos, tmp_path):
    store = encode(open_source(str(photos)), tmp_path / "store", tokenizers(), indices=np.array([7, 2, 4]))
    assert store.array("tokens")[:, 0].tolist() == [7, 2, 4]
    assert store.array("counts").tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("left_out", "array"), [("tokenize_images", "tokens"), ("tokenize_texts", "ids"), ("text_features", "features")]
)
def test_a_side_without_tokenizer_is_left_out(photos, tmp_path, left_out, array):
    store = encode(open_source(str(photos)), tmp_path / "store", tokenizers(**{left_out: None}))
    assert (store.has_images, store.has_captions) == (array != "tokens", array != "ids")
    assert store.array(array) is None


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
    write, calls = store_module._write_json, []

    def killed_the_second_time(path, value):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(store_module, "_write_json", killed_the_second_time)
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
    assert store.array("tokens")[:, 0].tolist() == [i for i in range(12) if i != 4]
    assert store.array("counts").tolist() == [i % 3 for i in range(12) if i != 4]
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
    assert store.array("tokens")[:, 0].tolist() == list(range(5, 12))
    assert store.array("counts").tolist() == [i % 3 for i in range(5, 12)]
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
    assert store.array("counts").tolist() == [1] * 7
    assert seen == [(5, 7), (7, 7)]
