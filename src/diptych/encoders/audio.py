"""Audio: files to waveforms and log-mel frames, a tar of labelled clips to a store of frames, and audio encoders.

`soundfile` reads the files (the extra `audio`). The spectrogram is that of `transformers.audio_utils`, and an encoder
is any audio model of `transformers`.

Shapes: T samples, F mel bands, B clips, N frames, D width of the features.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.data.sources.webdataset import Member, members, read
from diptych.data.store import VectorStore, write_vectors
from diptych.encoders.loading import load, load_weights, resolve, width_of
from diptych.errors import UserError
from diptych.io import without_progress_bars

SUFFIXES = (".ogg", ".wav", ".flac")
_WHAT = "an audio model"


@dataclass(kw_only=True, slots=True)
class MelConfig:
    """Log-mel frames. The defaults are the usual ones of speech and audio recognition: 25 ms every 10 ms, 64 bands."""

    rate: int = 16_000
    """Sampling rate in samples a second; audio of another rate is resampled."""
    window: int = 400
    """Length of a frame in samples, under a Hann window."""
    hop: int = 160
    """Distance from one frame to the next in samples."""
    bands: int = 64
    """Number F of triangular filters, evenly spaced on the HTK mel scale."""
    low: float = 20.0
    """Frequency in Hz at which the lowest filter begins. The highest ends at half the rate."""
    floor: float = 1e-8
    """Smallest power of a band, so that silence has a logarithm."""


def read_audio(file: str | Path | bytes, *, rate: int, name: str | None = None) -> Float[np.ndarray, "T"]:
    """The mean of the channels of an audio file, samples in [-1, 1] at ``rate`` samples a second.

    ``name`` is what messages call the file. Raises UserError for what is not audio, for audio without samples, and
    without `soundfile`.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel came without its C library
        raise UserError("reading audio needs soundfile: pip install 'diptych[audio]'") from error
    name = name or (str(file) if not isinstance(file, bytes) else "audio")
    try:
        samples, found = soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else file, dtype="float32")
    except (OSError, RuntimeError) as error:  # soundfile's own errors are RuntimeErrors
        raise UserError(f"{name}: cannot be read as audio ({error}); convert it to wav, flac or ogg") from error
    wave = samples if samples.ndim == 1 else samples.mean(1)
    if not len(wave):
        raise UserError(f"{name}: is audio of no length; leave it out")
    return wave if found == rate else _resampled(wave, round(len(wave) * rate / found))


def _resampled(wave_T: np.ndarray, samples: int) -> np.ndarray:
    """The same audio in so many samples: its spectrum is cut or filled up with zeros."""
    spectrum = np.fft.rfft(wave_T)
    kept = np.zeros(samples // 2 + 1, spectrum.dtype)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    return (np.fft.irfft(kept, samples) * (samples / len(wave_T))).astype(np.float32)


def log_mel(wave_T: Float[np.ndarray, "T"], config: MelConfig) -> Float[np.ndarray, "N F"]:
    """The logarithm of the power in each mel band, frame by frame. Audio shorter than a frame is filled up with 0."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    c = config
    filters = mel_filter_bank(
        c.window // 2 + 1, c.bands, min_frequency=c.low, max_frequency=c.rate / 2, sampling_rate=c.rate
    )
    log_mel_FN = spectrogram(
        np.pad(wave_T, (0, max(0, c.window - len(wave_T)))),
        window_function(c.window, "hann"),
        frame_length=c.window,
        hop_length=c.hop,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=c.floor,
        log_mel="log",
    )
    return log_mel_FN.T.astype(np.float32)


class AudioTar:
    """A WebDataset tar of audio clips: key.ogg (or .wav, .flac) and key.json, in the order of the keys."""

    def __init__(self, path: Path) -> None:
        """Read the json members and no audio. Raises UserError for a tar without audio and for damaged json."""
        self.path = path
        found = {member.name: member for member in members(path)}
        clips = sorted(name for name in found if Path(name).suffix.lower() in SUFFIXES)
        if not clips:
            raise UserError(f"{path}: holds no audio (key{', key'.join(SUFFIXES)})")
        self.keys = [str(Path(name).with_suffix("")) for name in clips]
        self._clips = [found[name] for name in clips]
        self.fields = [self._json(found.get(f"{key}.json")) for key in self.keys]
        """The content of each clip's json; an empty dict for a clip that has none."""

    def __len__(self) -> int:
        return len(self.keys)

    def wave(self, i: int, *, rate: int) -> Float[np.ndarray, "T"]:
        """Clip ``i`` as `read_audio` gives it."""
        member = self._clips[i]
        return read_audio(self._read(member), rate=rate, name=f"{self.path}: {member.name}")

    def column(self, name: str) -> list[Any] | None:
        """One field of the json of every clip, or None if a clip lacks it."""
        return [fields[name] for fields in self.fields] if all(name in fields for fields in self.fields) else None

    def labels(self) -> tuple[list[str], dict[str, np.ndarray]]:
        """The names of the classes, sorted, and arrays [clips] of the fields that every clip's json has.

        The arrays are ``labels``, indices into the classes, from the field `label`, and ``fold`` from the field `fold`.
        """
        arrays: dict[str, np.ndarray] = {}
        labels, folds = self.column("label"), self.column("fold")
        classes = sorted({str(label) for label in labels or ()})
        if labels is not None:
            arrays["labels"] = np.array([classes.index(str(label)) for label in labels])
        if folds is not None:
            arrays["fold"] = np.array([int(fold) for fold in folds])
        return classes, arrays

    def _read(self, member: Member) -> bytes:
        return read(self.path, member.offset, member.size)

    def _json(self, member: Member | None) -> dict[str, Any]:
        if member is None:
            return {}
        try:
            return dict(json.loads(self._read(member)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: {member.name} is not a JSON object {{...}} ({error})") from None


def write_frames(tar: Path, out: Path, *, config: MelConfig, seconds: float = 5.0) -> VectorStore:
    """Write log-mel frames [clips, N, F], float16, of the first ``seconds`` of each clip of ``tar`` into ``out``.

    The further arrays of the store are ``lengths``, the number of real frames [clips], and those of `AudioTar.labels`.
    The manifest holds the ``classes``.
    """
    clips = AudioTar(tar)
    longest = max(1, 1 + (round(seconds * config.rate) - config.window) // config.hop)
    classes, arrays = clips.labels()

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for i in range(len(clips)):
            frames_NF = log_mel(clips.wave(i, rate=config.rate), config)[:longest].astype(np.float16)
            padded_NF = np.pad(frames_NF, ((0, longest - len(frames_NF)), (0, 0)))
            row = {"vectors": padded_NF[None], "lengths": np.array([len(frames_NF)])}
            yield row | {name: array[i : i + 1] for name, array in arrays.items()}

    manifest = {"made_by": {"mel": asdict(config), "seconds": seconds}, "classes": classes}
    return write_vectors(out, batches(), keys=clips.keys, manifest=manifest)


class AudioEncoder(nn.Module):
    """An audio model of `transformers` with its feature extractor: from waveforms to features [B D].

    wav2vec 2.0, HuBERT and their like read the waveform; AST and Whisper's encoder read a spectrogram of fixed length.
    The feature of a clip is the mean over its valid frames. All frames of a spectrogram of fixed length are valid,
    because those models were trained to see its padding.
    """

    width: int
    """D."""
    rate: int
    """Sampling rate, in Hz, that waveforms must have."""
    preprocessing: dict[str, Any]
    """What decides the features besides the weights."""

    def __init__(self, network: Any, extractor: Any) -> None:
        super().__init__()
        self.network: Any = network
        self.extractor = extractor
        self.width = width_of(network.config, "audio")
        self.rate = extractor.sampling_rate
        self.preprocessing = {"rate": self.rate, "pooling": "mean"}

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """From a folder, which needs no internet, or a hub name. Raises UserError if it cannot be loaded."""
        network, _ = load_weights(name, _WHAT, transformers.AutoModel)
        return cls(network, load(name, _WHAT, transformers.AutoFeatureExtractor.from_pretrained)).eval()

    def forward(self, waves: Sequence[np.ndarray]) -> Float[Tensor, "B D"]:
        """One vector for each clip. ``waves``: float32 samples in [-1, 1] at ``rate``."""
        features_BND, valid_BN = self.tokens(waves)
        weight_BN1 = valid_BN[..., None].to(features_BND.dtype)
        return (features_BND * weight_BN1).sum(1) / weight_BN1.sum(1)

    def tokens(self, waves: Sequence[np.ndarray]) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"]]:
        """Features of every frame, zero at padding, and which frames are valid."""
        device = next(self.network.parameters()).device
        options: dict[str, Any] = {"sampling_rate": self.rate, "return_tensors": "pt"}
        # Models that read waveforms share no class in transformers, only this method.
        has_mask = hasattr(self.network, "_get_feature_vector_attention_mask")
        reads_waves = has_mask and self.network.main_input_name == "input_values"
        if reads_waves:
            options |= {"padding": True, "return_attention_mask": True}
        inputs = {name: value.to(device) for name, value in self.extractor(list(waves), **options).items()}
        # Whisper has a decoder, which is not needed.
        network = self.network.get_encoder() if self.network.config.is_encoder_decoder else self.network
        features_BND = network(**inputs).last_hidden_state
        valid_BN = torch.ones(features_BND.shape[:2], dtype=torch.bool, device=device)
        if reads_waves:
            mask = self.network._get_feature_vector_attention_mask(features_BND.shape[1], inputs["attention_mask"])
            valid_BN = mask.bool()
        return features_BND.masked_fill(~valid_BN[..., None], 0.0), valid_BN

    @without_progress_bars()
    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that :func:`open_audio_encoder` reads, and `transformers` too."""
        self.network.save_pretrained(folder)
        self.extractor.save_pretrained(folder)


def open_audio_encoder(name: str | Path) -> AudioEncoder:
    """The encoder of a folder, hub name or run folder, in evaluation mode. Raises UserError if it cannot be loaded."""
    return AudioEncoder.from_pretrained(resolve(name, "audio"))
