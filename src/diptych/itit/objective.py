"""The ITIT objective: every equation of the paper, on captioned images and, by cycle consistency, on unpaired data.

Li et al., "Leveraging Unpaired Data for Vision-Language Generative Models via Cycle Consistency", sections 3.1 and 3.2.
In the equations I is an image of tokens i_k, T a text of tokens t_l, I_M what is visible of I, and ~ marks what a cycle
predicted: `p(i_k | I_M, ~T)` reads "the probability of image token k, given the visible part of the image and the
predicted text". Every loss is a mean over a row's tokens, then over rows.

Shapes: B rows, N image tokens, K image tokens that enter the encoder, M image tokens whose logits are computed,
L text tokens, P positions of the text decoder's image prefix, F width of the frozen text features, D encoder width, E
width of the text encoder's embeddings, V vocabulary, C codebook entries (in the functions at the end: entries of any
table), S positions of image or text tokens, T width of a teacher's features, X images.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diptych.data.batch import Batch, Examples, ImageTokenExamples, PairExamples, TextExamples
from diptych.errors import UserError
from diptych.itit.generation import (
    ImageGenerationConfig,
    TextGenerationConfig,
    generate_image_tokens,
    generate_text,
)
from diptych.itit.model import ITIT, Encoded, Masking, MaskingConfig, sample_masking, shift_right
from diptych.nn.inference import eval_mode, gathered, local_part
from diptych.nn.transformer import Block, positions_of
from diptych.rng import StepRNG
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import PAD
from diptych.train.objective import Losses, Objective


@dataclass(kw_only=True, slots=True)
class LossWeights:
    """Weights of the losses in their sum. The paper gives all the same weight, but does not state the weight of I2I."""

    t2i: float = 1.0
    """Weight of text to image, on pairs; 0 leaves out its passes."""
    i2t: float = 1.0
    """Weight of image to text, on pairs."""
    i2i: float = 1.0
    """Weight of masked modelling without a text, on the images of the pairs."""
    t2i2t: float = 1.0
    """Weight of the cycle on unpaired texts."""
    i2t2i: float = 1.0
    """Weight of the cycle on unpaired images."""
    t2t: float = 0.0
    """Weight of a language model on unpaired texts, beside their cycle or, with texts off, in its place (Table 2)."""
    unpaired_i2i: float = 0.0
    """Weight of masked modelling on unpaired images, beside their cycle or, with images off, in its place (Table 2)."""
    teacher: float = 0.5
    """Weight of the alignment with the features of a pretrained vision model. Unused without `--teacher`."""


@dataclass(kw_only=True, slots=True)
class ItitObjectiveConfig:
    """The defaults are the paper's, except for the image generation inside T2I2T (see ``image_generation``)."""

    texts: Literal["off", "half", "full"] = "full"
    """Cycle T2I2T on unpaired texts: none, half or full."""
    images: Literal["off", "half", "full"] = "full"
    """Cycle I2T2I on unpaired images: none, half or full."""
    cycle_start_step: int = 25_000
    """Step at which the cycles begin. Generated images and texts are noise before it (Table 5)."""
    image_masking: MaskingConfig = field(default_factory=MaskingConfig)
    """Share of image tokens hidden where an image is predicted (T2I, I2I on unpaired images, I2T2I)."""
    text_masking: MaskingConfig = field(default_factory=lambda: MaskingConfig(high=0.75))
    """Share of image tokens hidden where a text is predicted (I2T, T2I2T), and in I2I on pairs, which shares the
    encoder pass of I2T."""
    label_smoothing: float = 0.1
    """Label smoothing of every loss, between 0 and 1."""
    encoder_grad_scale: float = 0.1
    """Factor on the text decoder's gradient where it enters the encoder."""
    gumbel: float = 1.0
    """Factor on the Gumbel noise in the straight-through estimate of T2I2T; 0 is a plain softmax."""
    image_feature_noise: float = 0.3
    """Scale of the noise (residual of a random training pair) added to the image features predicted from a text in
    T2I2T. Unused without an image encoder."""
    image_generation: ImageGenerationConfig = field(
        default_factory=lambda: ImageGenerationConfig(steps=8, guidance=0.0, temperature=4.0)
    )
    """Generation of images for unpaired texts in T2I2T. It takes fewer steps than the paper's and no guidance; see
    docs/results.md for the effect."""
    cycle_share: float = 1.0
    """Share of the unpaired images and texts of a step that go through the cycles. All do in the paper."""
    cycle_network: Literal["self", "ema"] = "self"
    """Network that generates inside the cycles: the one in training (the paper) or its moving average (DoraCycle)."""
    cycle_network_decay: float = 0.999
    """Decay of that moving average, per step."""
    embedding_lr_scale: float = 1.0
    """Factor on the learning rate of the embeddings of image tokens and words. A row of them learns only in steps that
    show its token, so in a short run they lag behind the other weights."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the losses in their sum."""


SomeExamples = TypeVar("SomeExamples", bound=Examples)
_ONE_BEAM = TextGenerationConfig(beams=1)
"""Settings of the greedy generation of texts in I2T2I."""


class AlignmentHead(nn.Module):
    """REPA's projection head: predicts features of a frozen vision model (the teacher) from the mean encoder output.

    The teacher is not here: its features come with the batch. The head is dropped after training. Features are
    standardized with the statistics of the captioned images, since raw ones have nearly the same direction.
    """

    mean_T: Tensor
    scale_T: Tensor

    def __init__(self, features_XT: Float[Tensor, "X T"], *, width: int) -> None:
        """``features_XT`` are the teacher's, of captioned images; ``width`` is D."""
        super().__init__()
        inner = 2 * width
        self.layers = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, features_XT.shape[1]))
        self.register_buffer("mean_T", features_XT.mean(0))
        self.register_buffer("scale_T", features_XT.std(0, correction=0).clamp_min(1e-6).reciprocal())

    def forward(self, image_BKD: Float[Tensor, "B K D"], features_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B"]:
        """The cosine of what is predicted of each image and the features that it has."""
        wanted_BT = (features_BT - self.mean_T) * self.scale_T
        return F.cosine_similarity(self.layers(image_BKD.mean(1)).float(), wanted_BT, dim=-1)


class ItitObjective(Objective):
    """L = L_T2I + L_I2T + L_I2I on pairs, + L_T2I2T on unpaired texts, + L_I2T2I on unpaired images.

    With an :class:`AlignmentHead`, + L_teacher on the images of both.
    """

    may_skip_parameters = True  # before the cycles start, or at weight 0, some layers get no gradient

    def __init__(
        self,
        model: ITIT,
        text_encoder: TextEncoder,
        config: ItitObjectiveConfig,
        *,
        teacher_head: AlignmentHead | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher_head = teacher_head
        self.text_encoder = text_encoder
        self.config = config
        if not 0 < config.cycle_share <= 1:
            raise UserError(f"--objective.cycle-share {config.cycle_share:g}: give a share above 0 and at most 1")
        self.streams = {"pairs": 2}  # one for T2I and another one for I2T and I2I, as in the paper
        if config.images != "off" or config.weights.unpaired_i2i:
            self.streams["images"] = 1
        if config.texts != "off" or config.weights.t2t:
            self.streams["texts"] = 1
        self.averaged = copy.deepcopy(model).requires_grad_(False) if config.cycle_network == "ema" else None

    def forward(self, batch: Batch, step: int) -> Losses:
        """The weighted sum of the losses that are on at this step, and each of them unweighted."""
        config, rng = self.config, batch.rng
        measures: dict[str, Tensor] = {}
        pairs: PairExamples = batch["pairs"]
        for_image, for_text = pairs[0::2], pairs[1::2]  # interleaved, so that each micro-batch gets both halves
        losses = {"t2i": self.t2i_loss(for_image, rng)} if config.weights.t2i else {}
        losses |= self.i2t_and_i2i_losses(for_text, rng)
        if config.weights.t2t:
            losses["t2t"] = self.t2t_loss(batch["texts"])
        if config.weights.unpaired_i2i:
            losses["unpaired_i2i"] = self.unpaired_i2i_loss(batch["images"], rng)
        if self.teacher_head is not None:
            seen = {"pairs": for_text} | ({"images": batch["images"]} if "images" in self.streams else {})
            aligned = [self.teacher_loss(images, rng, name) for name, images in seen.items()]
            losses["teacher"] = torch.stack(aligned).mean()
        if step >= config.cycle_start_step:
            if config.texts != "off":
                losses["t2i2t"] = self.t2i2t_loss(self._cycled(batch["texts"]), rng)
            if config.images != "off":
                images = self._cycled(batch["images"])
                losses["i2t2i"], measures["i2t2i/distinct_captions"] = self.i2t2i_loss(images, rng)
        weighted = [getattr(config.weights, name) * loss for name, loss in losses.items()]
        total = torch.stack(weighted).sum()
        return Losses(total, losses, measures)

    def _cycled(self, unpaired: SomeExamples) -> SomeExamples:
        """The rows that go through a cycle, evenly spread, so that those of micro-batches are those of the whole."""
        rows = len(unpaired)
        count = max(1, round(self.config.cycle_share * rows))
        return unpaired if count == rows else unpaired[torch.arange(count) * rows // count]

    # Captioned images

    def t2i_loss(self, pairs: PairExamples, rng: StepRNG) -> Float[Tensor, ""]:
        """L_T2I = - E sum over hidden k of log p(i_k | I_M, T), equation (2)."""
        masking = self._sample_masking(self.config.image_masking, pairs, rng, "t2i")
        image_BND = self.model.embed_image(pairs.tokens_BN)
        encoded = self.model.encode(image_BND, masking, self._text_features(pairs), pairs.valid_BL)
        return self._image_loss(encoded, pairs.tokens_BN, masking)

    def i2t_and_i2i_losses(self, pairs: PairExamples, rng: StepRNG) -> dict[str, Float[Tensor, ""]]:
        """Two losses on one pass of the encoder over I_M and the empty text.

        L_I2T = - E sum over l of log p(t_l | I_M, t_0 .. t_{l-1}), equation (1).

        L_I2I = - E sum over hidden k of log p(i_k | I_M), equation (2) with the empty text. It trains the
        unconditional branch of classifier-free guidance. At weight 0, its pass of the image decoder is left out; with
        an image encoder, which gives I2T its prefix, so is the pass of the encoder.
        """
        reader = self.model.image_features
        prefix_BPD = None if reader is None else reader(pairs.image_features_BG)
        i2i = {}
        if prefix_BPD is None or self.config.weights.i2i:
            masking = self._sample_masking(self.config.text_masking, pairs, rng, "i2t")
            encoded = self.model.encode(self.model.embed_image(pairs.tokens_BN), masking)
            prefix_BPD = self._text_decoder_input(encoded) if prefix_BPD is None else prefix_BPD
            if self.config.weights.i2i:
                i2i = {"i2i": self._image_loss(encoded, pairs.tokens_BN, masking)}
        return {"i2t": self._text_loss(prefix_BPD, pairs.ids_BL, pairs.valid_BL)} | i2i

    # Unpaired texts

    def t2i2t_loss(self, texts: TextExamples, rng: StepRNG) -> Float[Tensor, ""]:
        """L_T2I2T = - E sum over l of log p(t_l | ~I_M, t_0 .. t_{l-1}), equation (3).

        First, an image I' is generated from T, without gradient. Then part of I' is hidden and predicted once more,
        with gradient, which gives ~I; the half cycle leaves this out and takes I' for ~I. Finally, part of ~I is
        hidden, and the rest is captioned.

        With an image encoder, no image is generated: its features are predicted from T by ridge regression. Half and
        full cycle then do not differ.
        """
        features_BLF = self._text_features(texts)
        if (reader := self.model.image_features) is not None:
            noise = self.config.image_feature_noise
            predicted_BG = reader.of_texts(features_BLF, texts.valid_BL, noise=noise, rng=rng)
            return self._text_loss(reader(predicted_BG), texts.ids_BL, texts.valid_BL)
        network = self.averaged or self.model
        with eval_mode(network):
            pseudo_BN = generate_image_tokens(
                network, features_BLF, texts.valid_BL, self.config.image_generation, rng=rng
            )
        return self.t2i2t_loss_from_images(pseudo_BN, texts, features_BLF, rng)

    def t2i2t_loss_from_images(
        self, pseudo_BN: Int[Tensor, "B N"], texts: TextExamples, features_BLF: Float[Tensor, "B L F"], rng: StepRNG
    ) -> Float[Tensor, ""]:
        """L_T2I2T, equation (3), from the generated images I' on; separate so that `plan.py` can count it without
        generating."""
        image_BND = self.model.embed_image(pseudo_BN)
        second = self._sample_masking(self.config.text_masking, texts, rng, "t2i2t/second")
        if self.config.texts == "full":
            assert second.keep_BK is not None
            first = self._sample_masking(self.config.image_masking, texts, rng, "t2i2t/first")
            predicted_BKD = self._predict_image(image_BND, first, second.keep_BK, features_BLF, texts.valid_BL, rng)
            image_BND = image_BND.scatter(1, second.keep_BK[..., None].expand_as(predicted_BKD), predicted_BKD)
        prefix_BKD = self._text_decoder_input(self.model.encode(image_BND, second))
        return self._text_loss(prefix_BKD, texts.ids_BL, texts.valid_BL)

    def _predict_image(
        self,
        image_BND: Float[Tensor, "B N D"],
        masking: Masking,
        keep_BK: Int[Tensor, "B K"],
        features_BLF: Float[Tensor, "B L F"],
        valid_BL: Bool[Tensor, "B L"],
        rng: StepRNG,
    ) -> Float[Tensor, "B K D"]:
        """Embeddings of ~I at the positions ``keep_BK``, the only ones that are read after this; ``image_BND`` is I'.

        Where I' is hidden, ~i_k = argmax p(i_k | I'_M, T), straight through a Gumbel-softmax. The gradient stops after
        the encoder: with two encoder passes that have gradients, training became unstable.
        """
        with torch.no_grad():
            encoded = self.model.encode(image_BND, masking, features_BLF, valid_BL)
        logits_BKC = self.model.image_logits(encoded.detach(), masking.hidden_BN, wanted_BM=keep_BK).float()
        if self.config.gumbel:
            noise_BKC = rng.gumbel("gumbel", *logits_BKC.shape, device=logits_BKC.device)
            logits_BKC = logits_BKC + self.config.gumbel * noise_BKC
        predicted_BKD = straight_through_embedding(logits_BKC, self.model.token_embedding.weight)
        hidden_BK = masking.hidden_BN.gather(1, keep_BK)
        return torch.where(hidden_BK[..., None], predicted_BKD, positions_of(image_BND, keep_BK))

    def t2t_loss(self, texts: TextExamples) -> Float[Tensor, ""]:
        """- E sum over l of log p(t_l | t_0 .. t_{l-1}): a language model without images (Table 2, rows 5 and 7)."""
        return self._text_loss(None, texts.ids_BL, texts.valid_BL)

    # Unpaired images

    def i2t2i_loss(self, images: ImageTokenExamples, rng: StepRNG) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """L_I2T2I = - E sum over hidden k of log p(i_k | I_M, ~T), equation (4).

        First, a text T' is generated from I, greedily and without gradient. Then each token of T' is predicted once
        more, with gradient, which gives ~T; the half cycle leaves this out and takes T' for ~T. Finally, ~T is encoded
        by the frozen text encoder, and the hidden part of I is predicted from it. ~T ends where T' ends.

        Also returns the share of different T' among the rows. Cycles can agree on captions that are consistent but say
        nothing; this share is the first number to fall.
        """
        tokens_BN = images.tokens_BN
        network, banned_V = self.averaged or self.model, self.text_encoder.banned_V
        # The number of decoding steps differs between processes, so FSDP must gather the weights beforehand.
        with eval_mode(network), gathered(network.text_decoder):
            generated = generate_text(
                network, images, _ONE_BEAM, banned_V=banned_V, length=self.model.config.max_text_len, pack=False
            )
        pseudo_BL = generated.ids_BWL[:, 0]
        pseudo_BL = pseudo_BL[:, : int((pseudo_BL != PAD).sum(1).max())]  # ends where the longest text does
        distinct = torch.tensor(len(pseudo_BL.unique(dim=0)) / len(pseudo_BL), device=tokens_BN.device)
        return self.i2t2i_loss_from_texts(pseudo_BL, images, rng), distinct

    def i2t2i_loss_from_texts(
        self, pseudo_BL: Int[Tensor, "B L"], images: ImageTokenExamples, rng: StepRNG
    ) -> Float[Tensor, ""]:
        """L_I2T2I, equation (4), from the generated texts T' on; separate so that `plan.py` can count it without
        generating."""
        tokens_BN, valid_BL = images.tokens_BN, pseudo_BL != PAD
        if self.config.images == "full":
            first = self._sample_masking(self.config.text_masking, images, rng, "i2t2i/first")
            embedded_BLE = self._predict_text(images, first, pseudo_BL)
            features_BLF = self.text_encoder.features_from_embeddings(embedded_BLE, valid_BL)
        else:
            features_BLF = self.text_encoder.features(pseudo_BL, valid_BL)
        second = self._sample_masking(self.config.image_masking, images, rng, "i2t2i/second")
        encoded = self.model.encode(self.model.embed_image(tokens_BN), second, features_BLF, valid_BL)
        return self._image_loss(encoded, tokens_BN, second)

    def _predict_text(
        self, images: ImageTokenExamples, masking: Masking, pseudo_BL: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L E"]:
        """The text encoder's embeddings of ~t_l = argmax p(t_l | I_M, t'_0 .. t'_{l-1}), straight through a softmax.

        The gradient stops after the encoder, as in T2I2T.
        """
        if (reader := self.model.image_features) is not None:
            prefix_BPD = reader(images.image_features_BG)
        else:
            with torch.no_grad():
                encoded = self.model.encode(self.model.embed_image(images.tokens_BN), masking)
            prefix_BPD = encoded.image_BKD
        logits_BLV = self.model.text_logits(prefix_BPD.detach(), shift_right(pseudo_BL)).float()
        logits_BLV = logits_BLV.masked_fill(self.text_encoder.banned_V, -torch.inf)
        return straight_through_embedding(logits_BLV, self.text_encoder.embedding.weight)

    def unpaired_i2i_loss(self, images: ImageTokenExamples, rng: StepRNG) -> Float[Tensor, ""]:
        """- E sum over hidden k of log p(i_k | I_M): masked modelling without texts (Table 2, rows 6 and 7)."""
        masking = self._sample_masking(self.config.image_masking, images, rng, "unpaired_i2i")
        encoded = self.model.encode(self.model.embed_image(images.tokens_BN), masking)
        return self._image_loss(encoded, images.tokens_BN, masking)

    # All images

    def teacher_loss(self, images: PairExamples | ImageTokenExamples, rng: StepRNG, name: str) -> Float[Tensor, ""]:
        """L_teacher = - E cos(h(mean_k z_k), y), where z is the encoder's output for I_M and the empty text.

        Here y are the features of a frozen vision model and h is a small head (Yu et al., 2025, "Representation
        Alignment for Generation", equation 8). Departure: one feature of the whole image is aligned, not one of each
        patch, so that a cache holds T numbers an image. As much of I is hidden as where it is captioned.
        """
        assert self.teacher_head is not None
        assert images.teacher_features_BT is not None
        masking = self._sample_masking(self.config.text_masking, images, rng, f"teacher/{name}")
        encoded = self.model.encode(self.model.embed_image(images.tokens_BN), masking)
        return -self.teacher_head(encoded.image_BKD, images.teacher_features_BT).mean()

    # What the losses share

    def _image_loss(self, encoded: Encoded, tokens_BN: Int[Tensor, "B N"], masking: Masking) -> Float[Tensor, ""]:
        """- sum over hidden k of log p(i_k | encoded): the common part of equations (2) and (4).

        With ``masking.decode_BM`` over those among its positions.
        """
        hidden_BM, decode_BM = masking.hidden_BN, masking.decode_BM
        logits_BMC = self.model.image_logits(encoded, hidden_BM, decode_BM)
        if decode_BM is not None:
            tokens_BN, hidden_BM = tokens_BN.gather(1, decode_BM), hidden_BM.gather(1, decode_BM)
        return token_loss(logits_BMC, tokens_BN, hidden_BM, label_smoothing=self.config.label_smoothing)

    def _text_loss(
        self, prefix_BPD: Float[Tensor, "B P D"] | None, ids_BL: Int[Tensor, "B L"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, ""]:
        """- sum over l of log p(t_l | prefix, t_0 .. t_{l-1}): the common part of equations (1) and (3)."""
        logits_BLV = self.model.text_logits(prefix_BPD, shift_right(ids_BL))
        return token_loss(logits_BLV, ids_BL, valid_BL, label_smoothing=self.config.label_smoothing)

    def _text_decoder_input(self, encoded: Encoded) -> Float[Tensor, "B K D"]:
        """What the text decoder reads of the encoder: z <- 0.1 z + sg(0.9 z), with ``encoder_grad_scale`` for 0.1."""
        z, share = encoded.image_BKD, self.config.encoder_grad_scale
        return share * z + ((1 - share) * z).detach()

    def _text_features(self, examples: TextExamples | PairExamples) -> Float[Tensor, "B L F"]:
        """The cached features of the frozen text encoder; without a cache they are computed."""
        if examples.features_BLF is not None:
            return examples.features_BLF
        return self.text_encoder.features(examples.ids_BL, examples.valid_BL)

    def _sample_masking(self, config: MaskingConfig, examples: Examples, rng: StepRNG, name: str) -> Masking:
        rows, positions = len(examples), self.model.config.image_tokens
        return sample_masking(config, rows, positions, rng=rng, name=name, device=self.text_encoder.banned_V.device)

    @torch.no_grad()
    def start_step(self, step: int) -> None:
        """Move the averaged network towards the one in training; at the first step with cycles, make it a copy."""
        if self.averaged is None or step < self.config.cycle_start_step:
            return
        first = step == self.config.cycle_start_step
        current, averaged = ([local_part(p) for p in each.parameters()] for each in (self.model, self.averaged))
        torch._foreach_lerp_(averaged, current, 1.0 if first else 1 - self.config.cycle_network_decay)

    # What the training loop asks for

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The default groups, with the embeddings of image tokens and words apart."""
        embeddings = [self.model.token_embedding.weight, self.model.word_embedding.weight]
        others = [p for p in self.model.parameters() if all(p is not table for table in embeddings)]
        others += [] if self.teacher_head is None else list(self.teacher_head.parameters())
        return [
            {"params": [p for p in others if p.ndim >= 2]},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            {"params": embeddings, "lr_scale": self.config.embedding_lr_scale},
        ]

    def compile_regions(self) -> None:
        """Compile the transformer blocks, once for all that are alike.

        The loops of the generation stay as they are: to trace them as a whole takes many minutes.
        """
        for module in self.model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state without the frozen text encoder, which has a folder of its own."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in [name for name in state if name.startswith(f"{prefix}text_encoder.")]:
            del state[name]
        return state


def token_loss(
    logits_BSC: Float[Tensor, "B S C"],
    target_BS: Int[Tensor, "B S"],
    counts_BS: Bool[Tensor, "B S"],
    *,
    label_smoothing: float,
) -> Float[Tensor, ""]:
    """- sum over t of log p(target_t | ...), the common part of equations (1) to (4), as a mean.

    The mean is over rows, of each row's mean over the positions that count. So it is the same for any split of the rows
    over micro-batches or processes. (The paper's equations are sums over tokens in expectation over rows; it does not
    say how it normalizes.) A row in which nothing counts adds 0.

    Args:
        logits_BSC: Scores of every token at each position.
        target_BS: The true tokens.
        counts_BS: True where the loss is taken: hidden image tokens, or valid text tokens.
        label_smoothing: Share of the target's probability that is spread over all tokens.
    """
    loss_BS = F.cross_entropy(
        logits_BSC.flatten(0, 1).float(), target_BS.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(target_BS)
    weight_BS = counts_BS.to(loss_BS.dtype)
    return ((loss_BS * weight_BS).sum(1) / weight_BS.sum(1).clamp_min(1)).mean()


def straight_through_embedding(logits: Float[Tensor, "... C"], table: Float[Tensor, "C D"]) -> Float[Tensor, "... D"]:
    """Embed the likeliest entry of each position; the gradient is that of the embedded softmax.

    Equals ``(hard + (soft - soft.detach())) @ table`` with ``soft = softmax(logits)`` and ``hard`` its one-hot argmax,
    but gathers rows instead of multiplying by a dense one-hot ([64, 256, 8192] in fp32 would take half a gigabyte).
    Add Gumbel noise to ``logits`` for a straight-through Gumbel-softmax.
    """
    return _StraightThroughEmbedding.apply(logits.float(), table)


class _StraightThroughEmbedding(torch.autograd.Function):
    """Forward: rows of the table. Backward: as if they were weighted by the softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, table: Tensor) -> Tensor:
        best = logits.argmax(-1)
        ctx.save_for_backward(logits, table, best)
        return table[best]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = outputs
        logits, table, best = ctx.saved_tensors
        grad_logits = grad_table = None
        if ctx.needs_input_grad[0]:
            soft = logits.softmax(-1)
            grad_soft = (grad.to(table.dtype) @ table.T).to(soft.dtype)
            grad_logits = soft * (grad_soft - (soft * grad_soft).sum(-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            flat = grad.reshape(-1, grad.shape[-1]).to(table.dtype)
            grad_table = torch.zeros_like(table).index_add_(0, best.reshape(-1), flat)
        return grad_logits, grad_table
