"""The encoder of an ITIT run as an image encoder for other learners.

Shapes: B rows, H and W pixels, N image tokens, D encoder width.
"""

from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Num
from torch import Tensor

from diptych.encoders.image import ImageEncoder, resize
from diptych.io import load_network
from diptych.itit.model import ITIT
from diptych.tokenizers.image_tokenizer import ImageTokenizer


class ItitImageEncoder(ImageEncoder):
    """The encoder of an ITIT run for images without text: the mean of its output over the image tokens."""

    def __init__(self, tokenizer: ImageTokenizer, network: ITIT) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False)
        self.network = network
        self.width, self.image_size = network.config.width, tokenizer.image_size
        self.preprocessing: dict[str, Any] = {"size": tokenizer.image_size, "pooling": "mean"}

    @classmethod
    def from_pretrained(cls, folder: str) -> Self:
        """Load a run folder, or any folder with `tokenizer` and `model` in it."""
        network = load_network(ITIT, Path(folder) / "model")
        return cls(ImageTokenizer.from_pretrained(Path(folder) / "tokenizer"), network).eval()

    def forward(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """One feature vector for each image; pixels from 0 to 255 of any size."""
        return self.tokens(pixels_B3HW).mean(1)

    def tokens(self, pixels_B3HW: Num[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """One feature vector for each image token."""
        pixels = resize(pixels_B3HW.to(self.tokenizer.codebook.device).float(), self.image_size).round()
        tokens_BN = self.tokenizer.encode(pixels.to(torch.uint8))
        return self.network.encode(self.network.embed_image(tokens_BN)).image_BKD

    def save_pretrained(self, folder: Path) -> None:
        """Write ``folder/tokenizer`` and ``folder/model``."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.network.save_pretrained(folder / "model")
