import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from diptych.cli.training import features
from diptych.data.pixels import SkippedItems
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.data.store import VectorStore, write_vectors
from diptych.data.streams import BatchSampler
from diptych.encoders import (
    ScratchConfig,
    open_audio_encoder,
    open_image_encoder,
    open_text_encoder,
    scratch_encoder,
)
from diptych.errors import UserError
from diptych.nn.inference import eval_mode
from diptych.uml.data import (
    LabelledFeatures,
    LabelledImages,
    choose_shots,
    image_features,
    mean_and_scale,
    read_rows,
    sequence_stream,
    text_features,
)


@pytest.fixture
def of_two_classes() -> LabelledFeatures:
    labels = np.array([0, 0, 0, 1, 1, 1])
    return LabelledFeatures(vectors_ND=np.arange(12, dtype=np.float64).reshape(6, 2), labels_N=labels)


def test_a_stream_gives_the_vectors_and_labels_of_the_rows_asked_for(of_two_classes):
    stream = of_two_classes.stream()
    examples = stream.take(np.array([4, 1]), np.zeros(2, int))
    assert stream.size == 6
    assert examples.vectors_BD.tolist() == [[8, 9], [2, 3]]
    assert examples.vectors_BD.dtype == torch.float32
    assert examples.labels_B.tolist() == [1, 0]


def test_shots_are_all_features_or_random_ones_or_the_mean_of_each_class(of_two_classes):
    assert choose_shots(of_two_classes, shots="all", seed=0) is of_two_classes
    mean = choose_shots(of_two_classes, shots="mean", seed=0)
    assert (mean.vectors_ND.tolist(), mean.labels_N.tolist()) == ([[2, 3], [8, 9]], [0, 1])
    two = choose_shots(of_two_classes, shots=2, seed=0)
    assert two.labels_N.tolist() == [0, 0, 1, 1]
    assert len(np.unique(two.vectors_ND, axis=0)) == 4
    assert np.isin(two.vectors_ND, of_two_classes.vectors_ND).all()


def test_an_image_that_replaces_an_unreadable_one_brings_its_own_class(labelled_images):
    skipped = SkippedItems(max_skipped_share=0.5)
    examples = LabelledImages(labelled_images, np.arange(4), size=4, skipped=skipped, cache_mb=0)
    batch = examples.stream().take(np.arange(4), np.zeros(4, int))
    assert batch.labels_B.tolist() == [0, 0, 1, 0]  # the last is the first image again
    assert batch.pixels_B3HW.float().mean((1, 2, 3)).tolist() == [0, 0, 255, 0]
    assert len(skipped) == 1


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


def test_an_unreadable_image_is_left_out_and_told(folder, tmp_path_factory):
    (folder / "2.png").write_bytes(b"nothing")
    skipped = SkippedItems(max_skipped_share=0.5)
    options = {"cache": tmp_path_factory.mktemp("cache"), "skipped": skipped}
    store = image_features(scratch_encoder(CONFIG, seed=0), open_source(str(folder)), np.arange(5), **options)
    assert store.array("items").tolist() == [0, 1, 3, 4]
    assert list(skipped.reasons) == ["2.png"]
    options = {"cache": tmp_path_factory.mktemp("strict"), "skipped": SkippedItems(max_skipped_share=0.0)}
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


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_tokens_of_texts(text_encoder, tmp_path, capsys):
    text_encoder.save_pretrained(tmp_path / "encoder")
    texts = ["a red ring", "top left a blue square and bottom right a red ring and top right a white cross"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    features(
        str(tmp_path / "texts.txt"), kind="texts", encoder=str(tmp_path / "encoder"), out=tmp_path / "store", length=8
    )
    store = VectorStore.open(tmp_path / "store")
    x_BLD, valid_BL = open_text_encoder(tmp_path / "encoder").tokens(texts)
    lengths = valid_BL.sum(1).clamp(max=8)
    assert (store.keys, store.array("lengths").tolist()) == (texts, lengths.tolist())
    assert lengths[0] < 8
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(store.vectors[row, :length], x_BLD[row, :length], atol=2e-3)
        assert not store.vectors[row, length:].any()
    assert "2 texts" in capsys.readouterr().out


def test_tokens_of_images_keep_their_classes(tmp_path):
    torch.manual_seed(0)
    encoder = tmp_path / "encoder"
    ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL)).save_pretrained(encoder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (encoder / "preprocessor_config.json").write_text(json.dumps(settings))
    for name, grey in (("white", 255), ("black", 0)):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / "images" / name / "1.png")
    features(str(tmp_path / "images"), kind="images", encoder=str(encoder), out=tmp_path / "store", length=5)
    store = VectorStore.open(tmp_path / "store")
    assert store.manifest["classes"] == ["black", "white"]
    assert store.vectors.shape == (2, 5, 16)  # four patches and the class token
    network = open_image_encoder(encoder)
    for row, label in enumerate(store.array("labels")):
        pixels = torch.full((1, 3, 8, 8), 255 * int(label), dtype=torch.uint8)
        with eval_mode(network):
            np.testing.assert_allclose(store.vectors[row], network.tokens(pixels)[0], atol=2e-3)


@pytest.fixture
def clips(tmp_path):
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for key, seconds in (("a", 0.3), ("b", 0.1)):
            file = io.BytesIO()
            wave = np.random.default_rng(0).uniform(-0.5, 0.5, round(16_000 * seconds))
            soundfile.write(file, wave, 16_000, format="WAV")
            for name, data in ((f"{key}.wav", file.getvalue()), (f"{key}.json", b'{"label": "Rain", "fold": 3}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path / "clips.tar"


def test_audio_without_an_encoder_become_log_mel_frames(clips, tmp_path):
    features(str(clips), kind="audio", out=tmp_path / "store", length=10, hop=400)
    store = VectorStore.open(tmp_path / "store")
    assert store.vectors.shape == (2, 10, 64)
    assert store.array("lengths").tolist() == [10, 4]
    assert (store.array("labels").tolist(), store.array("fold").tolist()) == ([0, 0], [3, 3])


def test_audio_through_an_encoder(clips, tmp_path):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **SMALL,
        conv_dim=(8, 8),
        conv_stride=(20, 16),
        conv_kernel=(20, 16),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2Model(config).save_pretrained(tmp_path / "encoder")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "encoder")
    features(str(clips), kind="audio", encoder=str(tmp_path / "encoder"), out=tmp_path / "store", length=20)
    store = VectorStore.open(tmp_path / "store")
    assert open_audio_encoder(tmp_path / "encoder").width == store.vectors.shape[2] == 16
    assert store.array("lengths").tolist() == [15, 5]  # 4,800 and 1,600 samples at 320 a frame
    assert store.manifest["classes"] == ["Rain"]


def test_mistakes_are_told(tmp_path):
    (tmp_path / "texts.txt").write_text("a text")
    with pytest.raises(UserError, match="give --encoder"):
        features(str(tmp_path / "texts.txt"), kind="texts", out=tmp_path / "store")
    with pytest.raises(UserError, match="has no images"):
        features(str(tmp_path / "texts.txt"), kind="images", encoder="any", out=tmp_path / "store")
    with pytest.raises(UserError, match="choose another folder"):
        features("any", kind="audio", out=tmp_path)


def store_of(folder, vectors: np.ndarray, **arrays: np.ndarray) -> VectorStore:
    keys = [str(number) for number in range(len(vectors))]
    return write_vectors(folder, [{"vectors": vectors} | arrays], keys=keys, manifest={})


@pytest.fixture
def store(tmp_path) -> VectorStore:
    vectors = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float16)
    return store_of(tmp_path / "s", vectors, lengths=np.array([4, 1, 2, 3, 1, 2]))


def test_rows_are_cut_to_the_longest(store):
    rows = read_rows(store, np.array([5, 1]))
    assert rows.valid_BS.tolist() == [[True, True], [True, False]]
    assert rows.features_BSF.dtype == torch.float32
    np.testing.assert_array_equal(rows.features_BSF, store.vectors[[5, 1], :2].astype(np.float32))


def test_without_lengths_everything_is_real(tmp_path):
    vectors = np.arange(12, dtype=np.float32)
    assert read_rows(store_of(tmp_path / "a", vectors.reshape(2, 3, 2)), np.array([0])).valid_BS.all()
    flat = read_rows(store_of(tmp_path / "b", vectors.reshape(4, 3)), np.array([2]))
    assert flat.features_BSF.tolist() == [[[6, 7, 8]]]
    assert flat.valid_BS.tolist() == [[True]]


def test_statistics_leave_padding_out(store, monkeypatch):
    monkeypatch.setattr("diptych.uml.data._STATISTICS_ROWS", 4)  # in two pieces
    lengths = store.array("lengths")
    real = np.concatenate([store.vectors[i, : lengths[i]] for i in range(6)]).astype(np.float64)
    mean, scale = mean_and_scale(store)
    np.testing.assert_allclose(mean, real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(scale, real.std(0), rtol=1e-5)


def test_a_constant_feature_has_a_scale(tmp_path):
    _, scale = mean_and_scale(store_of(tmp_path / "s", np.ones((5, 2), np.float32)))
    assert (scale > 0).all()


def test_a_stream_of_every_store_gives_the_items_of_an_epoch_once(store):
    batches = BatchSampler({"audio": sequence_stream(store)}, multiples={"audio": 1}, batch_size=3, seed=0)
    seen = [int(n) for step in range(2) for n in batches(step)["audio"].valid_BS.sum(1)]
    assert sorted(seen) == sorted(store.array("lengths"))


@pytest.mark.parametrize("wrong", [0, 5])
def test_impossible_lengths_are_told(tmp_path, wrong):
    bad = store_of(tmp_path / "s", np.zeros((2, 4, 3), np.float32), lengths=np.array([2, wrong]))
    with pytest.raises(UserError, match="but 1 to 4 is"):
        sequence_stream(bad)
