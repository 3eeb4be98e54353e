"""Audio encoders: any audio model of `transformers`, from waveforms to features.

Shapes: B clips, N frames, D width of the features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.encoders.loading import load, load_weights, resolve, width_of
from diptych.io import without_progress_bars

_WHAT = "an audio model"


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
