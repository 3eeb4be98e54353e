"""Sounds: ogg, wav and flac to log-mel frames, and a tar of labelled clips to a store of them.

`soundfile` reads the files (the extra `audio`); the spectrogram is that of `transformers.audio_utils`.

Shapes: T samples, N frames, F mel bands.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from diptych.data.sources.webdataset import Member, members, read
from diptych.data.vectors import VectorStore, write_vectors
from diptych.errors import UserError

SUFFIXES = (".ogg", ".wav", ".flac")


@dataclass(kw_only=True, slots=True)
class MelConfig:
    """The usual frames of speech and sound recognition: 25 ms every 10 ms, 64 bands."""

    rate: int = 16_000
    """Samples a second; files of another rate are resampled."""
    window: int = 400
    """Samples of a frame, under a Hann window."""
    hop: int = 160
    """Samples from one frame to the next."""
    bands: int = 64
    """Triangular filters, evenly spaced on the HTK mel scale."""
    low: float = 20.0
    """Where the lowest filter begins, in Hz. The highest ends at half the rate."""
    floor: float = 1e-8
    """Least power, so that silence has a logarithm."""


def read_audio(file: str | Path | bytes, *, rate: int, name: str | None = None) -> Float[np.ndarray, "T"]:
    """Mono samples in [-1, 1] at ``rate``. Raises UserError for what is no sound, or an empty one."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel came without its C library
        raise UserError("reading sounds needs soundfile: pip install 'diptych[audio]'") from error
    name = name or (str(file) if not isinstance(file, bytes) else "a sound")
    try:
        samples, found = soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else file, dtype="float32")
    except (OSError, RuntimeError) as error:  # soundfile's own errors are RuntimeErrors
        raise UserError(f"{name}: cannot be read as a sound ({error}); convert it to wav, flac or ogg") from error
    wave = samples if samples.ndim == 1 else samples.mean(1)
    if not len(wave):
        raise UserError(f"{name}: is a sound of no length; leave it out")
    return wave if found == rate else _resampled(wave, round(len(wave) * rate / found))


def _resampled(wave_T: np.ndarray, samples: int) -> np.ndarray:
    """As many samples of the same sound: its spectrum cut or filled up with zeros."""
    spectrum = np.fft.rfft(wave_T)
    kept = np.zeros(samples // 2 + 1, spectrum.dtype)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    return (np.fft.irfft(kept, samples) * (samples / len(wave_T))).astype(np.float32)


def log_mel(wave_T: Float[np.ndarray, "T"], config: MelConfig) -> Float[np.ndarray, "N F"]:
    """The logarithm of the power in each mel band, frame by frame. A sound shorter than a frame is filled up."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    c = config
    filters = mel_filter_bank(
        c.window // 2 + 1, c.bands, min_frequency=c.low, max_frequency=c.rate / 2, sampling_rate=c.rate
    )
    wave_T = np.pad(wave_T, (0, max(0, c.window - len(wave_T))))
    found_FN = spectrogram(
        wave_T, window_function(c.window, "hann"), frame_length=c.window, hop_length=c.hop, power=2.0, center=False,
        mel_filters=filters, mel_floor=c.floor, log_mel="log",
    )  # fmt: skip
    return found_FN.T.astype(np.float32)


class ClipTar:
    """A WebDataset tar of sounds: key.ogg (or .wav, .flac) and key.json, in the order of the keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = {member.name: member for member in members(path)}
        sounds = sorted(name for name in found if Path(name).suffix.lower() in SUFFIXES)
        if not sounds:
            raise UserError(f"{path}: holds no sounds (key{', key'.join(SUFFIXES)})")
        self.keys = [str(Path(name).with_suffix("")) for name in sounds]
        self._sounds = [found[name] for name in sounds]
        self.fields = [self._json(found.get(f"{key}.json")) for key in self.keys]
        """What each clip's json says; an empty dict for a clip that has none."""

    def __len__(self) -> int:
        return len(self.keys)

    def wave(self, i: int, *, rate: int) -> Float[np.ndarray, "T"]:
        member = self._sounds[i]
        return read_audio(self._read(member), rate=rate, name=f"{self.path}: {member.name}")

    def column(self, name: str) -> list[Any] | None:
        """A field of every clip, or None if one lacks it."""
        return [fields[name] for fields in self.fields] if all(name in fields for fields in self.fields) else None

    def labels(self) -> tuple[list[str], dict[str, np.ndarray]]:
        """The classes, and where every clip's json has them the arrays ``labels`` (places among those) and ``fold``."""
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
    """A store of log-mel frames [items, N, F], float16, of the first ``seconds`` of each clip of ``tar``.

    Its arrays are ``lengths`` and those of :meth:`ClipTar.labels`, whose classes the manifest names.
    """
    clips = ClipTar(tar)
    longest = max(1, 1 + (round(seconds * config.rate) - config.window) // config.hop)
    classes, arrays = clips.labels()

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for i in range(len(clips)):
            frames_NF = log_mel(clips.wave(i, rate=config.rate), config)[:longest].astype(np.float16)
            padded_NF = np.pad(frames_NF, ((0, longest - len(frames_NF)), (0, 0)))
            one = {"vectors": padded_NF[None], "lengths": np.array([len(frames_NF)])}
            yield one | {name: array[i : i + 1] for name, array in arrays.items()}

    manifest = {"made_by": {"mel": asdict(config), "seconds": seconds}, "classes": classes}
    return write_vectors(out, batches(), keys=clips.keys, manifest=manifest)
