import numpy as np
import pytest
import torch
from PIL import Image

from diptych.data.pixels import SkippedItems
from diptych.data.scenes.source import ScenesSource
from diptych.data.sources import open_source
from diptych.encoders import ScratchConfig, open_text_encoder, scratch_encoder
from diptych.errors import UserError
from diptych.nn.inference import eval_mode
from diptych.uml.features import image_features, text_features

CONFIG = ScratchConfig(image_size=16, patch=8, width=8, depth=1, heads=2)


@pytest.fixture
def folder(tmp_path):
    source = ScenesSource(count=5)
    for item in range(5):
        Image.fromarray(source.image(item, 16)).save(tmp_path / f"{item}.png")
    return tmp_path


def test_cached_features_are_those_of_the_encoder(tmp_path):
    source, encoder = ScenesSource(count=5), scratch_encoder(CONFIG, seed=0)
    items = np.array([3, 0, 4])
    encoder.train()
    store = image_features(encoder, source, items, cache=tmp_path, skipped=SkippedItems())
    assert encoder.training
    with eval_mode(encoder):
        expected = encoder(torch.from_numpy(source.images(items, 16)).permute(0, 3, 1, 2))
    torch.testing.assert_close(torch.tensor(store.vectors), expected)
    assert isinstance(store.vectors, np.memmap)
    assert store.array("items").tolist() == [3, 0, 4]
    assert store.keys == [source.key(int(item)) for item in items]


def test_they_are_made_once_and_again_when_anything_changes(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")

    def stores():
        return {path.name for path in cache.iterdir()}

    def make(*, seed=0, items=range(5)):
        source = open_source(str(folder))
        return image_features(
            scratch_encoder(CONFIG, seed=seed), source, np.array(items), cache=cache, skipped=SkippedItems()
        )

    make()
    make()
    assert len(stores()) == 1
    make(seed=1)
    make(items=range(4))
    assert len(stores()) == 3
    Image.new("RGB", (16, 16)).save(folder / "5.png")
    make()
    assert len(stores()) == 4


def test_an_unreadable_picture_is_left_out_and_told(folder, tmp_path_factory):
    (folder / "2.png").write_bytes(b"nothing")
    skipped = SkippedItems(max_skipped_share=0.5)
    options = {"cache": tmp_path_factory.mktemp("cache"), "skips": skipped}
    store = image_features(scratch_encoder(CONFIG, seed=0), open_source(str(folder)), np.arange(5), **options)
    assert store.array("items").tolist() == [0, 1, 3, 4]
    assert list(skipped.reasons) == ["2.png"]
    options = {"cache": tmp_path_factory.mktemp("strict"), "skips": SkippedItems(max_skipped_share=0.0)}
    with pytest.raises(UserError, match="over the tolerated"):
        image_features(scratch_encoder(CONFIG, seed=0), open_source(str(folder)), np.arange(5), **options)


def test_texts_are_encoded_once(text_encoder, scene_texts, tmp_path, monkeypatch):
    text_encoder.save_pretrained(tmp_path / "t5")
    encoder = open_text_encoder(tmp_path / "t5")
    first = text_features(encoder, scene_texts[:7], cache=tmp_path / "cache")
    torch.testing.assert_close(torch.tensor(first.vectors), encoder(scene_texts[:7]))
    other = text_features(encoder, scene_texts[1:8], cache=tmp_path / "cache")
    assert not np.array_equal(first.vectors[1:], other.vectors[1:])

    def refuse(*arguments, **options):
        raise AssertionError("a text was encoded again")

    monkeypatch.setattr(type(encoder), "forward", refuse)
    assert np.array_equal(text_features(encoder, scene_texts[:7], cache=tmp_path / "cache").vectors, first.vectors)
