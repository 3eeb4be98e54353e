"""The losses on captioned images: T2I, I2T and I2I.

Shapes: B rows, N image tokens, L text tokens, F width of the frozen text features.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.data.batch import Batch, Examples, ImageTokenExamples, PairExamples, TextExamples
from diptych.itit.beam_search import PAD
from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig, generate_image_tokens, generate_text
from diptych.itit.masking import Masking, MaskingConfig, sample_masking
from diptych.itit.model import ITIT, Encoded
from diptych.nn.gradients import scale_gradient, straight_through_embedding
from diptych.nn.inference import eval_mode
from diptych.nn.losses import image_loss, text_loss
from diptych.nn.transformer import Block
from diptych.rng import StepRNG
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.train.objective import Losses, Objective


def t2i_loss(
    model: ITIT,
    tokens_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    masking: Masking,
    *,
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """L_T2I = - E sum over hidden k of log p(i_k | I_M, T), equation (2)."""
    encoded = with_text(model, tokens_BN, features_BLF, valid_BL, masking)
    return image_loss(
        model.image_logits(encoded, masking.hidden_BN), tokens_BN, masking.hidden_BN, label_smoothing=label_smoothing
    )


def with_text(
    model: ITIT,
    tokens_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    masking: Masking,
) -> Encoded:
    """The encoder's pass over I_M and T, which T2I and the first half of T2I2T share."""
    return model.encode(
        model.embed_image(tokens_BN),
        hidden_BN=masking.hidden_BN,
        keep_BK=masking.keep_BK,
        features_BLF=features_BLF,
        valid_BL=valid_BL,
    )


def without_text(model: ITIT, tokens_BN: Int[Tensor, "B N"], masking: Masking) -> Encoded:
    """The encoder's pass over I_M and the empty text, which I2T and I2I share."""
    return model.encode(model.embed_image(tokens_BN), hidden_BN=masking.hidden_BN, keep_BK=masking.keep_BK)


def i2i_loss(
    model: ITIT, encoded: Encoded, tokens_BN: Int[Tensor, "B N"], masking: Masking, *, label_smoothing: float
) -> Float[Tensor, ""]:
    """Equation (2) with an empty text: it trains the unconditional branch of guidance."""
    return image_loss(
        model.image_logits(encoded, masking.hidden_BN), tokens_BN, masking.hidden_BN, label_smoothing=label_smoothing
    )


def i2t_loss(
    model: ITIT,
    encoded: Encoded,
    ids_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    *,
    label_smoothing: float,
    encoder_grad_scale: float,
) -> Float[Tensor, ""]:
    """L_I2T = - E sum over l of log p(t_l | I_M, t_0 .. t_{l-1}), equation (1).

    z <- 0.1 z + sg(0.9 z) between the encoder and the text decoder, with ``encoder_grad_scale`` for 0.1.
    """
    prefix = scale_gradient(encoded.image_BKD, encoder_grad_scale)
    return text_loss(model.text_logits(prefix, shift(ids_BL)), ids_BL, valid_BL, label_smoothing=label_smoothing)


def t2t_loss(
    model: ITIT, ids_BL: Int[Tensor, "B L"], valid_BL: Bool[Tensor, "B L"], *, label_smoothing: float
) -> Float[Tensor, ""]:
    """A language model without any image: the control of Table 2, rows 5 and 7."""
    return text_loss(model.text_logits(None, shift(ids_BL)), ids_BL, valid_BL, label_smoothing=label_smoothing)


def shift(ids_BL: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """t_0 .. t_{L-1}: what the text decoder reads to predict ``ids_BL``; t_0 = [BOS], for T5 its pad id."""
    inputs_BL = ids_BL.roll(1, dims=1)
    inputs_BL[:, 0] = PAD
    return inputs_BL


# JOINED objectives.cycles
#| The cycle losses on loose texts (T2I2T) and on bare images (I2T2I), section 3.2 of ITIT.
#|
#| Both synthesise the missing side without gradient, pass it through the network once more to get logits that do have
#| one, take the likeliest tokens *straight through*, and ask the other direction to give back the original.
#|
#| Shapes: B rows, N image tokens, L text tokens, F width of the frozen text features, D encoder width, V vocabulary.


def reimagined(
    model: ITIT,
    pseudo_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    masking: Masking,
    *,
    gumbel: float,
    rng: StepRNG,
) -> Float[Tensor, "B N D"]:
    """~I of T2I2T, embedded: the synthesised I' with its hidden part predicted once more, with gradient.

    (b) The T2I pass on (I'_M, T). The gradient stops after the encoder: with two encoder gradients training became
    unstable. (c) ~i_k = argmax p(i_k | I'_M, T), straight through a Gumbel-softmax of strength ``gumbel``.
    Where I'_M was visible ~I keeps I'.
    """
    with torch.no_grad():
        first = with_text(model, pseudo_BN, features_BLF, valid_BL, masking)
    logits_BNC = model.image_logits(first.detach(), masking.hidden_BN).float()
    if gumbel:
        logits_BNC = logits_BNC + gumbel * rng.gumbel("gumbel", *logits_BNC.shape, device=logits_BNC.device)
    predicted_BND = straight_through_embedding(logits_BNC, model.token_embedding.weight)
    return torch.where(masking.hidden_BN[..., None], predicted_BND, model.embed_image(pseudo_BN))


def t2i2t_loss(
    model: ITIT,
    image_BND: Float[Tensor, "B N D"],
    ids_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    masking: Masking,
    *,
    label_smoothing: float,
    encoder_grad_scale: float,
) -> Float[Tensor, ""]:
    """L_T2I2T = - E sum over l of log p(t_l | ~I_M, t_0 .. t_{l-1}), equation (3).

    (d) ~I (full cycle: from :func:`reimagined`; half cycle: the embedded I') is hidden in part and captioned.
    """
    encoded = model.encode(image_BND, hidden_BN=masking.hidden_BN, keep_BK=masking.keep_BK)
    return i2t_loss(
        model, encoded, ids_BL, valid_BL, label_smoothing=label_smoothing, encoder_grad_scale=encoder_grad_scale
    )


def rewritten(
    model: ITIT,
    text_encoder: TextEncoder,
    tokens_BN: Int[Tensor, "B N"],
    pseudo_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    masking: Masking,
    *,
    banned_V: Bool[Tensor, "V"],
) -> Float[Tensor, "B L F"]:
    """Frozen features of ~T of I2T2I: the synthesised T' with every token predicted once more, with gradient.

    (b) The I2T pass on (I_M, T'), its gradient stopped after the encoder. (c) ~t_l = argmax p(t_l | I_M, t'_0 ..
    t'_{l-1}), straight through a plain softmax. (d) ~T goes through the frozen text encoder, which lets the gradient
    through to its input. ~T ends where T' ended.
    """
    with torch.no_grad():
        first = without_text(model, tokens_BN, masking)
    logits_BLV = model.text_logits(first.image_BKD.detach(), shift(pseudo_BL)).float()
    logits_BLV = logits_BLV.masked_fill(banned_V, -torch.inf)
    embedded_BLF = straight_through_embedding(logits_BLV, text_encoder.embedding.weight)
    return text_encoder.features_from_embeddings(embedded_BLF, valid_BL)


def i2t2i_loss(
    model: ITIT,
    tokens_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    masking: Masking,
    *,
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """L_I2T2I = - E sum over hidden k of log p(i_k | I_M, ~T), equation (4).

    It is equation (2) with ~T for T: features of :func:`rewritten` (full cycle) or of T' (half cycle).
    """
    return t2i_loss(model, tokens_BN, features_BLF, valid_BL, masking, label_smoothing=label_smoothing)


# JOINED objectives.itit
#| The ITIT objective: paired losses and cycles, summed.
#|
#| Shapes: B rows, N image tokens, L text tokens, F width of the frozen text features.


@dataclass(kw_only=True, slots=True)
class LossWeights:
    """The paper sums its losses with equal weight; that of I2I is not stated."""

    t2i: float = 1.0
    i2t: float = 1.0
    i2i: float = 1.0
    t2i2t: float = 1.0
    i2t2i: float = 1.0


@dataclass(kw_only=True, slots=True)
class ItitObjectiveConfig:
    """The defaults are the paper's, except for the synthesis inside the cycles (see ``image_generation``)."""

    texts: Literal["off", "t2t", "half", "full"] = "full"
    """What loose texts train: nothing, a language model without images (control), the half or the full T2I2T cycle."""
    images: Literal["off", "i2i", "half", "full"] = "full"
    """What bare images train: nothing, masked modelling without text (control), the half or the full I2T2I cycle."""
    cycle_start_step: int = 25_000
    """Step at which the losses on unpaired data begin; before it, synthesised data would be noise (Table 5)."""
    image_masking: MaskingConfig = field(default_factory=MaskingConfig)
    """Share of image tokens hidden where an image is predicted (T2I, I2I, I2T2I)."""
    text_masking: MaskingConfig = field(default_factory=lambda: MaskingConfig(high=0.75))
    """Share of image tokens hidden where a text is predicted (I2T, T2I2T). I2I shares its pass, and so its share."""
    label_smoothing: float = 0.1
    """Label smoothing of every loss."""
    encoder_grad_scale: float = 0.1
    """Share of the text decoder's gradient that reaches the encoder."""
    gumbel: float = 1.0
    """Strength of the Gumbel noise in T2I2T's straight-through estimate; 0 is a plain softmax."""
    image_generation: ImageGenerationConfig = field(
        default_factory=lambda: ImageGenerationConfig(steps=8, guidance=0.0, temperature=4.0)
    )
    """How T2I2T synthesises pictures. Ours: fewer steps and no guidance; docs/results.md shows what they cost."""
    teacher: Literal["self", "ema"] = "self"
    """Who synthesises: the network itself (the paper), or an exponential average of it (as DoraCycle)."""
    teacher_decay: float = 0.999
    """Decay of the average, per step."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Weight of each loss."""


class ItitObjective(Objective):
    """L = L_T2I + L_I2T + L_I2I on pairs, + L_T2I2T on texts, + L_I2T2I on images."""

    may_skip_parameters = True  # a step, or a weight of 0, may leave out losses that train some layers alone
    banned_V: Tensor

    def __init__(self, model: ITIT, text_encoder: TextEncoder, config: ItitObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self.text_encoder = text_encoder
        self.config = config
        self.streams = {
            "pairs": 2
        }  # every other row for T2I, the rest for I2T and I2I: separate pairs, as in the paper
        if config.images != "off":
            self.streams["images"] = 1
        if config.texts != "off":
            self.streams["texts"] = 1
        self.teacher = copy.deepcopy(model).requires_grad_(False) if config.teacher == "ema" else None
        self._teacher_step: int | None = None
        banned_V = torch.zeros(text_encoder.vocab_rows, dtype=torch.bool)
        banned_V[list(text_encoder.banned_ids)] = True
        self.register_buffer("banned_V", banned_V, persistent=False)

    def state_dict(self, *args, **kwargs):
        """Without the frozen text encoder, which has its own folder."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in [name for name in state if name.startswith(f"{prefix}text_encoder.")]:
            del state[name]
        return state

    def compile_regions(self) -> None:
        """For ``--train.compile``: the blocks, once for all that are alike. The loops of the synthesis stay as they
        are; traced as a whole they take many minutes."""
        for module in self.model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)

    def forward(self, batch: Batch, step: int) -> Losses:
        terms = self._paired(batch)
        if step >= self.config.cycle_start_step:
            self._update_teacher(step)
            if self.config.texts != "off":
                terms |= self._texts(batch)
            if self.config.images != "off":
                terms |= self._images(batch)
        weights = self.config.weights
        weighted = [
            getattr(weights, _WEIGHT_OF.get(name, name)) * loss for name, loss in terms.items() if "/" not in name
        ]
        return Losses(torch.stack(weighted).sum(), {name: term.detach() for name, term in terms.items()})

    def _paired(self, batch: Batch) -> dict[str, Tensor]:
        c, rng = self.config, batch.rng
        pairs: PairExamples = batch["pairs"]
        for_image, for_text = pairs[0::2], pairs[1::2]  # so any even run of rows holds as many of each

        masking = self._hide(c.image_masking, for_image, rng, "t2i")
        tokens, features, valid = for_image.tokens_BN, self._features(for_image), for_image.valid_BL
        t2i = t2i_loss(self.model, tokens, features, valid, masking, label_smoothing=c.label_smoothing)

        masking = self._hide(c.text_masking, for_text, rng, "i2t")
        encoded = without_text(self.model, for_text.tokens_BN, masking)
        i2i = i2i_loss(self.model, encoded, for_text.tokens_BN, masking, label_smoothing=c.label_smoothing)
        i2t = i2t_loss(
            self.model, encoded, for_text.ids_BL, for_text.valid_BL,
            label_smoothing=c.label_smoothing, encoder_grad_scale=c.encoder_grad_scale,
        )  # fmt: skip
        return {"t2i": t2i, "i2t": i2t, "i2i": i2i}

    def _texts(self, batch: Batch) -> dict[str, Tensor]:
        c, rng = self.config, batch.rng
        texts: TextExamples = batch["texts"]
        if c.texts == "t2t":
            return {"t2t": t2t_loss(self.model, texts.ids_BL, texts.valid_BL, label_smoothing=c.label_smoothing)}
        features = self._features(texts)
        with eval_mode(synthesiser := self._synthesiser()):
            pseudo_BN = generate_image_tokens(synthesiser, features, texts.valid_BL, c.image_generation, rng=rng)
        if c.texts == "full":
            masking = self._hide(c.image_masking, texts, rng, "t2i2t/first")
            image_BND = reimagined(self.model, pseudo_BN, features, texts.valid_BL, masking, gumbel=c.gumbel, rng=rng)
        else:
            image_BND = self.model.embed_image(pseudo_BN)
        masking = self._hide(c.text_masking, texts, rng, "t2i2t/second")
        loss = t2i2t_loss(
            self.model, image_BND, texts.ids_BL, texts.valid_BL, masking,
            label_smoothing=c.label_smoothing, encoder_grad_scale=c.encoder_grad_scale,
        )  # fmt: skip
        return {"t2i2t": loss}

    def _images(self, batch: Batch) -> dict[str, Tensor]:
        c, rng = self.config, batch.rng
        images: ImageTokenExamples = batch["images"]
        if c.images == "i2i":
            masking = self._hide(c.image_masking, images, rng, "unpaired_i2i")
            encoded = without_text(self.model, images.tokens_BN, masking)
            return {
                "unpaired_i2i": i2i_loss(
                    self.model, encoded, images.tokens_BN, masking, label_smoothing=c.label_smoothing
                )
            }
        with eval_mode(synthesiser := self._synthesiser()):
            length = self.model.config.max_text_len
            pseudo_BL, _ = generate_text(
                synthesiser, images.tokens_BN, TextGenerationConfig(beams=1), banned_V=self.banned_V, length=length
            )
        pseudo_BL = pseudo_BL[:, : int((pseudo_BL != self.text_encoder.pad_id).sum(1).max())]
        valid_BL = pseudo_BL != self.text_encoder.pad_id
        if c.images == "full":
            masking = self._hide(c.text_masking, images, rng, "i2t2i/first")
            features = rewritten(
                self.model, self.text_encoder, images.tokens_BN, pseudo_BL, valid_BL, masking, banned_V=self.banned_V
            )
        else:
            features = self.text_encoder.features(pseudo_BL, valid_BL)
        masking = self._hide(c.image_masking, images, rng, "i2t2i/second")
        loss = i2t2i_loss(self.model, images.tokens_BN, features, valid_BL, masking, label_smoothing=c.label_smoothing)
        distinct = torch.tensor(len(pseudo_BL.unique(dim=0)) / len(pseudo_BL), device=loss.device)
        # Cycles can agree on captions that are consistent but say nothing; their variety is the first thing to fall.
        return {"i2t2i": loss, "i2t2i/distinct_captions": distinct}

    def _features(self, items: TextExamples | PairExamples) -> Tensor:
        return (
            items.features_BLF
            if items.features_BLF is not None
            else self.text_encoder.features(items.ids_BL, items.valid_BL)
        )

    def _hide(self, config: MaskingConfig, items: Examples, rng: StepRNG, name: str) -> Masking:
        positions = self.model.config.image_tokens
        return sample_masking(config, len(items), positions, rng=rng, name=name, device=self.banned_V.device)

    def _synthesiser(self) -> ITIT:
        return self.model if self.teacher is None else self.teacher

    @torch.no_grad()
    def _update_teacher(self, step: int) -> None:
        """Once a step, before its first forward pass: by then the optimiser has made the step before."""
        if self.teacher is None or self._teacher_step == step or not self.training:
            return
        first = step == self.config.cycle_start_step
        self._teacher_step = step
        ours: list[Tensor] = list(self.model.parameters())
        theirs: list[Tensor] = list(self.teacher.parameters())
        torch._foreach_lerp_(theirs, ours, 1.0 if first else 1 - self.config.teacher_decay)


_WEIGHT_OF = {"t2t": "t2i2t", "unpaired_i2i": "i2t2i"}
"""The controls take the weight of the cycle that they stand in for. Names with a slash are measurements, not losses."""
