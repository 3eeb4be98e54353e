"""Pre-training a small T5 on the user's own texts by span corruption (Raffel et al. 2020, section 3.1.4).

    text     a red circle above a blue star </s>
    input    a <extra_id_0> above a blue <extra_id_1> </s>
    target   <extra_id_0> red circle <extra_id_1> star </s>

Its encoder becomes the frozen text encoder where no published T5 is at hand or none knows the domain.

Departure: T5 packs texts into long rows, which always begin with a visible span and end with a hidden one. Here each
caption is a row; that rule would hide the last words of every caption and never the first. Spans are placed uniformly
over all ways to place them without touching one another.

Shapes: B texts, L text tokens, K spans at most, T target tokens, V vocabulary rows.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diptych.data.batch import Batch, TextExamples
from diptych.encoders.loading import fuse_gelu
from diptych.errors import UserError
from diptych.rng import StepRNG, derive_seed
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import EOS, PAD
from diptych.train.objective import Losses, Objective

_ROW_MULTIPLE = 64
"""Embedding rows come in multiples of this: matrix units want it, and T5's own table has spare rows too."""


@dataclass(kw_only=True, slots=True)
class TextEncoderConfig:
    """A small T5 to train from scratch. The defaults suit 100,000 captions and ten minutes of two CPU cores."""

    vocab_size: int = 8192
    """Largest number of ids of the tokenizer, sentinels included."""
    sentinels: int = 100
    """Number of sentinels `<extra_id_*>`; a text has at most as many hidden spans."""
    lowercase: bool = False
    """Whether the tokenizer lower-cases all text, in training and later."""
    width: int = 256
    """Number of features of a token."""
    layers: int = 4
    """Number of blocks of the encoder, the half that is kept."""
    decoder_layers: int = 2
    """Number of blocks of the decoder, which only serves the training."""
    heads: int = 4
    """Number of attention heads; it divides the width."""
    feed_forward: int = 512
    """Number of features inside the gated feed-forward layers."""
    noise_density: float = 0.15
    """Share of the tokens that is hidden, at least one token of every text."""
    mean_span: float = 3.0
    """Mean length of a hidden span, in tokens."""

    @classmethod
    def tiny(cls) -> "TextEncoderConfig":
        """For a grammar of some sixty words. Trains in seconds on a CPU."""
        return cls(vocab_size=512, sentinels=16, width=64, layers=2, decoder_layers=1, feed_forward=128)

    @classmethod
    def small(cls) -> "TextEncoderConfig":
        """For captions of natural images."""
        return cls(vocab_size=4096, lowercase=True)

    def t5(self, *, vocab_real: int) -> "transformers.T5Config":
        """The `transformers` configuration. No dropout, as it would draw from the global generator."""
        if self.width % self.heads:
            raise UserError(f"width={self.width} cannot be shared by heads={self.heads}: use a multiple")
        return transformers.T5Config(
            vocab_size=-(-vocab_real // _ROW_MULTIPLE) * _ROW_MULTIPLE,
            d_model=self.width,
            d_kv=self.width // self.heads,
            d_ff=self.feed_forward,
            num_layers=self.layers,
            num_decoder_layers=self.decoder_layers,
            num_heads=self.heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Starts and lengths of the hidden spans of each text. Unused spans start at L and are 0 long."""

    starts_BK: Int[Tensor, "B K"]
    lengths_BK: Int[Tensor, "B K"]


def place_spans(
    words_B: Int[Tensor, "B"],
    *,
    noise_density: float,
    mean_span: float,
    most: int,
    uniform_BL: Float[Tensor, "B L"],
    gaps_uniform_BM: Float[Tensor, "B M"],
) -> Spans:
    """Places at most ``most`` hidden spans in each text of ``words_B`` tokens, its `</s>` not counted.

    A text has round(noise_density * words) hidden tokens, but at least one, in round(tokens / mean_span) spans, but at
    least one. The lengths of the spans and the gaps between them are uniformly random compositions, which follow from
    the uniform numbers ``uniform_BL`` and ``gaps_uniform_BM`` (M = L + 1).
    """
    most_hidden = _most_hidden(uniform_BL.shape[1], noise_density)
    hidden_B = (words_B * noise_density + 0.5).long().clamp(min=1, max=most_hidden).minimum(words_B)
    spans_B = (hidden_B / mean_span + 0.5).long().clamp(min=1, max=most).minimum(hidden_B)
    spans_B = spans_B.minimum(words_B - hidden_B + 1)  # neighbours are a visible token apart
    lengths_BK = _compose(hidden_B, spans_B, uniform=uniform_BL, most=most)
    # Gaps between spans hold at least one token, but the two outer ones may be empty: each is lent one here.
    gaps_BK = _compose(words_B - hidden_B + 2, spans_B + 1, uniform=gaps_uniform_BM, most=most + 1)[:, :most]
    starts_BK = gaps_BK.cumsum(1) - 1 + lengths_BK.cumsum(1) - lengths_BK
    used_BK = torch.arange(most, device=words_B.device) < spans_B[:, None]
    return Spans(starts_BK=starts_BK.where(used_BK, uniform_BL.shape[1]), lengths_BK=lengths_BK)


def _most_hidden(length: int, noise_density: float) -> int:
    return max(1, int(length * noise_density + 0.5))


def _compose(total_B: Tensor, parts_B: Tensor, *, uniform: Tensor, most: int) -> Tensor:
    """Each total as an ordered sum of ``parts`` numbers >= 1, all sums equally likely; int64 [B, most], 0 where unused.

    A composition is a choice of parts - 1 cuts among the total - 1 places between units.
    """
    place = torch.arange(uniform.shape[1], device=uniform.device)
    inside = place < total_B[:, None]
    rank = uniform.masked_fill(~inside | (place == 0), 2.0).argsort(1).argsort(1)
    part = (rank < parts_B[:, None] - 1).cumsum(1)
    return inside.new_zeros(len(total_B), most, dtype=torch.int64).scatter_add_(
        1, part.clamp(max=most - 1), inside.long()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupted:
    """The input of the encoder and the target of the decoder."""

    ids_BL: Int[Tensor, "B L"]
    valid_BL: Bool[Tensor, "B L"]
    target_BT: Int[Tensor, "B T"]
    target_valid_BT: Bool[Tensor, "B T"]


def corrupt(
    ids_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    *,
    spans: Spans,
    sentinels_K: Int[Tensor, "K"],
    target_length: int,
) -> Corrupted:
    """Replaces each hidden span by a sentinel. The target lists each sentinel with the tokens of its span, then `</s>`.

    Rows are compacted by computing the place of every token in its new row and scattering; what is dropped goes to
    a column beyond the end. Shapes depend on no value, so this compiles and never waits for the device.
    """
    rows, length = ids_BL.shape
    place_L1 = torch.arange(length, device=ids_BL.device)[:, None]
    starts_B1K, lengths_B1K = spans.starts_BK[:, None], spans.lengths_BK[:, None]
    hidden_BL = ((place_L1 >= starts_B1K) & (place_L1 < starts_B1K + lengths_B1K)).any(2)
    first_BL = (place_L1 == starts_B1K).any(2)
    span_BL = (place_L1 >= starts_B1K).sum(2) - 1
    sentinel_BL = sentinels_K[span_BL.clamp(min=0)]

    kept_BL = valid_BL & (~hidden_BL | first_BL)
    place_BL = torch.where(kept_BL, kept_BL.cumsum(1) - 1, length)
    input_BL = _scatter(place_BL, torch.where(first_BL, sentinel_BL, ids_BL), width=length)

    target_place_BL = torch.where(hidden_BL, hidden_BL.cumsum(1) + span_BL, target_length)
    sentinel_place_BL = torch.where(first_BL, hidden_BL.cumsum(1) - 1 + span_BL, target_length)
    end_B1 = (hidden_BL.sum(1) + first_BL.sum(1))[:, None]
    place_BX = torch.cat([target_place_BL, sentinel_place_BL, end_B1], dim=1)
    token_BX = torch.cat([ids_BL, sentinel_BL, ids_BL.new_full((rows, 1), EOS)], dim=1)
    target_BT = _scatter(place_BX, token_BX, width=target_length)
    target_valid_BT = torch.arange(target_length, device=ids_BL.device) <= end_B1
    return Corrupted(ids_BL=input_BL, valid_BL=input_BL != PAD, target_BT=target_BT, target_valid_BT=target_valid_BT)


def _scatter(place: Tensor, values: Tensor, *, width: int) -> Tensor:
    return values.new_full((len(place), width + 1), PAD).scatter_(1, place, values)[:, :width]


class SpanCorruption(Objective):
    """Trains a T5 from scratch on the stream ``texts``; :meth:`text_encoder` gives its encoder, frozen."""

    sentinels_K: Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, config: TextEncoderConfig, seed: int = 0):
        """``tokenizer`` from `train_tokenizer`; weights are T5's own initial ones, drawn from ``seed``."""
        super().__init__()
        self.streams = {"texts": 1}
        self.tokenizer = tokenizer
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "span corruption"))
            self.t5 = fuse_gelu(transformers.T5ForConditionalGeneration(config.t5(vocab_real=len(tokenizer))))
        marks = [tokenizer.convert_tokens_to_ids(f"<extra_id_{k}>") for k in range(config.sentinels)]
        self.register_buffer("sentinels_K", torch.tensor(marks), persistent=False)

    def forward(self, batch: Batch, step: int) -> Losses:
        texts: TextExamples = batch["texts"]
        corrupted = self.corrupt(texts.ids_BL, texts.valid_BL, rng=batch.rng)
        decoder_input_BT = F.pad(corrupted.target_BT, (1, -1), value=PAD)  # T5's decoder starts from the pad id
        logits_BTV = self.t5(
            input_ids=corrupted.ids_BL,
            attention_mask=corrupted.valid_BL[:, None, None],
            decoder_input_ids=decoder_input_BT,
            use_cache=False,
        ).logits
        target_BT, valid_BT = corrupted.target_BT, corrupted.target_valid_BT
        loss_BT = F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten(), reduction="none")
        loss_BT = loss_BT.view_as(target_BT) * valid_BT
        loss = (loss_BT.sum(1) / valid_BT.sum(1).clamp_min(1)).mean()
        return Losses(loss, {"spans": loss.detach()})

    def corrupt(self, ids_BL: Tensor, valid_BL: Tensor, *, rng: StepRNG) -> Corrupted:
        """Texts with random hidden spans."""
        (rows, length), config = ids_BL.shape, self.config
        hidden = _most_hidden(length, config.noise_density)
        most = min(max(1, int(hidden / config.mean_span + 0.5)), config.sentinels)
        spans = place_spans(
            (valid_BL.sum(1) - 1).clamp(min=0),
            noise_density=config.noise_density,
            mean_span=config.mean_span,
            most=most,
            uniform_BL=rng.uniform("span lengths", rows, length, device=ids_BL.device),
            gaps_uniform_BM=rng.uniform("span gaps", rows, length + 1, device=ids_BL.device),
        )
        return corrupt(
            ids_BL, valid_BL, spans=spans, sentinels_K=self.sentinels_K[:most], target_length=hidden + most + 1
        )

    def text_encoder(self) -> TextEncoder:
        """A frozen copy of the encoder half on the CPU; training on does not change it."""
        half = transformers.T5EncoderModel(self.config.t5(vocab_real=len(self.tokenizer)))
        half.load_state_dict({name: self.t5.state_dict()[name] for name in half.state_dict()})
        return TextEncoder(half, copy.deepcopy(self.tokenizer))
