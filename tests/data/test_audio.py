import io
import json
import sys
import tarfile

import numpy as np
import pytest
import soundfile

from diptych.data.audio import AudioTar, MelConfig, log_mel, read_audio, write_frames
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
