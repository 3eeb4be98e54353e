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
from diptych.data.store import VectorStore
from diptych.encoders import open_audio_encoder, open_image_encoder, open_text_encoder
from diptych.errors import UserError
from diptych.nn.inference import eval_mode

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_tokens_of_texts(text_encoder, tmp_path, capsys):
    text_encoder.save_pretrained(tmp_path / "encoder")
    texts = ["a small red circle", "a large blue square in the top left on a white background"]
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
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / "photos" / name / "1.png")
    features(str(tmp_path / "photos"), kind="images", encoder=str(encoder), out=tmp_path / "store", length=5)
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


def test_sounds_without_an_encoder_become_log_mel_frames(clips, tmp_path):
    features(str(clips), kind="sounds", out=tmp_path / "store", length=10, hop=400)
    store = VectorStore.open(tmp_path / "store")
    assert store.vectors.shape == (2, 10, 64)
    assert store.array("lengths").tolist() == [10, 4]
    assert (store.array("labels").tolist(), store.array("fold").tolist()) == ([0, 0], [3, 3])


def test_sounds_through_an_encoder(clips, tmp_path):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(20, 16), conv_kernel=(20, 16), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(tmp_path / "encoder")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "encoder")
    features(str(clips), kind="sounds", encoder=str(tmp_path / "encoder"), out=tmp_path / "store", length=20)
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
        features("any", kind="sounds", out=tmp_path)
