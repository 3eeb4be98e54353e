"""Scores of image tokenizers and text encoders."""

import pytest
import torch
from torch import Tensor, nn

from diptych.errors import UserError
from diptych.tokenizers.evaluation import (
    TextEncoderScore,
    effective_rank,
    evaluate_text_encoder,
    evaluate_tokenizer,
    psnr_of_each,
    word_probe,
)
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig

# Image tokenizers


CODES = 4


class Grey(ImageTokenizer):
    """One token per picture: its brightness in ``CODES`` steps. Stands in for a network whose result is known."""

    def __init__(self):
        nn.Module.__init__(self)
        self.codebook_size = CODES

    def encode(self, pixels_B3HW: Tensor, *, rows: int = 64) -> Tensor:
        return pixels_B3HW[:, 0, 0, :1].long() // (256 // CODES)

    def decode(self, tokens_BN: Tensor, *, rows: int = 64) -> Tensor:
        return (tokens_BN * (256 // CODES))[:, :, None, None].expand(-1, 3, 8, 8).to(torch.uint8)


class Mean(nn.Module):
    name = "mean colour"

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.float().mean((2, 3))[:, :1] + torch.zeros(1, 2)


def flat(*levels: int) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)


def test_numbers_of_a_tokenizer_that_is_known():
    score = evaluate_tokenizer(Grey(), [flat(0, 10), flat(64, 74)], extractor=Mean())
    assert score.images == 4
    off_by_ten = 10 * torch.log10(torch.tensor(255**2 / 100)).item()
    assert score.psnr == pytest.approx((99 + off_by_ten) / 2, abs=1e-4)
    assert score.perplexity == pytest.approx(2, abs=1e-5)
    assert score.used == 0.5
    assert score.rfd_features == "mean colour"
    # Means 37 and 32 in both features; variances of (0, 10, 64, 74) and (0, 0, 64, 64), perfectly correlated features.
    real, fake = (torch.tensor(v, dtype=torch.float64) for v in ((0, 10, 64, 74), (0, 0, 64, 64)))
    expected = 2 * (real.mean() - fake.mean()) ** 2 + 2 * (real.std() - fake.std()) ** 2
    assert score.rfd == pytest.approx(expected.item(), rel=1e-4)


def test_without_features_and_without_images():
    assert evaluate_tokenizer(Grey(), [flat(1)]).rfd is None
    with pytest.raises(UserError, match="at least one"):
        evaluate_tokenizer(Grey(), [])


def test_psnr_of_black_against_white_is_zero():
    assert psnr_of_each(flat(0), flat(255)).item() == 0


def test_a_real_tokenizer():
    config = ImageTokenizerConfig(image_size=8, codebook_size=16, code_dim=4, widths=(8, 8), blocks=1, groups=4)
    score = evaluate_tokenizer(ImageTokenizer.from_config(config), [flat(3, 200)])
    assert 0 < score.psnr < 99
    assert 1 <= score.perplexity <= 16


# Text encoders


def test_the_rank_counts_directions_of_equal_variance():
    directions = torch.eye(8)[:3]
    features = torch.cat([directions, -directions]) * 5 + 7
    assert effective_rank(features) == pytest.approx(3)
    features[0] *= 1 + 1e-9
    features[:, 3] += 1e-4 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # hardly any variance, hardly any rank
    assert effective_rank(features) == pytest.approx(3, abs=0.01)
    assert effective_rank(torch.ones(4, 8)) == pytest.approx(1)


def test_padding_is_no_direction(text_encoder, scene_texts):
    short, long = (evaluate_text_encoder(text_encoder, scene_texts[:40], length=length) for length in (24, 40))
    assert short == long
    assert (short.texts, short.width) == (40, 16)
    assert 2 < short.effective_rank < 16


def test_a_warning_for_features_that_hardly_vary():
    others = {"texts": 9, "width": 256, "pooled_rank": 5.0, "words": 0.25}
    told = [str(TextEncoderScore(effective_rank=rank, **others)) for rank in (20.4, 2.2)]
    line = "directions, and those of whole texts in 5.0; they tell 25% of the words"
    assert told[0] == f"features vary in 20.4 of 256 {line}"
    assert told[1].startswith(f"features vary in 2.2 of 256 {line}: too few")


def test_the_words_of_texts_are_told_by_features_that_hold_them():
    texts = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("dog", "cat", "car")] * 20
    words = ("red", "blue", "dog", "cat")
    holding = torch.tensor([[float(word in text) for word in words] for text in texts])
    assert word_probe(holding, texts) > 0.99  # "green" and "car" follow from the others
    colours = word_probe(holding[:, :2], texts)
    assert 0.4 < colours < 0.6
    noise = torch.randn(len(texts), 4, generator=torch.Generator().manual_seed(0))
    assert word_probe(noise, texts) < 0.1
    assert word_probe(noise[:3], ["one", "two", "three"]) == 0.0
