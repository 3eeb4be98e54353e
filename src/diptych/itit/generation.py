"""Generation with ITIT: images by parallel decoding (MaskGIT) with guidance, texts greedily or by beam search.

The cycles of the objective, the evaluation and the commands all generate through ``generate_image_tokens`` and
``generate_text``.

Shapes: B rows, N image tokens, M of them whose logits are computed, C codebook entries, L text tokens, F width of the
frozen text features, V vocabulary, W beams of an image, X images whose texts have not ended, H hypotheses to choose
from.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.data.batch import ImageTokenExamples
from diptych.errors import UserError
from diptych.itit.model import ITIT, Masking
from diptych.nn.transformer import positions_of
from diptych.rng import StepRNG
from diptych.tokenizers.text_tokenizer import EOS, PAD


@dataclass(kw_only=True, slots=True)
class ImageGenerationConfig:
    """Generation of an image from a text. The defaults are the paper's."""

    steps: int = 24
    """Number of rounds of parallel decoding (S)."""
    guidance: float = 2.0
    """Strength of guidance, lambda of l_g = (1 + lambda) l_c - lambda l_u; 0 switches it off and halves the cost."""
    guidance_ramp: bool = False
    """Raise guidance linearly from 0 over the rounds (Muse)."""
    temperature: float = 32.0
    """Factor t on the Gumbel noise of the confidence, which decides the order in which tokens are revealed."""
    token_temperature: float = 1.0
    """Temperature of the distribution that tokens are sampled from; 0 takes the likeliest token."""
    drop: Literal["all", "half", "none"] = "all"
    """Hidden tokens that are left out of the encoder: all of them; as many as make half of the positions, as in
    training, and none once more than half are known; or none. All is the fastest."""


@dataclass(kw_only=True, slots=True)
class TextGenerationConfig:
    """Generation of a text from an image. The defaults are the paper's."""

    beams: int = 4
    """Number of beams of the search; 1 is greedy decoding."""
    length_power: float = 0.6
    """Power of GIT's length penalty ((5 + length) / 6); larger values favour longer texts."""
    visible: float = 1.0
    """Share of the image tokens, evenly spread, that captions are read from. In training half of them or fewer are
    visible, so 0.5 loses little and takes half the time of reading. Unused with an image encoder."""
    agreement: float = 0.0
    """Weight of the agreement of a caption with the image's features, beside its score, when the finished beams are
    re-ranked (:meth:`ImageFeatures.agreement`). It needs a network that reads captions from features."""
    consensus: float = 0.0
    """Weight of the similarity of a caption to the captions of the images with the nearest features, and to the
    unpaired texts that fit these features best, when the finished beams are re-ranked
    (:class:`diptych.eval.baselines.NearCaptions`). It needs such a network too."""

    @property
    def reranks(self) -> bool:
        """Whether finished beams are re-ranked."""
        return self.beams > 1 and bool(self.agreement or self.consensus)


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How a trained run generates, unless a command says otherwise."""

    image: ImageGenerationConfig = field(default_factory=ImageGenerationConfig)
    """Settings of the generation of images from texts."""
    text: TextGenerationConfig = field(default_factory=TextGenerationConfig)
    """Settings of the generation of texts from images."""


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
    """Generate the image tokens of each text from its frozen features.

    ``known`` (tokens, hidden) keeps part of an image: only its hidden positions are generated.
    """
    for canvas in image_canvases(model, features_BLF, valid_BL, config, rng=rng, known=known):  # noqa: B007
        pass
    return canvas.tokens_BN


@torch.no_grad()
def image_canvases(
    model: ITIT,
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    config: ImageGenerationConfig,
    *,
    rng: StepRNG,
    known: tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]] | None = None,
) -> Iterator["Canvas"]:
    """As :func:`generate_image_tokens`: the canvas that it begins with, and the one after each round."""
    rows, positions = len(features_BLF), model.config.image_tokens
    device = features_BLF.device
    if known is None:
        tokens_BN = torch.zeros(rows, positions, dtype=torch.long, device=device)
        hidden_BN = torch.ones(rows, positions, dtype=torch.bool, device=device)
    else:
        tokens_BN, hidden_BN = known

    def logits(canvas: Canvas, features: Tensor | None, valid: Tensor | None) -> Tensor:
        kept = entering(canvas.most_known, positions, config.drop)
        keep = None if kept == positions else canvas.known_first_BN[:, :kept]
        image = model.embed_image(canvas.tokens_BN)
        encoded = model.encode(image, Masking(canvas.hidden_BN, keep), features, valid)
        return model.image_logits(encoded, canvas.hidden_BN, wanted_BM=canvas.open_BM)

    def unconditional(canvas: Canvas) -> Tensor:
        if canvas.most_known:
            return logits(canvas, None, None)
        # Without a text and without a known token all images are the same, the next ones too.
        one = {name: getattr(canvas, name)[:1] for name in ("tokens_BN", "hidden_BN", "known_first_BN")}
        first = replace(canvas, **one)
        return model.of_nothing(lambda: logits(first, None, None), drop=config.drop)

    yield from parallel_decoding(
        guided(
            lambda canvas: logits(canvas, features_BLF, valid_BL),
            unconditional,
            guidance=config.guidance,
            ramp=config.guidance_ramp,
        ),
        tokens_BN,
        hidden_BN,
        steps=config.steps,
        temperature=config.temperature,
        token_temperature=config.token_temperature,
        rng=rng,
    )


@dataclass(frozen=True, slots=True)
class GeneratedTexts:
    """W texts of each image, the best first."""

    ids_BWL: Int[Tensor, "B W L"]
    """They end in `</s>` and are padded with 0."""
    score_BW: Float[Tensor, "B W"] | None
    """Length-normalized log-probabilities, by which a beam search orders them; None for greedy decoding."""


@torch.no_grad()
def generate_text(
    model: ITIT,
    images: ImageTokenExamples,
    config: TextGenerationConfig,
    *,
    banned_V: Bool[Tensor, "V"],
    length: int,
    count: int = 1,
    pack: bool = True,
) -> GeneratedTexts:
    """Generate ``count`` texts for each image, read from what is ``config.visible`` (:meth:`ITIT.caption_prefix`).

    ``count`` is at most the number of beams. A text has at most ``length`` tokens and none of ``banned_V``. ``pack`` as
    in :meth:`ITIT.start_text`.
    """
    prefix_BPD = model.caption_prefix(images.tokens_BN, images.image_features_BG, visible=config.visible)
    decoding = model.start_text(prefix_BPD, length=length, beams=config.beams, pack=pack)
    if config.beams == 1:
        return GeneratedTexts(greedy(decoding, len(images), length=length, banned_V=banned_V)[:, None], None)
    return beam_search(
        decoding,
        len(images),
        beams=config.beams,
        length=length,
        banned_V=banned_V,
        length_power=config.length_power,
        count=count,
    )


# Parallel decoding


@dataclass(frozen=True, slots=True)
class Canvas:
    """An image in the middle of parallel decoding: its known tokens, and which positions are still hidden."""

    tokens_BN: Int[Tensor, "B N"]
    hidden_BN: Bool[Tensor, "B N"]
    progress: float
    """Share of the rounds that are over, s / S: 0 in the first round, below 1 in the last, 1 after it."""
    known_first_BN: Int[Tensor, "B N"]
    """The positions of each row, the known ones before the hidden ones."""
    most_known: int
    """Upper bound on the known tokens of a row. It follows from the schedule, without a wait for the device."""
    most_hidden: int
    """Upper bound on the hidden tokens of a row, likewise."""

    @property
    def open_BM(self) -> Int[Tensor, "B M"]:
        """Positions whose logits are asked for: the hidden ones, and others in rows that have fewer of them."""
        return self.known_first_BN[:, self.known_first_BN.shape[1] - self.most_hidden :]


Logits = Callable[[Canvas], Tensor]
"""Returns logits [B M C] of the open positions of a canvas."""


def guided(conditional: Logits, unconditional: Logits, *, guidance: float, ramp: bool = False) -> Logits:
    """Classifier-free guidance: l_g = (1 + lambda) l_c - lambda l_u.

    ``guidance`` is the paper's lambda; `diffusers` calls 1 + lambda the scale. With ``ramp`` lambda rises linearly from
    0 over the rounds, as in Muse. The paper does not mention a ramp.
    """
    if guidance == 0:
        return conditional

    def logits(canvas: Canvas) -> Tensor:
        weight = guidance * canvas.progress if ramp else guidance
        return (1 + weight) * conditional(canvas) - weight * unconditional(canvas)

    return logits


def parallel_decoding(
    logits: Logits,
    tokens_BN: Int[Tensor, "B N"],
    hidden_BN: Bool[Tensor, "B N"],
    *,
    steps: int,
    temperature: float,
    token_temperature: float = 1.0,
    rng: StepRNG,
) -> Iterator[Canvas]:
    """Fill the hidden positions in ``steps`` rounds, the most confident first. Known tokens never change.

    Yields the canvas that it begins with, and the one after each round: the last one is the image. Positions that are
    still hidden hold what was sampled last.

    In round s each hidden token is sampled; its confidence is log p(sampled) + t (1 - s/S) Gumbel. The
    floor(n cos(pi/2 (s+1)/S)) least confident of a row's n hidden tokens stay hidden.

    Departure: every round reveals at least one token of a row, so short grids finish early instead of idling.

    Args:
        logits: Gives the logits of a canvas.
        tokens_BN: The tokens to begin with.
        hidden_BN: Which positions are to be filled.
        steps: S, the number of rounds.
        temperature: t, the factor on the noise. It is not multiplied into itself from round to round.
        token_temperature: Divides the logits that tokens are sampled from; 0 takes the likeliest.
        rng: Where the random numbers come from.

    Raises:
        UserError: Less than one round.
    """
    if steps < 1:
        raise UserError(f"{steps} decoding steps: at least one is needed")
    rows, positions = tokens_BN.shape
    device = tokens_BN.device
    first_B = hidden_BN.sum(1)
    least, most = (int(count) for count in torch.stack([first_B.min(), first_B.max()]).tolist())

    def canvas_at(step: int) -> Canvas:
        fewest, most_hidden = (int(_still_hidden(torch.tensor(first), step, steps)) for first in (least, most))
        known_first_BN = hidden_BN.long().argsort(dim=1, stable=True)
        return Canvas(tokens_BN, hidden_BN, step / steps, known_first_BN, positions - fewest, most_hidden)

    for step in range(min(steps, most)):
        canvas = canvas_at(step)
        yield canvas
        logits_BMC, open_BM = logits(canvas).float(), canvas.open_BM
        chance_BN = rng.uniform(f"token/{step}", rows, positions, device=device)
        sampled_BM, log_p_BM = sample_tokens(logits_BMC, chance_BN.gather(1, open_BM), temperature=token_temperature)
        tokens_BN = torch.where(hidden_BN, tokens_BN.scatter(1, open_BM, sampled_BM), tokens_BN)
        noise_BN = rng.gumbel(f"confidence/{step}", rows, positions, device=device)
        confidence_BN = temperature * (1 - step / steps) * noise_BN
        confidence_BN = confidence_BN.scatter_add(1, open_BM, log_p_BM)
        rank_BN = confidence_BN.masked_fill(~hidden_BN, math.inf).argsort(1).argsort(1)
        # Infinite confidence may tie with nothing that is hidden, so no known token can be among the lowest ranks.
        hidden_BN = rank_BN < _still_hidden(first_B, step + 1, steps)[:, None]
    yield canvas_at(steps)


def _still_hidden(first: Tensor, rounds: int, steps: int) -> Tensor:
    """How many of ``first`` hidden tokens are still hidden after ``rounds`` of ``steps`` rounds."""
    cosine = 0.0 if rounds >= steps else math.cos(math.pi / 2 * rounds / steps)
    return torch.minimum((first * cosine).floor().long(), first - rounds).clamp_min(0)


def sample_tokens(
    logits_BNC: Float[Tensor, "B N C"], chance_BN: Float[Tensor, "B N"], *, temperature: float = 1.0
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Sample each position's token by inverting its cumulative distribution at ``chance_BN`` in [0, 1).

    This takes one random number for a position; the Gumbel trick takes one for each code. Returns the tokens and the
    logarithm of their probability under ``logits_BNC`` (at temperature 1).
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


def entering(most_known: int, positions: int, drop: Literal["all", "half", "none"]) -> int:
    """How many positions enter the encoder, the known ones first, where a row has at most ``most_known`` of them."""
    if drop == "all":
        return most_known
    return positions // 2 if drop == "half" and most_known <= positions // 2 else positions


# Greedy decoding and beam search


@runtime_checkable
class Decoding(Protocol):
    """A text decoder that has read part of a text, such as :class:`diptych.itit.model.TextDecoding`."""

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B V] of the token after ``ids_B``, the newest token of each row."""
        ...

    def reorder(self, rows_B: Tensor) -> None:
        """Let row b continue the text of row ``rows_B[b]``."""
        ...

    def keep(self, images_B: Tensor) -> None:
        """Go on with the rows of these images only; an image has as many rows as there are beams."""
        ...


def _worth_compacting(going_B: Tensor) -> Tensor | None:
    """Indices of unfinished images once at least a quarter have finished, else None."""
    going_X = going_B.nonzero()[:, 0]
    return going_X if len(going_X) <= 0.75 * len(going_B) else None


def greedy(decoding: Decoding, rows: int, *, length: int, banned_V: Bool[Tensor, "V"]) -> Int[Tensor, "B L"]:
    """Take the likeliest token at each step. Rows end in `</s>`, also when cut at ``length``, and are padded with 0."""
    device = banned_V.device
    ids_BL = torch.full((rows, length), PAD, device=device)
    open_X = torch.arange(rows, device=device)  # the texts that the decoder still holds
    newest_X, going_X = torch.full_like(open_X, PAD), torch.ones_like(open_X, dtype=torch.bool)
    for position in range(length):
        logits_XV = decoding.step(newest_X).masked_fill(banned_V, -torch.inf)
        newest_X = logits_XV.argmax(-1) if position + 1 < length else torch.full_like(newest_X, EOS)
        newest_X = newest_X.masked_fill(~going_X, PAD)
        ids_BL[open_X, position] = newest_X
        going_X = going_X & (newest_X != EOS)
        if not going_X.any():
            break
        if (kept := _worth_compacting(going_X)) is not None:
            decoding.keep(kept)
            open_X, newest_X, going_X = open_X[kept], newest_X[kept], going_X[kept]
    return ids_BL


def beam_search(
    decoding: Decoding,
    rows: int,
    *,
    beams: int,
    length: int,
    banned_V: Bool[Tensor, "V"],
    length_power: float = 0.6,
    count: int = 1,
) -> GeneratedTexts:
    """The ``count`` texts of each row with the best score, log p / ((5 + length) / 6) ** length_power.

    The length counts `</s>`. GIT's penalty (after Wu et al., 2016) is not what `transformers` calls
    ``length_penalty``. With beams >= V ** L this is exhaustive search.

    Args:
        decoding: holds rows * beams rows, the beams of a row side by side.
        beams: hypotheses of a row that are continued at each position.
        length: most tokens of a text, `</s>` included. A text that is cut there ends in `</s>` too.
        banned_V: ids that no text may contain.
        count: number of texts of each row, at most ``beams``. The search goes on until no open beam can become one of
            them. Where there are fewer texts than that, their scores are -inf.

    Raises:
        UserError: less than one beam.
    """
    if beams < 1:
        raise UserError(f"{beams} beams: at least one is needed")
    device, vocab_size = banned_V.device, len(banned_V)
    result_BWL = torch.full((rows, beams, length), PAD, device=device)
    score_BW = torch.full((rows, beams), -torch.inf, device=device)
    open_X = torch.arange(rows, device=device)  # the images that the decoder still holds
    ids_XWL = result_BWL.clone()
    alive_XW = score_BW.clone()
    alive_XW[:, 0] = 0.0  # one hypothesis to begin with, not the same one W times
    best_ids_XWL, best_XW = result_BWL.clone(), score_BW.clone()
    newest = torch.full((rows * beams,), PAD, device=device)

    for position in range(length):
        penalty = ((5 + position + 1) / 6) ** length_power
        log_p = decoding.step(newest).float().log_softmax(-1).masked_fill(banned_V, -torch.inf)
        total_XWV = alive_XW[..., None] + log_p.unflatten(0, (-1, beams))

        ended_XWL = ids_XWL.clone()
        ended_XWL[..., position] = EOS
        pool_XH = torch.cat([best_XW, total_XWV[..., EOS] / penalty], dim=1)
        best_XW, chosen_XW = pool_XH.topk(beams, dim=1)
        best_ids_XWL = positions_of(torch.cat([best_ids_XWL, ended_XWL], dim=1), chosen_XW)
        result_BWL[open_X], score_BW[open_X] = best_ids_XWL, best_XW
        if position + 1 == length:
            break

        total_XWV[..., EOS] = -torch.inf
        alive_XW, flat_XW = total_XWV.flatten(1).topk(beams, dim=1)
        parent_XW, token_XW = flat_XW // vocab_size, flat_XW % vocab_size
        ids_XWL = positions_of(ids_XWL, parent_XW)
        ids_XWL[..., position] = token_XW
        first_row_X1 = torch.arange(len(open_X), device=device)[:, None] * beams
        decoding.reorder((first_row_X1 + parent_XW).flatten())
        # log p only falls, and no later length divides by more than the last one does.
        reachable_XW = alive_XW / ((5 + length) / 6) ** length_power
        going_X = reachable_XW.amax(1) >= best_XW[:, count - 1]
        if not going_X.any():
            break
        if (kept := _worth_compacting(going_X)) is not None:
            decoding.keep(kept)
            open_X, ids_XWL, token_XW, alive_XW = open_X[kept], ids_XWL[kept], token_XW[kept], alive_XW[kept]
            best_ids_XWL, best_XW = best_ids_XWL[kept], best_XW[kept]
        newest = token_XW.flatten()
    return GeneratedTexts(result_BWL[:, :count], score_BW[:, :count])
