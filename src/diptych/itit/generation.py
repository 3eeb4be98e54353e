"""Parallel decoding of image tokens (MaskGIT), as ITIT draws with it, and guidance.

Shapes: B rows, N image tokens, C codebook entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.errors import UserError
from diptych.itit.beam_search import beam_search, greedy
from diptych.itit.model import ITIT
from diptych.rng import StepRNG


@dataclass(frozen=True, slots=True)
class Canvas:
    """A picture on its way: known tokens, and which positions are still hidden."""

    tokens_BN: Int[Tensor, "B N"]
    hidden_BN: Bool[Tensor, "B N"]
    progress: float
    """s / S: 0 at the first step, below 1 at the last."""
    most_known: int
    """No row has more known tokens than this (known without asking the device)."""


Logits = Callable[[Canvas], Tensor]
"""Logits [B N C] of every position of a canvas."""


def guided(conditional: Logits, unconditional: Logits, *, guidance: float, ramp: bool = False) -> Logits:
    """Classifier-free guidance: l_g = (1 + lambda) l_c - lambda l_u.

    ``guidance`` is the paper's lambda (scale 1 + lambda in the convention of `diffusers`). With ``ramp`` it rises
    linearly from 0 over the steps, as in Muse; the paper does not say, and the default does not.
    """
    if guidance == 0:
        return conditional

    def logits(canvas: Canvas) -> Tensor:
        weight = guidance * canvas.progress if ramp else guidance
        return (1 + weight) * conditional(canvas) - weight * unconditional(canvas)

    return logits


def parallel_decode(
    logits: Logits,
    tokens_BN: Int[Tensor, "B N"],
    hidden_BN: Bool[Tensor, "B N"],
    *,
    steps: int,
    temperature: float,
    token_temperature: float = 1.0,
    rng: StepRNG,
) -> Int[Tensor, "B N"]:
    """Fill the hidden positions in ``steps`` rounds, the surest first. Known tokens never change.

    At step s each hidden token is sampled; its confidence is log p(sampled) + t (1 - s/S) Gumbel, and
    floor(n cos(pi/2 (s+1)/S)) of a row's n hidden tokens stay hidden: those of least confidence.

    Departure: at least one token of a row is revealed in each round, so short grids finish early instead of idling.

    Args:
        temperature: t, of the confidence. It is not multiplied into itself from step to step.
        token_temperature: divides the logits that tokens are sampled from; 0 takes the likeliest.
    """
    if steps < 1:
        raise UserError(f"{steps} drawing steps: at least one is needed")
    rows, positions = tokens_BN.shape
    device = tokens_BN.device
    first_B = hidden_BN.sum(1)
    least, most = (int(count) for count in torch.stack([first_B.min(), first_B.max()]).tolist())
    for step in range(min(steps, most)):
        known = positions - int(_still_hidden(torch.tensor(least), step, steps))
        logits_BNC = logits(Canvas(tokens_BN, hidden_BN, step / steps, known)).float()
        chance_BN = rng.uniform(f"token/{step}", rows, positions, device=device)
        sampled_BN, log_p_BN = sample_tokens(logits_BNC, chance_BN, temperature=token_temperature)
        tokens_BN = torch.where(hidden_BN, sampled_BN, tokens_BN)
        noise_BN = rng.gumbel(f"confidence/{step}", rows, positions, device=device)
        confidence_BN = log_p_BN + temperature * (1 - step / steps) * noise_BN
        rank_BN = confidence_BN.masked_fill(~hidden_BN, math.inf).argsort(1).argsort(1)
        # Infinite confidence may tie with nothing that is hidden, so no known token can be among the lowest ranks.
        hidden_BN = rank_BN < _still_hidden(first_B, step + 1, steps)[:, None]
    return tokens_BN


def _still_hidden(first: Tensor, rounds: int, steps: int) -> Tensor:
    """How many of ``first`` hidden tokens are left after so many rounds."""
    cosine = 0.0 if rounds >= steps else math.cos(math.pi / 2 * rounds / steps)
    return torch.minimum((first * cosine).floor().long(), first - rounds).clamp_min(0)


def sample_tokens(
    logits_BNC: Float[Tensor, "B N C"], chance_BN: Float[Tensor, "B N"], *, temperature: float = 1.0
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Sample each position's token by inverting its cumulative distribution at ``chance_BN`` in [0, 1).

    One random number a position, where the Gumbel trick would take one a code. Returns the tokens and the logarithm
    of their probability under ``logits_BNC`` (at temperature 1).
    """
    log_p_BNC = logits_BNC.log_softmax(-1)
    if temperature == 0:
        log_p_BN, sampled_BN = log_p_BNC.max(-1)
        return sampled_BN, log_p_BN
    cumulative_BNC = (log_p_BNC if temperature == 1 else logits_BNC / temperature).softmax(-1).cumsum(-1)
    target_BN1 = chance_BN[..., None] * cumulative_BNC[..., -1:]
    sampled_BN = torch.searchsorted(cumulative_BNC, target_BN1, right=True).squeeze(-1)
    sampled_BN = sampled_BN.clamp_max(logits_BNC.shape[-1] - 1)
    return sampled_BN, log_p_BNC.gather(-1, sampled_BN[..., None]).squeeze(-1)


# JOINED sampling.itit
#| ITIT's two ways to generate, used alike by the cycles, the evaluators and the command line.
#|
#| Shapes: B rows, N image tokens, L text tokens, F width of the frozen text features, V vocabulary.


@dataclass(kw_only=True, slots=True)
class ImageGenerationConfig:
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
class TextGenerationConfig:
    """How a text is written about a picture. The defaults are the paper's."""

    beams: int = 4
    """Beams of the search; 1 is greedy."""
    length_power: float = 0.6
    """Power of GIT's length penalty ((5 + length) / 6)."""


@torch.no_grad()
def generate_image_tokens(
    model: ITIT,
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    config: ImageGenerationConfig,
    *,
    rng: StepRNG,
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
        rng=rng,
    )


def _visible_first(canvas: Canvas) -> Tensor | None:
    """Half of the positions, all visible ones among them, as in training; None while more than half are visible."""
    half = canvas.hidden_BN.shape[1] // 2
    if canvas.most_known > half:
        return None
    return canvas.hidden_BN.long().argsort(dim=1, stable=True)[:, :half]


@torch.no_grad()
def generate_text(
    model: ITIT,
    tokens_BN: Int[Tensor, "B N"],
    config: TextGenerationConfig,
    *,
    banned_V: Bool[Tensor, "V"],
    length: int,
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
