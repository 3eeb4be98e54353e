"""ITIT's two ways to generate, used alike by the cycles, the evaluators and the command line.

Shapes: B rows, N image tokens, L text tokens, F width of the frozen text features, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.data.batch import Draws
from diptych.models.itit import ITIT
from diptych.sampling.autoregressive import beam_search, greedy
from diptych.sampling.parallel import Canvas, guided, parallel_decode


@dataclass(kw_only=True, slots=True)
class DrawConfig:
    """How a picture is drawn from a text. The defaults are the paper's."""

    steps: int = 24
    """Rounds of parallel decoding (S)."""
    guidance: float = 2.0
    """Lambda of l_g = (1 + lambda) l_c - lambda l_u; 0 switches guidance off and halves the cost."""
    guidance_ramp: bool = False
    """Let guidance rise linearly from 0, as Muse does."""
    temperature: float = 32.0
    """t, of the noise on the confidence; it decides the order in which tokens are revealed."""
    token_temperature: float = 1.0
    """Of the distribution that tokens are sampled from; 0 takes the likeliest."""
    drop: bool = True
    """Leave hidden tokens out of the encoder as in training; False feeds all of them (slower)."""


@dataclass(kw_only=True, slots=True)
class WriteConfig:
    """How a text is written about a picture. The defaults are the paper's."""

    beams: int = 4
    """Beams of the search; 1 is greedy."""
    length_power: float = 0.6
    """Power of GIT's length penalty ((5 + length) / 6)."""


@torch.no_grad()
def draw(
    model: ITIT,
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    config: DrawConfig,
    *,
    draws: Draws,
    known: tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]] | None = None,
) -> Int[Tensor, "B N"]:
    """Image tokens for texts: the T2I inference pipeline. ``known`` (tokens, hidden) keeps part of a picture."""
    rows, positions = len(features_BLF), model.config.image_tokens
    device = features_BLF.device
    if known is None:
        tokens_BN = torch.zeros(rows, positions, dtype=torch.long, device=device)
        hidden_BN = torch.ones(rows, positions, dtype=torch.bool, device=device)
    else:
        tokens_BN, hidden_BN = known

    def logits(canvas: Canvas, *, features: Tensor | None, valid: Tensor | None) -> Tensor:
        keep = _visible_first(canvas) if config.drop else None
        image = model.embed_image(canvas.tokens_BN)
        encoded = model.encode(image, hidden_BN=canvas.hidden_BN, keep_BK=keep, features_BLF=features, valid_BL=valid)
        return model.image_logits(encoded, canvas.hidden_BN)

    conditional = partial(logits, features=features_BLF, valid=valid_BL)
    unconditional = partial(logits, features=None, valid=None)
    return parallel_decode(
        guided(conditional, unconditional, guidance=config.guidance, ramp=config.guidance_ramp),
        tokens_BN,
        hidden_BN,
        steps=config.steps,
        temperature=config.temperature,
        token_temperature=config.token_temperature,
        draws=draws,
    )


def _visible_first(canvas: Canvas) -> Tensor | None:
    """Half of the positions, all visible ones among them, as in training; None while more than half are visible."""
    half = canvas.hidden_BN.shape[1] // 2
    if canvas.most_known > half:
        return None
    return canvas.hidden_BN.long().argsort(dim=1, stable=True)[:, :half]


@torch.no_grad()
def write(
    model: ITIT, tokens_BN: Int[Tensor, "B N"], config: WriteConfig, *, banned_V: Bool[Tensor, "V"], length: int
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B"] | None]:
    """Text ids for pictures, all image tokens visible and the text empty; and their scores if beams were used."""
    prefix_BND = model.encode(model.embed_image(tokens_BN)).image_BKD
    rows = len(tokens_BN)
    if config.beams == 1:
        return greedy(model.start_text(prefix_BND), rows, length=length, banned_V=banned_V), None
    decoding = model.start_text(prefix_BND, beams=config.beams)
    return beam_search(
        decoding, rows, beams=config.beams, length=length, banned_V=banned_V, length_power=config.length_power
    )
