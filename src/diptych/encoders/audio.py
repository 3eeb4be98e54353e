"""Audio encoders: any audio model of `transformers`, from wave forms to features.

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

_WHAT = "an audio model"


class AudioEncoder(nn.Module):
    """wav2vec 2.0, HuBERT and their like read the wave form; AST and Whisper's encoder a spectrogram of fixed length.

    The feature of a clip is the mean over its valid frames. A spectrogram of fixed length has no other kind: what
    the model was trained to see at the end of short clips counts.
    """

    def __init__(self, network: Any, extractor: Any) -> None:
        super().__init__()
        self.network: Any = network
        self.extractor = extractor
        self.rate: int = extractor.sampling_rate
        """Samples a second that clips must have."""
        self.width = width_of(network.config, "audio")
        self.preprocessing: dict[str, Any] = {"rate": self.rate, "pooling": "mean"}

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """From a folder (nothing touches the network) or a hub name. Raises UserError."""
        network, _ = load_weights(name, _WHAT, transformers.AutoModel)
        return cls(network, load(name, _WHAT, transformers.AutoFeatureExtractor.from_pretrained)).eval()

    @property
    def listener(self) -> Any:
        """The part that listens: Whisper has a decoder besides."""
        return self.network.get_encoder() if self.network.config.is_encoder_decoder else self.network

    def forward(self, waves: Sequence[np.ndarray]) -> Float[Tensor, "B D"]:
        features_BND, valid_BN = self.tokens(waves)
        weight_BN1 = valid_BN[..., None].to(features_BND.dtype)
        return (features_BND * weight_BN1).sum(1) / weight_BN1.sum(1)

    def tokens(self, waves: Sequence[np.ndarray]) -> tuple[Float[Tensor, "B N D"], Bool[Tensor, "B N"]]:
        """Features of every frame, zero where there is none, and which there are. ``waves``: float32 in [-1, 1]."""
        device = next(self.network.parameters()).device
        options: dict[str, Any] = {"sampling_rate": self.rate, "return_tensors": "pt"}
        if reads_waves := self.network.main_input_name == "input_values" and hasattr(
            self.network, "_get_feature_vector_attention_mask"
        ):
            options |= {"padding": True, "return_attention_mask": True}
        inputs = {name: value.to(device) for name, value in self.extractor(list(waves), **options).items()}
        features_BND = self.listener(**inputs).last_hidden_state
        valid_BN = torch.ones(features_BND.shape[:2], dtype=torch.bool, device=device)
        if reads_waves:
            mask = self.network._get_feature_vector_attention_mask(features_BND.shape[1], inputs["attention_mask"])
            valid_BN = mask.bool()
        return features_BND.masked_fill(~valid_BN[..., None], 0.0), valid_BN

    def save_pretrained(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
        self.extractor.save_pretrained(folder)


def open_audio_encoder(name: str | Path) -> AudioEncoder:
    """By folder, hub name or run folder, in evaluation mode. Raises UserError."""
    return AudioEncoder.from_pretrained(resolve(name, "audio"))
