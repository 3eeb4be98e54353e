"""Scores of the two stages that ITIT stands on.

An image tokenizer is scored by how much of an image survives its tokens and how much of the vocabulary is in use.
A text encoder is scored by how many directions its features vary in, and by how well they tell the words of a text:
where both are low, it does not tell texts apart. Random weights score high in both, so they judge a collapse alone.

Shapes: B images of H x W or S x S pixels, N tokens of an image, K codes, X tokens of all texts together, F width of the
text features.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diptych.data.pixels import SkippedItems, channels_first, read_first_images
from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.eval.frechet import (
    FeatureExtractor,
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    open_extractor,
)
from diptych.nn.inference import Device, pick_device
from diptych.report.sheet import Cell, comparison, save_png
from diptych.report.terminal import print_metrics
from diptych.run_folder import write_json
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder

_SHOWN = 8
"""Number of images on the sheet of images before and after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerScore:
    """How well an image tokenizer reconstructs images, and how much of its codebook it uses."""

    images: int
    """Number of images that were measured."""
    psnr: float
    """Peak signal-to-noise ratio in decibels, the mean over images; a perfect image counts as 99."""
    perplexity: float
    """exp of the entropy of all tokens: how many codes are in effective use, at most K."""
    used: float
    """Share of the K codes that occur at all. A small set of images cannot use many."""
    rfd: float | None
    """Frechet distance between images and reconstructions in ``rfd_features``; None when not asked for."""
    rfd_features: str | None
    """Name of the features. Only with the network of FID is the distance the rFID of papers."""

    def __str__(self) -> str:
        line = f"PSNR {self.psnr:.1f} dB, {self.used:.0%} of the codes in use, {self.perplexity:.0f} in effective use"
        return line if self.rfd is None else f"{line}, rFD {self.rfd:.2f} ({self.rfd_features})"


def evaluate_tokenizer(
    tokenizer: ImageTokenizer,
    batches: Iterable[UInt8[Tensor, "B 3 H W"]],
    *,
    extractor: FeatureExtractor | None = None,
) -> TokenizerScore:
    """Encodes and decodes every image once.

    Raises UserError when there is no image, or only one and an ``extractor`` for the Frechet distance.
    """
    psnr_sum, images, count_K = 0.0, 0, torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    sides: tuple[FeatureStatistics, FeatureStatistics] | None = None
    for pixels_B3HW in batches:
        tokens_BN = tokenizer.encode(pixels_B3HW)
        output_B3HW = tokenizer.decode(tokens_BN).cpu()
        psnr_sum += psnr_of_each(output_B3HW, pixels_B3HW.cpu()).sum().item()
        images += len(pixels_B3HW)
        count_K += torch.bincount(tokens_BN.flatten().cpu(), minlength=tokenizer.codebook_size)
        if extractor is not None:
            seen = [feature_statistics(extractor, side) for side in (pixels_B3HW, output_B3HW)]
            sides = (sides[0].merge(seen[0]), sides[1].merge(seen[1])) if sides else (seen[0], seen[1])
    if not images:
        raise UserError("no images to measure the image tokenizer on; give at least one")
    return TokenizerScore(
        images=images,
        psnr=psnr_sum / images,
        perplexity=torch.special.entr(count_K / count_K.sum()).sum().exp().item(),
        used=(count_K > 0).float().mean().item(),
        rfd=frechet_distance(*sides).value if sides else None,
        rfd_features=extractor.name if extractor is not None else None,
    )


def psnr_of_each(output_B3HW: UInt8[Tensor, "B 3 H W"], target_B3HW: UInt8[Tensor, "B 3 H W"]) -> Tensor:
    """Peak signal-to-noise ratio of every image, [B], in decibels; at most 99."""
    error_B = (output_B3HW.double() - target_B3HW.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(255**2 / error_B)).clamp(max=99)


def evaluate_tokenizer_run(
    run: Path,
    source: Source,
    *,
    limit: int | None,
    features: str | None,
    skipped: SkippedItems,
    out: Path,
    device: Device,
) -> None:
    """Scores the image tokenizer of a run: a table, ``metrics.json`` and a sheet of images before and after.

    ``skipped`` says how many images may be unreadable.
    """
    tokenizer = ImageTokenizer.from_pretrained(run / "tokenizer").to(pick_device(device))
    pixels_BSS3 = read_first_images(source, limit=limit, size=tokenizer.image_size, skipped=skipped)[1]
    pixels_B3SS = channels_first(pixels_BSS3)
    score = evaluate_tokenizer(tokenizer, pixels_B3SS.split(64), extractor=open_extractor(features))
    after = tokenizer.decode(tokenizer.encode(pixels_B3SS[:_SHOWN])).permute(0, 2, 3, 1).cpu().numpy()
    write_json(out / "metrics.json", {**asdict(score), "skipped": len(skipped), "source": source.name})
    numbers = {name: value for name, value in asdict(score).items() if isinstance(value, int | float)}
    notes = [f"rfd is computed on {score.rfd_features}.", *skipped.report(out / "skipped.jsonl")]
    print_metrics(numbers, title=f"{run} on {source.name}", notes=notes)
    rows = {"image": [Cell(image=p) for p in pixels_BSS3[:_SHOWN]], "after": [Cell(image=p) for p in after]}
    save_png(out / "sheet.png", comparison(rows, title=f"{run.name}: what the tokens keep"))
    print(f"written to {out}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderScore:
    """How different the features are that a text encoder gives to the tokens of texts."""

    texts: int
    """Number of texts that were measured."""
    effective_rank: float
    """Number of directions in which the features of tokens vary."""
    width: int
    """Number of directions in which they could vary (F)."""
    pooled_rank: float
    """Number of directions in which the mean features of whole texts vary."""
    words: float
    """Share of what differs in the words of texts that a linear map of their mean features explains, see
    :func:`word_probe`."""

    def __str__(self) -> str:
        line = f"features vary in {self.effective_rank:.1f} of {self.width} directions"
        line += f", and those of whole texts in {self.pooled_rank:.1f}; they tell {self.words:.0%} of the words"
        # The encoder of `itit-tiny` reaches a third; one whose decoder had not learned to read it, a hundredth.
        if self.effective_rank < self.width / 32:
            return f"{line}: too few to tell texts apart, train it longer"
        return line


def evaluate_text_encoder(encoder: TextEncoder, texts: Sequence[str], *, length: int) -> TextEncoderScore:
    """Encodes every text once, cut to ``length`` tokens."""
    ids_BL, valid_BL = (side.to(encoder.embedding.weight.device) for side in encoder.tokenize(texts, length=length))
    features_BLF = encoder.features(ids_BL, valid_BL)
    mean_BF = features_BLF.sum(1) / valid_BL.sum(1, keepdim=True)
    features_XF = features_BLF[valid_BL]
    return TextEncoderScore(
        texts=len(texts),
        effective_rank=effective_rank(features_XF),
        width=features_XF.shape[1],
        pooled_rank=effective_rank(mean_BF),
        words=word_probe(mean_BF, texts),
    )


def word_probe(features_BF: Float[Tensor, "B F"], texts: Sequence[str]) -> float:
    """How well a ridge regression tells from the features of a text which words it holds: R^2 on unseen texts.

    The words are those of 1 to 50 % of the texts. The regression is fitted to half of the texts and its penalty chosen
    on a quarter; the rest is scored. 0 where no word is frequent enough, and no better than the words' frequencies.
    """
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    count = Counter(word for some in words for word in some)
    chosen = sorted(word for word, times in count.items() if 0.01 <= times / len(texts) <= 0.5 and times >= 4)
    if not chosen:
        return 0.0
    holds_BW = torch.tensor([[float(word in some) for word in chosen] for some in words], dtype=torch.float64)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    x_BF, holds_BW = features_BF.detach().cpu().double()[order], holds_BW[order]
    fit, choose, score = slice(0, None, 2), slice(1, None, 4), slice(3, None, 4)
    mean_F, scale_F = x_BF[fit].mean(0), x_BF[fit].std(0).clamp_min(1e-12)
    x_BF, centred_BW = (x_BF - mean_F) / scale_F, holds_BW - holds_BW[fit].mean(0)
    square_FF, product_FW = x_BF[fit].T @ x_BF[fit], x_BF[fit].T @ centred_BW[fit]

    def r2(weight_FW: Tensor, part: slice) -> float:
        rest = (centred_BW[part] - x_BF[part] @ weight_FW).square().sum()
        return float(1 - rest / centred_BW[part].square().sum())

    rows, eye_FF = len(x_BF[fit]), torch.eye(len(square_FF), dtype=torch.float64)
    weights = [torch.linalg.solve(square_FF + rows * each * eye_FF, product_FW) for each in (0.01, 0.1, 1.0, 10.0)]
    return max(0.0, r2(max(weights, key=lambda weight_FW: r2(weight_FW, choose)), score))


def nearest_texts(
    encoder: TextEncoder, texts: Sequence[str], *, length: int, shown: int
) -> list[tuple[str, str, float]]:
    """``shown`` of the texts, each with another one whose mean features have the largest cosine, and that cosine."""
    texts = list(dict.fromkeys(texts))
    ids_BL, valid_BL = (side.to(encoder.embedding.weight.device) for side in encoder.tokenize(texts, length=length))
    features_BLF = encoder.features(ids_BL, valid_BL)
    mean_BF = torch.nn.functional.normalize(features_BLF.sum(1) / valid_BL.sum(1, keepdim=True), dim=-1)
    cosine_BB = (mean_BF @ mean_BF.T).fill_diagonal_(-2)
    best = cosine_BB.max(1)
    rows = range(min(shown, len(texts)) if len(texts) > 1 else 0)
    return [(texts[row], texts[int(best.indices[row])], float(best.values[row])) for row in rows]


def effective_rank(features_XF: Float[Tensor, "X F"]) -> float:
    """exp of the entropy of the principal directions' shares of the variance.

    Roy and Vetterli (2007) take the shares of the singular values instead.
    """
    variance_F = torch.linalg.svdvals((features_XF - features_XF.mean(0)).double()).square()
    share_F = variance_F / variance_F.sum().clamp_min(torch.finfo(variance_F.dtype).tiny)
    return torch.exp(torch.special.entr(share_F).sum()).item()
