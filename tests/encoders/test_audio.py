import io
import json
import sys
import tarfile

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from diptych.encoders import encoder_width, open_audio_encoder
from diptych.encoders.audio import AudioTar, MelConfig, log_mel, read_audio, write_frames
from diptych.errors import UserError

RATE = 16_000
MEL = MelConfig()


def tone(hertz: float, *, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(wave: np.ndarray, *, rate: int = RATE, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind)
    return file.getvalue()


def make_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("kind", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.1)])
def test_files_of_every_kind_are_read(tmp_path, kind, tolerance):
    wave = tone(440)
    (tmp_path / "a").write_bytes(encoded(wave, kind=kind))
    found = read_audio(tmp_path / "a", rate=RATE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[200:-200], wave[200:-200], atol=tolerance)


def test_channels_are_averaged():
    both = np.stack([tone(440), np.zeros(8000, np.float32)], axis=1)
    np.testing.assert_allclose(read_audio(encoded(both), rate=RATE), tone(440) / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_other_rates_are_resampled(rate):
    """A whole number of periods, so that the signal has no edge."""
    found = read_audio(encoded(tone(440, rate=rate), rate=rate), rate=RATE)
    np.testing.assert_allclose(found, tone(440), atol=1e-3)


def test_a_tone_is_loudest_in_its_band():
    centres = 700 * (np.exp(np.linspace(*np.log1p(np.array([20, 8000]) / 700), MEL.bands + 2)) - 1)[1:-1]
    for band in (10, 30, 60):
        frames_NF = log_mel(tone(centres[band]), MEL)
        assert (frames_NF.argmax(1) == band).all()


def test_frames_by_hand():
    """The power spectrum of a frame under a periodic Hann window, through triangles, log."""
    config = MelConfig(window=64, hop=32, bands=5)
    wave = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.array([20, 8000]) / 700)), 7) / 2595) - 1)
    hertz = np.arange(33) * RATE / 64
    frames_NF = log_mel(wave, config)
    assert frames_NF.shape == (1 + (200 - 64) // 32, 5)
    for n in range(len(frames_NF)):
        power = np.abs(np.fft.rfft(wave[32 * n : 32 * n + 64] * window)) ** 2
        for f in range(5):
            low, peak, high = edges[f : f + 3]
            triangle = np.clip(np.minimum((hertz - low) / (peak - low), (high - hertz) / (high - peak)), 0, None)
            assert frames_NF[n, f] == pytest.approx(np.log(max((triangle * power).sum(), 1e-8)), abs=1e-3)


def test_silence_and_short_clips_have_frames():
    np.testing.assert_allclose(log_mel(np.zeros(800, np.float32), MEL), np.log(MEL.floor), rtol=1e-5)
    assert log_mel(tone(440)[:10], MEL).shape == (1, 64)


def test_a_tar_becomes_a_store(tmp_path):
    config = MelConfig(window=512, hop=256, bands=8)
    short, long = tone(440, seconds=0.1), tone(880, seconds=0.4)
    members = {"b.ogg": encoded(long, kind="OGG"), "b.json": b'{"label": "Rain", "fold": 2}'}
    members |= {"a.wav": encoded(short), "a.json": b'{"label": "Wind", "fold": 1}'}
    tar = make_tar(tmp_path / "clips.tar", members)
    store = write_frames(tar, tmp_path / "store", config=config, seconds=0.2)
    assert store.keys == ["a", "b"]
    assert store.manifest["classes"] == ["Rain", "Wind"]
    assert (store.array("labels").tolist(), store.array("fold").tolist()) == ([1, 0], [1, 2])
    frames_NF = log_mel(read_audio(encoded(short), rate=RATE), config)
    assert store.array("lengths").tolist() == [len(frames_NF), 1 + (3200 - 512) // 256]
    np.testing.assert_allclose(store.vectors[0, : len(frames_NF)], frames_NF, atol=0.02)
    assert not store.vectors[0, len(frames_NF) :].any()


def test_fields_that_some_clips_lack_are_left_out(tmp_path):
    tar = make_tar(tmp_path / "clips.tar", {"a.wav": encoded(tone(440)), "b.wav": encoded(tone(440)), "b.json": b"{}"})
    store = write_frames(tar, tmp_path / "store", config=MEL)
    assert store.array("labels") is None
    assert AudioTar(tar).fields == [{}, {}]


def test_mistakes_are_told(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"no audio at all")
    with pytest.raises(UserError, match=r"a\.wav: cannot be read as audio"):
        read_audio(tmp_path / "a.wav", rate=RATE)
    with pytest.raises(UserError, match="of no length"):
        read_audio(encoded(np.zeros(0, np.float32)), rate=RATE)
    with pytest.raises(UserError, match="holds no audio"):
        AudioTar(make_tar(tmp_path / "empty.tar", {"a.json": json.dumps({}).encode()}))
    with pytest.raises(UserError, match=r"a\.json is not a JSON object"):
        AudioTar(make_tar(tmp_path / "bad.tar", {"a.json": b"[1", "a.wav": encoded(tone(440))}))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"pip install 'diptych\[audio\]'"):
        read_audio(tmp_path / "a.wav", rate=RATE)


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def waves():
    generator = np.random.default_rng(0)
    return [generator.normal(size=length).astype(np.float32) * 0.1 for length in (1600, 800)]


def wav2vec2(folder):
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    # Layer norm, as in the larger models: with group norm padding reaches the features through its statistics.
    norm = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    Wav2Vec2Model(Wav2Vec2Config(**SIZES, **convolutions, **positions, **norm)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)


def ast(folder):
    ASTModel(ASTConfig(**SIZES, max_length=64, num_mel_bins=32, patch_size=8)).save_pretrained(folder)
    ASTFeatureExtractor(max_length=64, num_mel_bins=32).save_pretrained(folder)


def whisper(folder):
    halves = {f"{half}_{part}": 2 for half in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    feed_forward = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 0}
    config = WhisperConfig(d_model=16, max_source_positions=50, vocab_size=20, **halves, **feed_forward)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)


@pytest.mark.parametrize("save", [wav2vec2, ast, whisper])
def test_any_family_gives_one_vector_for_a_clip(save, waves, tmp_path):
    save(tmp_path)
    encoder = open_audio_encoder(tmp_path).requires_grad_(False)
    both = encoder(waves)
    assert both.shape == (2, encoder.width)
    assert encoder.width == encoder_width(tmp_path, "audio") == 16
    assert encoder.rate == 16000
    assert not torch.equal(both[0], both[1])
    encoder.save_pretrained(tmp_path / "run" / "encoder")
    torch.testing.assert_close(open_audio_encoder(tmp_path / "run")(waves).detach(), both)


def test_padding_of_a_shorter_clip_changes_nothing(waves, tmp_path):
    wav2vec2(tmp_path)
    encoder = open_audio_encoder(tmp_path).requires_grad_(False)
    features, valid = encoder.tokens(waves)
    assert valid.sum(1)[0] > valid.sum(1)[1] > 0
    assert not features[~valid].any()
    torch.testing.assert_close(encoder(waves)[1:], encoder(waves[1:]), rtol=1e-3, atol=1e-4)
