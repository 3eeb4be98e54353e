"""The ITIT network: one encoder of images and texts, an image decoder and a text decoder; and what is hidden from it.

Li et al., "Leveraging Unpaired Data for Vision-Language Generative Models via Cycle Consistency", section 3.1 and
appendix B.

Shapes: B rows, N image tokens, K image tokens kept for the encoder, M image tokens whose logits are computed, C
codebook entries, L text tokens, P positions of the text decoder's image prefix, F width of the frozen text features, G
width of a pretrained encoder's image features, V vocabulary, D encoder width, W text decoder width, R residuals, X
pairs of a text and an image.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diptych.encoders.image import ImageEncoder
from diptych.errors import UserError
from diptych.nn.inference import Derived, Int8Linear, PackedLinear, pack_linears, replace_linears_by_int8
from diptych.nn.transformer import Blocks, LayerCache, init_fan_in, init_weights, positions_of, prefix_causal
from diptych.rng import StepRNG
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import FeatureKind, TextEncoder
from diptych.tokenizers.text_tokenizer import PAD

_RESIDUALS = 512
"""Number of residuals of the regression that are kept (R)."""
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties that are tried, as multiples of the mean of the diagonal that they are added to."""
_HELD_OUT = 6
"""One of so many pairs is held out to choose the penalty."""


def shift_right(ids_BL: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """t_0 .. t_{L-1}, the text decoder's inputs for the prediction of ``ids_BL``; t_0 is PAD."""
    inputs_BL = ids_BL.roll(1, dims=1)
    inputs_BL[:, 0] = PAD
    return inputs_BL


@dataclass(kw_only=True, slots=True)
class ItitConfig:
    """The defaults are ITIT-B of the paper (221M parameters)."""

    image_tokens: int = 256
    """Number of tokens of an image (N). A run takes it from its image tokenizer."""
    codebook_size: int = 8192
    """Number of entries of the codebook (C). A run takes it from its image tokenizer."""
    max_text_len: int = 64
    """Largest number of tokens of a text, `</s>` included (L)."""
    text_features: int = 4096
    """Width of the frozen text features (F). A run takes it from its text encoder."""
    vocab_size: int = 32128
    """Number of rows of the word embedding (V). A run takes it from its text encoder."""
    width: int = 768
    """Width of the encoder and the image decoder (D)."""
    depth: int = 12
    """Number of blocks of the encoder."""
    heads: int = 12
    """Number of attention heads of the encoder and of the image decoder."""
    image_decoder_depth: int = 8
    """Number of blocks of the image decoder."""
    text_decoder_width: int = 768
    """Width of the text decoder (W)."""
    text_decoder_depth: int = 6
    """Number of blocks of the text decoder."""
    text_decoder_heads: int = 12
    """Number of attention heads of the text decoder."""
    dropout: float = 0.1
    """Probability of dropout of attention, of both branches of a block and of the input."""
    mlp_ratio: int = 4
    """Width inside the feed-forward layers of a block, as a multiple of the block's width."""
    init: Literal["fixed", "fan_in"] = "fixed"
    """Standard deviation of the initial weights: 0.02 at any width, as in ViT and MAGE, or 1/sqrt(inputs), which a
    narrow network needs to learn within a few hundred steps."""
    text_input: FeatureKind = "output"
    """Frozen text features: the output of the text encoder, or its output beside its input embeddings. A small encoder
    mixes all words of a text into each feature, and which word stands where is then hard to recover."""
    image_features: int = 0
    """Width of the image features that captions are read from (G); 0: they are read from image tokens, as in the paper.
    A run takes it from its image encoder."""
    text_window: int = 1
    """Number of neighbouring tokens whose features the text projection reads at once; an odd number. With more than 1 a
    token knows the words around it without learning that by attention."""
    whiten_text: bool = False
    """Whether the frozen text features are given mean 0 and variance 1 in every direction. The features of a small
    encoder vary in few directions, in which all words look alike."""

    def build(
        self, tokenizer: ImageTokenizer, text_encoder: TextEncoder, image_encoder: ImageEncoder | None = None
    ) -> "ITIT":
        """The network for this tokenizer and these encoders, whose sizes replace the config's own."""
        if self.text_window % 2 == 0:
            raise UserError(f"--model.text-window {self.text_window}: a token in the middle needs an odd number")
        config = replace(
            self,
            image_tokens=tokenizer.tokens,
            codebook_size=tokenizer.codebook_size,
            text_features=text_encoder.width,
            vocab_size=text_encoder.vocab_rows,
            image_features=0 if image_encoder is None else image_encoder.width,
        )
        return ITIT(config)


@dataclass(frozen=True, slots=True)
class Masking:
    """The hidden tokens of each row, and those that enter the encoder."""

    hidden_BN: Bool[Tensor, "B N"]
    """True where a token is to be predicted."""
    keep_BK: Int[Tensor, "B K"] | None = None
    """Positions that enter the encoder, all visible ones among them; the rest is dropped to save computation. None: all
    positions enter."""
    decode_BM: Int[Tensor, "B M"] | None = None
    """Positions that enter the image decoder in a loss, those of ``keep_BK`` among them. None: all positions enter."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Output of the encoder for an image and a text."""

    image_BKD: Tensor
    """Features of the image tokens that entered the encoder."""
    keep_BK: Tensor
    """Position of each of the K features among the N."""
    text_BLD: Tensor
    """Features of the text; of the null text (L = 1) where none was given."""
    valid_BL: Tensor
    """True for text positions that are no padding."""

    def detach(self) -> "Encoded":
        """The same features without gradient."""
        return Encoded(self.image_BKD.detach(), self.keep_BK, self.text_BLD.detach(), self.valid_BL)


class ITIT(nn.Module, PyTorchModelHubMixin, library_name="diptych", tags=["itit"]):
    """Generates text from images and images from text with one set of weights."""

    text_mean_F: Tensor
    text_whitening_FF: Tensor

    def __init__(self, config: ItitConfig) -> None:
        super().__init__()
        c = self.config = config
        self.token_embedding = nn.Embedding(c.codebook_size, c.width)
        self.image_hidden = nn.Parameter(torch.empty(c.width))
        self.image_position = nn.Embedding(c.image_tokens, c.width)
        self.text_projection = nn.Linear(c.text_window * c.text_features, c.width)
        if c.whiten_text:
            self.register_buffer("text_mean_F", torch.zeros(c.text_features))
            self.register_buffer("text_whitening_FF", torch.eye(c.text_features))
        self.text_position = nn.Embedding(c.max_text_len, c.width)
        self.text_null = nn.Parameter(torch.empty(c.width))
        self.input_norm = nn.LayerNorm(c.width)
        self.input_dropout = nn.Dropout(c.dropout)
        self.encoder = Blocks(c.depth, c.width, heads=c.heads, dropout=c.dropout, mlp_ratio=c.mlp_ratio)

        self.decoder_hidden = nn.Parameter(torch.empty(c.width))
        self.decoder_position = nn.Embedding(c.image_tokens + c.max_text_len, c.width)
        self.image_decoder = Blocks(
            c.image_decoder_depth, c.width, heads=c.heads, dropout=c.dropout, mlp_ratio=c.mlp_ratio
        )
        self.image_head = nn.Sequential(nn.Linear(c.width, c.width), nn.GELU(), nn.LayerNorm(c.width))
        self.image_bias = nn.Parameter(torch.empty(c.codebook_size))

        self.image_features: ImageFeatures | None = None
        if c.image_features:
            self.image_features = ImageFeatures(width=c.width, features=c.image_features, text_features=c.text_features)
        width = c.text_decoder_width
        self.prefix_projection = nn.Sequential(nn.Linear(c.width, width), nn.LayerNorm(width))
        self.word_embedding = nn.Embedding(c.vocab_size, width)
        self.word_position = nn.Embedding(c.max_text_len, width)
        self.text_decoder = Blocks(
            c.text_decoder_depth, width, heads=c.text_decoder_heads, dropout=c.dropout, mlp_ratio=c.mlp_ratio
        )

        self._packed: Derived[tuple[nn.Module, nn.Module]] = Derived()
        self._of_nothing: Derived[Tensor] = Derived()
        self._rounded: Derived[ITIT] = Derived()
        self._int8_words: Int8Linear | None = None
        self._init_weights()

    def _init_weights(self) -> None:
        """As ``ItitConfig.init`` says. With fan_in, positions have a std of 0.06, below the 0.1 of tokens and words."""
        fan_in = self.config.init == "fan_in"
        self.apply(init_fan_in if fan_in else init_weights)
        for vector in (self.image_hidden, self.text_null, self.decoder_hidden):
            nn.init.normal_(vector, std=0.02)
        nn.init.zeros_(self.image_bias)
        if fan_in:
            for table in (self.image_position, self.text_position, self.decoder_position, self.word_position):
                nn.init.normal_(table.weight, std=0.06)

    @torch.no_grad()
    def fit_whitening(self, features_MF: Float[Tensor, "M F"], *, floor: float = 0.01) -> None:
        """Set the whitening by the frozen features of M tokens of real texts.

        Directions with less variance than ``floor`` times the mean variance are noise, and stay small.
        """
        mean_F = features_MF.mean(0)
        variance_F, directions_FF = torch.linalg.eigh((features_MF - mean_F).T.cov())
        scale_F = (variance_F.clamp_min(0) + floor * variance_F.mean()).rsqrt()
        self.text_mean_F.copy_(mean_F)
        self.text_whitening_FF.copy_(directions_FF * scale_F @ directions_FF.T)

    def embed_image(self, tokens_BN: Int[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """Embeddings of image tokens, without their positions: the input of :meth:`encode`."""
        return self.token_embedding(tokens_BN)

    def encode(
        self,
        image_BND: Float[Tensor, "B N D"],
        masking: Masking | None = None,
        features_BLF: Float[Tensor, "B L F"] | None = None,
        valid_BL: Bool[Tensor, "B L"] | None = None,
    ) -> Encoded:
        """Encode the embedded tokens that are not hidden, together with a text or with the learned null text.

        Args:
            masking: what is hidden: a learned vector stands for its embedding. None: all tokens are visible.
            features_BLF: frozen features of the text; None stands for the empty text.
            valid_BL: True for text positions that are no padding; needed with ``features_BLF``.
        """
        rows, positions = image_BND.shape[:2]
        keep_BK = None
        if masking is not None:
            hidden_BN1, keep_BK = masking.hidden_BN[..., None], masking.keep_BK
            image_BND = torch.where(hidden_BN1, self.image_hidden.to(image_BND.dtype), image_BND)
        image = image_BND + self.image_position.weight
        if keep_BK is None:
            keep_BK = torch.arange(positions, device=image.device).expand(rows, -1)
        else:
            image = positions_of(image, keep_BK)
        if features_BLF is None:
            text = self.text_null.expand(rows, 1, -1)
            valid_BL = torch.ones(rows, 1, dtype=torch.bool, device=image.device)
            attend = None
        else:
            assert valid_BL is not None
            text = self._embed_text(features_BLF, valid_BL)
            attend = _attend_to_valid(valid_BL, image.shape[1])
        x = self.input_dropout(self.input_norm(torch.cat([image, text.to(image.dtype)], dim=1)))
        x = self.encoder(x, attend=attend)
        kept = keep_BK.shape[1]
        return Encoded(x[:, :kept], keep_BK, x[:, kept:], valid_BL)

    def _embed_text(self, features_BLF: Tensor, valid_BL: Tensor) -> Tensor:
        """The frozen features, whitened and with their neighbours if the config says so, projected to [B L D]."""
        if self.config.whiten_text:
            features_BLF = (features_BLF - self.text_mean_F) @ self.text_whitening_FF
        if reach := self.config.text_window // 2:
            features_BLF = features_BLF.masked_fill(~valid_BL[..., None], 0.0)  # no token may see the padding
            windows_BLFX = F.pad(features_BLF, (0, 0, reach, reach)).unfold(1, self.config.text_window, 1)
            features_BLF = windows_BLFX.flatten(2)
        return self.text_projection(features_BLF) + self.text_position.weight[: features_BLF.shape[1]]

    def image_logits(
        self,
        encoded: Encoded,
        hidden_BN: Bool[Tensor, "B N"],
        decode_BM: Int[Tensor, "B M"] | None = None,
        *,
        wanted_BM: Int[Tensor, "B M"] | None = None,
    ) -> Float[Tensor, "B M C"]:
        """Logits of image tokens, in parallel. Hidden positions, dropped or kept, enter as a learned vector.

        With ``decode_BM`` only these positions enter the decoder, and their logits are returned; with ``wanted_BM`` all
        enter, and the logits of these are returned. Without them all enter and are returned (M = N).
        """
        positions = hidden_BN.shape[1]
        features = encoded.image_BKD
        image = features.new_zeros(len(features), positions, features.shape[-1])
        image = image.scatter(1, encoded.keep_BK[..., None].expand_as(features), features)
        image = torch.where(hidden_BN[..., None], self.decoder_hidden.to(features.dtype), image)
        position = self.decoder_position.weight.to(features.dtype)
        image = image + position[:positions]
        text = encoded.text_BLD + position[positions : positions + encoded.text_BLD.shape[1]]
        if decode_BM is not None:
            image = positions_of(image, decode_BM)
        x, positions = torch.cat([image, text], dim=1), image.shape[1]
        is_null = encoded.text_BLD.shape[1] == 1
        attend = None if is_null else _attend_to_valid(encoded.valid_BL, positions)
        x = self.image_decoder(x, attend=attend, wanted=slice(positions) if wanted_BM is None else wanted_BM)
        return self.image_head(x) @ self.token_embedding.weight.T + self.image_bias

    def of_nothing(self, make: Callable[[], Tensor], *, drop: str) -> Tensor:
        """Logits of an image without a text and without a known token, kept until the weights change; ``drop`` is that
        of ``ImageGenerationConfig``."""
        kind = self.image_bias.device.type
        rounding = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return self._of_nothing.of(self.parameters(), make, key=(drop, rounding))

    def caption_prefix(
        self, tokens_BN: Int[Tensor, "B N"], image_features_BG: Float[Tensor, "B G"] | None, *, visible: float = 1.0
    ) -> Float[Tensor, "B P D"]:
        """The prefix from which the text decoder captions an image: the image's features if the network was built for
        them (P = 1), else the encoder's output for its tokens and the empty text (P = N).

        ``visible`` is the share of the tokens that is read, evenly spread over the image; the others are dropped, as in
        training. Raises UserError unless it is above 0 and at most 1.
        """
        if self.image_features is not None:
            assert image_features_BG is not None
            return self.image_features(image_features_BG)
        if not 0 < visible <= 1:
            raise UserError(f"visible {visible}: give a share of the image tokens above 0 and at most 1")
        rows, positions = tokens_BN.shape
        masking = None
        if visible < 1:
            keep_K = evenly_spread(positions, visible, device=tokens_BN.device)
            hidden_N = torch.ones(positions, dtype=torch.bool, device=tokens_BN.device)
            hidden_N[keep_K] = False
            masking = Masking(hidden_N.expand(rows, -1), keep_K.expand(rows, -1))
        return self.encode(self.embed_image(tokens_BN), masking).image_BKD

    def text_logits(
        self, prefix_BPD: Float[Tensor, "B P D"] | None, inputs_BL: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B L V"]:
        """Logits of the token after each of ``inputs_BL``, whose first is PAD (see :func:`shift_right`).

        The prefix holds image features of the encoder and attends to itself; text attends to the prefix and to the text
        before it. None leaves the image out (the T2T control).
        """
        length = inputs_BL.shape[1]
        text = self.word_embedding(inputs_BL) + self.word_position.weight[:length]
        prefix = text[:, :0] if prefix_BPD is None else self.prefix_projection(prefix_BPD)
        before = prefix.shape[1]
        attend = prefix_causal(before, length, device=text.device)
        both = torch.cat([prefix.to(text.dtype), text], dim=1)
        x = self.text_decoder(both, attend=attend, wanted=slice(before, None))
        return x @ self.word_embedding.weight.T

    def start_text(
        self, prefix_BPD: Float[Tensor, "B P D"], *, length: int, beams: int = 1, pack: bool = True
    ) -> "TextDecoding":
        """Start to decode texts of at most ``length`` tokens, token by token, ``beams`` of them for each prefix.

        ``pack`` keeps packed weights, which is faster where many texts are decoded with the same weights.
        """
        return TextDecoding(self, prefix_BPD, length=length, beams=beams, pack=pack)

    def rounded(self) -> "ITIT":
        """This network for generation: under autocast its linear layers are rounded once, and not in each pass.

        The result is the same. Without autocast it is the network itself, as it is with weights of 8 bits.
        """
        kind = self.image_bias.device.type
        if not torch.is_autocast_enabled(kind) or self._int8_words is not None:
            return self
        dtype = torch.get_autocast_dtype(kind)
        return self._rounded.of(self.parameters(), lambda: pack_linears(self, rows=0, uses=0), key=dtype)

    def in_int8(self) -> Self:
        """A copy whose linear layers and head over words have weights of 8 bits, for inference on a CPU.

        Raises UserError as :func:`replace_linears_by_int8`.
        """
        copied = copy.deepcopy(self)
        replace_linears_by_int8(copied)
        copied._int8_words = Int8Linear(self.word_embedding.weight, None)
        return copied

    def packed_text_decoder(self, *, rows: int, uses: int) -> tuple[nn.Module, nn.Module]:
        """The blocks of the text decoder and the head over words for ``uses`` inputs of ``rows`` rows."""
        if self._int8_words is not None:
            return self.text_decoder, self._int8_words
        words = self.word_embedding.weight

        def pack() -> tuple[nn.Module, nn.Module]:
            blocks = pack_linears(self.text_decoder, rows=rows, uses=uses)
            return blocks, PackedLinear(words, None, rows=rows, uses=uses)

        rounding = torch.get_autocast_dtype(words.device.type) if torch.is_autocast_enabled(words.device.type) else None
        return self._packed.of((words, *self.text_decoder.parameters()), pack, key=(rows, uses, rounding))


class TextDecoding:
    """The text decoder with a cache: the same logits as :meth:`ITIT.text_logits`, one position at a time.

    The W texts of a prefix share one cache: token t of text w lies in slot P + t W + w, and ``attend_BWT`` says which
    slots are the past of which text. So neither the prefix nor any token is ever copied, whatever the order of the
    texts.
    """

    def __init__(self, model: ITIT, prefix_BPD: Tensor, *, length: int, beams: int, pack: bool) -> None:
        self.model, self.beams = model, beams
        prefix = model.prefix_projection(prefix_BPD)
        rows, self.prefix = prefix.shape[:2]
        slots = self.prefix + length * beams
        # The prefix never sees the text, so it runs once and without the text.
        self.cache: list[LayerCache] = model.text_decoder.empty_cache(prefix, positions=slots)
        model.text_decoder.read(prefix, cache=self.cache)
        self.attend_BWT = torch.ones(rows, beams, slots, dtype=torch.bool, device=prefix.device)
        self.itself_WW = torch.eye(beams, dtype=torch.bool, device=prefix.device)
        self.decoder: nn.Module = model.text_decoder
        self.head: Callable[[Tensor], Tensor] = lambda x: x @ model.word_embedding.weight.T
        if pack:
            self.decoder, self.head = model.packed_text_decoder(rows=rows * beams, uses=length)

    def step(self, ids_B: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Logits of the token that follows ``ids_B``, the next token of each text; texts of a prefix are neighbours."""
        model, start = self.model, self.cache[0].length
        end = start + self.beams
        position = (start - self.prefix) // self.beams
        text_BWD = model.word_embedding(ids_B.view(-1, self.beams)) + model.word_position.weight[position]
        self.attend_BWT[..., start:end] = self.itself_WW
        attend = self.attend_BWT[:, None, :, :end] if self.beams > 1 else None
        x = self.decoder(text_BWD, attend=attend, cache=self.cache)
        return self.head(x).flatten(0, 1)

    def reorder(self, rows_B: Int[Tensor, "B"]) -> None:
        """Let text b continue text ``rows_B[b]``, which must have the same prefix."""
        parent_BW = rows_B.view(-1, self.beams) % self.beams
        self.attend_BWT = self.attend_BWT.gather(1, parent_BW[..., None].expand_as(self.attend_BWT))

    def keep(self, prefixes_B: Int[Tensor, "B"]) -> None:
        """Keep only the texts of these prefixes."""
        self.attend_BWT = self.attend_BWT[prefixes_B]
        for layer in self.cache:
            layer.keep(prefixes_B)


def _attend_to_valid(valid_BL: Tensor, images: int) -> Bool[Tensor, "B 1 1 S"]:
    """Lets every position attend to all image positions and to text that is no padding."""
    always = valid_BL.new_ones(len(valid_BL), images)
    return torch.cat([always, valid_BL], dim=1)[:, None, None]


SIZES: dict[str, ItitConfig] = {
    "tiny": ItitConfig(
        width=128,
        depth=1,
        heads=4,
        image_decoder_depth=2,
        text_decoder_width=128,
        text_decoder_depth=2,
        text_decoder_heads=4,
        mlp_ratio=2,
        init="fan_in",
        text_input="output_and_embeddings",
        text_window=7,
        whiten_text=True,
    ),
    "small": ItitConfig(
        width=192,
        depth=4,
        heads=4,
        image_decoder_depth=2,
        text_decoder_width=192,
        text_decoder_depth=2,
        text_decoder_heads=4,
    ),
    "medium": ItitConfig(
        width=512,
        depth=8,
        heads=8,
        image_decoder_depth=6,
        text_decoder_width=512,
        text_decoder_depth=4,
        text_decoder_heads=8,
    ),
    "base": ItitConfig(),
    "large": ItitConfig(width=1024, depth=24, heads=16),
    "huge": ItitConfig(width=1280, depth=32, heads=16),
}
"""Sizes by name. Base, large and huge are the paper's; medium is for one GPU of 24 GB, tiny and small
for two CPU cores or one small GPU."""


@dataclass(kw_only=True, slots=True)
class MaskingConfig:
    """Normal distribution of the share of hidden tokens in a row, cut at both ends (Table 3)."""

    low: float = 0.5
    """Smallest share of hidden tokens, between 0 and 1. The same share of tokens does not enter the encoder."""
    high: float = 1.0
    """Largest share of hidden tokens, between 0 and 1."""
    mode: float = 0.75
    """Mode of the normal distribution, as a share."""
    std: float = 0.25
    """Standard deviation of the normal distribution before the cut, as a share."""
    decode: float = 1.0
    """Share of the tokens left out of the encoder that enter the image decoder and are predicted. 1 in the paper; with
    less a step is faster, and predicts fewer tokens (after CrossMAE, Fu et al., 2024)."""


def sample_masking(
    config: MaskingConfig, rows: int, positions: int, *, rng: StepRNG, name: str, device: torch.device
) -> Masking:
    """Sample a share for every row, and hide that share of its tokens at random.

    Each row has one random order of its tokens: the first ones are visible, and the last floor(low N) do not enter the
    encoder. So dropped tokens are always hidden, and batches stay rectangular whatever the shares. The first of the
    dropped ones enter the image decoder. Raises UserError unless 0 <= low <= high <= 1 and 0 <= decode <= 1.
    """
    if not 0 <= config.low <= config.high <= 1:
        raise UserError(f"hidden share from {config.low} to {config.high}: give 0 <= low <= high <= 1")
    if not 0 <= config.decode <= 1:
        raise UserError(f"decode {config.decode}: give a share of the tokens left out, from 0 to 1")
    order_BN = rng.uniform(f"{name}/order", rows, positions, device=device).argsort(1)
    chance_B = rng.uniform(f"{name}/share", rows, device=device)
    share_B = _truncated_normal(chance_B, config)
    hidden_count_B = (share_B * positions).round().clamp(1, positions)
    dropped = math.floor(config.low * positions)
    hidden_count_B = hidden_count_B.clamp_min(dropped)
    place_BN = torch.arange(positions, device=device).expand(rows, -1)
    hidden_BN = torch.zeros(rows, positions, dtype=torch.bool, device=device)
    hidden_BN.scatter_(1, order_BN, place_BN >= (positions - hidden_count_B)[:, None])
    kept = positions - dropped
    decoded = kept + math.ceil(config.decode * dropped)
    return Masking(hidden_BN, order_BN[:, :kept], None if decoded == positions else order_BN[:, :decoded])


def evenly_spread(positions: int, share: float, *, device: torch.device | None = None) -> Int[Tensor, "K"]:
    """A share of the positions of a square grid, at least one, with no holes: those where a lattice is lowest.

    The lattice is that of the R2 sequence (Roberts, 2018), whose steps are powers of the plastic number's inverse.
    """
    side = math.isqrt(positions)
    place_N = torch.arange(positions, device=device)
    height_N = (place_N % side * 0.7548776662466927 + place_N // side * 0.5698402909980532) % 1
    return height_N.argsort()[: max(1, round(share * positions))].sort().values


def _truncated_normal(chance_B: Tensor, config: MaskingConfig) -> Tensor:
    """Shares at the quantiles ``chance_B`` of the cut normal distribution."""

    def below(x: float) -> float:
        return 0.5 * (1 + math.erf((x - config.mode) / (config.std * math.sqrt(2))))

    at_low, at_high = below(config.low), below(config.high)
    cumulative_B = at_low + chance_B * (at_high - at_low)
    share_B = config.mode + config.std * math.sqrt(2) * torch.erfinv(2 * cumulative_B - 1)
    return share_B.clamp(config.low, config.high)


# Images as features of a pretrained encoder


class ImageFeatures(nn.Module):
    """Lets the text decoder read an image as features of a pretrained image encoder, in the place of image tokens.

    A few hundred captions do not teach what the codes of a tokenizer mean. The features of an encoder that was trained
    on a million images already tell what an image shows. As in Janus (Wu et al., 2024), the two directions then see an
    image in two ways: captions are read from its features, images are still generated as tokens.

    Cycles need the features of images that do not exist. :meth:`of_texts` estimates them from the text: a ridge
    regression from the mean of the text's frozen features to the features of its image, which :meth:`fit` fits to the
    pairs, plus the residual of a random pair.
    """

    mean_G: Tensor
    scale_G: Tensor
    text_mean_F: Tensor
    from_text_FG: Tensor
    residuals_RG: Tensor

    def __init__(self, *, width: int, features: int, text_features: int) -> None:
        """``features`` is G, ``text_features`` F and ``width`` D."""
        super().__init__()
        self.projection = nn.Linear(features, width)
        self.register_buffer("mean_G", torch.zeros(features))
        self.register_buffer("scale_G", torch.ones(features))
        self.register_buffer("text_mean_F", torch.zeros(text_features))
        self.register_buffer("from_text_FG", torch.zeros(text_features, features))
        self.register_buffer("residuals_RG", torch.zeros(_RESIDUALS, features))

    def forward(self, features_BG: Float[Tensor, "B G"]) -> Float[Tensor, "B 1 D"]:
        """The one position that the text decoder reads."""
        return self.projection((features_BG - self.mean_G) * self.scale_G)[:, None]

    @torch.no_grad()
    def of_texts(
        self, text_BLF: Float[Tensor, "B L F"], valid_BL: Bool[Tensor, "B L"], *, noise: float, rng: StepRNG
    ) -> Float[Tensor, "B G"]:
        """Features of an image for each text: the regression's, and ``noise`` times the residual of a random pair."""
        row_B = rng.uniform("image_features", len(text_BLF), device=text_BLF.device).mul(_RESIDUALS).long()
        return self.expected(mean_of_text(text_BLF, valid_BL)) + noise * self.residuals_RG[row_B]

    @torch.no_grad()
    def expected(self, text_BF: Float[Tensor, "B F"]) -> Float[Tensor, "B G"]:
        """Features of an image by the regression, for the mean of the features of each text."""
        return self.mean_G + (text_BF - self.text_mean_F) @ self.from_text_FG

    @torch.no_grad()
    def agreement(
        self, features_BG: Float[Tensor, "B G"], text_BLF: Float[Tensor, "B L F"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B"]:
        """Cosine between the features of each image and those that the regression gives its text, both scaled.

        The score of the text decoder favours captions that fit many images. This cosine goes from the caption to the
        image, and favours captions that fit this one.
        """
        seen_BG, told_BG = features_BG - self.mean_G, self.expected(mean_of_text(text_BLF, valid_BL)) - self.mean_G
        return F.cosine_similarity(seen_BG * self.scale_G, told_BG * self.scale_G, dim=-1)

    @torch.no_grad()
    def fit(self, features_XG: Float[Tensor, "X G"], text_XF: Float[Tensor, "X F"]) -> None:
        """Set the scale of the features and the regression by pairs; the captions of an image lie side by side.

        The penalty is the one with the smallest error on pairs that are held out, of which there must be two or more;
        with fewer it is the largest.
        """
        mean_G, text_mean_F = features_XG.mean(0), text_XF.mean(0)
        y_XG, x_XF = features_XG - mean_G, text_XF - text_mean_F
        fitted = len(x_XF) - len(x_XF) // _HELD_OUT
        best = _PENALTIES[-1]
        if len(x_XF) - fitted > 1:
            errors = [
                (y_XG[fitted:] - x_XF[fitted:] @ _ridge(x_XF[:fitted], y_XG[:fitted], penalty)).square().sum().item()
                for penalty in _PENALTIES
            ]
            best = _PENALTIES[errors.index(min(errors))]
        from_text_FG = _ridge(x_XF, y_XG, best)
        residuals_XG = y_XG - x_XF @ from_text_FG
        some_R = torch.linspace(0, len(residuals_XG) - 1, _RESIDUALS).long()
        # A constant feature must not become infinite.
        self.scale_G.copy_(features_XG.std(0, correction=0).clamp_min(1e-6).reciprocal())
        self.mean_G.copy_(mean_G)
        self.text_mean_F.copy_(text_mean_F)
        self.from_text_FG.copy_(from_text_FG)
        self.residuals_RG.copy_(residuals_XG[some_R])


def mean_of_text(text_BLF: Float[Tensor, "B L F"], valid_BL: Bool[Tensor, "B L"]) -> Float[Tensor, "B F"]:
    """The mean of a text's frozen features, which are zero at padding."""
    return text_BLF.float().sum(1) / valid_BL.sum(1, keepdim=True).clamp_min(1)


def _ridge(x_XF: Tensor, y_XG: Tensor, penalty: float) -> Float[Tensor, "F G"]:
    """The W that minimizes |y - x W|² + c |W|², where c is ``penalty`` times the mean of the diagonal of x'x."""
    gram_FF = x_XF.T @ x_XF
    gram_FF.diagonal().add_(penalty * gram_FF.diagonal().mean().clamp_min(1e-12))
    return torch.linalg.solve(gram_FF, x_XF.T @ y_XG)
