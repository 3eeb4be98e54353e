"""Text encoders: any encoder or decoder language model of `transformers`, from texts to features.

Shapes: B texts, L text tokens, D width of the features.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import ftfy
import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diptych.encoders.loading import (
    fuse_gelu,
    is_projected,
    load,
    load_config,
    load_weights,
    resolve,
    tower_of,
    width_of,
)
from diptych.errors import UserError, first_line

TextPooling = Literal["auto", "mean", "cls", "last"]
_WHAT = "a text model"
_ENCODER_ALONE = ("t5", "mt5", "umt5")
"""Kinds of models with a decoder of which transformers loads and saves the encoder alone."""
_ROWS = 256
"""Texts encoded at once."""


def clean_for_clip(text: str) -> str:
    """The text as CLIP and all dual encoders read it, cleaned as CLIP and open_clip do it before their tokenizers.

    Captions have been through :func:`diptych.data.sources.text.clean` before, for every learner. Here mangled encodings
    are mended; curly quotes, ligatures and letters of full width become plain ones and HTML's entities the characters
    that they stand for; runs of white space become one space.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):  # what ftfy would leave alone
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def text_list(texts: Any, *, least: int = 1) -> list[str]:
    """A list of texts, also of a single one. Raises UserError for fewer than ``least``, and for what is no text."""
    every = [texts] if isinstance(texts, str) else list(texts)
    if len(every) < least:
        raise UserError("no texts: give one at least")
    for number, text in enumerate(every):
        if not isinstance(text, str):
            raise UserError(
                f"text {number} (counted from 0) is {text!r:.60}, of the type {type(text).__name__}, no text"
            )
    return every


class PooledTextEncoder(nn.Module):
    """A frozen language model of `transformers` with its tokenizer: from texts to features [B D].

    Padding reaches neither the features of a text nor their pooling. Pooling "auto" is CLIP's shared embedding where
    there is one, that of a sentence encoder where it names one, else the mean over the valid tokens.
    """

    width: int
    """D."""
    length: int
    """Number of tokens of a text that are read; the rest is cut off."""
    preprocessing: dict[str, Any]
    """What decides the features besides the weights; part of the name of cached features."""

    def __init__(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: PreTrainedTokenizerBase,
        *,
        pooling: TextPooling,
        length: int,
    ) -> None:
        super().__init__()
        self.network = fuse_gelu(network).requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.width = width_of(network.config, "text")
        self.projected = is_projected(network.config)
        self.pooling: TextPooling = "mean" if pooling == "auto" and not self.projected else pooling
        # Not every model has a longest text: T5's positions are relative.
        self.length = min(length, getattr(network.config, "max_position_embeddings", None) or length)
        self.preprocessing = {"length": self.length, "pooling": self.pooling}
        if self.projected:
            self.preprocessing["cleaned"] = True

    @classmethod
    def from_pretrained(cls, name: str, *, pooling: TextPooling = "auto", length: int = 128) -> Self:
        """From a folder, which needs no internet, or a hub name. Raises UserError if it cannot be loaded."""
        config = load_config(name, _WHAT)
        projected = is_projected(config)
        kind: Any = transformers.CLIPTextModelWithProjection if projected else transformers.AutoModel
        if config.model_type in _ENCODER_ALONE:
            # Diptych's own T5 models have no decoder, and that of a published one need not be loaded.
            kind = transformers.AutoModelForTextEncoding
        elif pooling == "auto" and not projected:
            pooling = _sentence_pooling(name)
        tower = tower_of(config, kind, "text_config") if projected else None
        network, _ = load_weights(name, _WHAT, kind, tower=tower)
        tokenizer = load(name, "a tokenizer", transformers.AutoTokenizer.from_pretrained)
        if len(tokenizer) - len(tokenizer.all_special_ids) < 2:  # transformers makes an empty one if there is none
            raise UserError(f"{name}: its tokenizer has no words: tokenizer.json or its like is missing")
        if tokenizer.pad_token_id is None:  # decoders are trained without padding, which is never valid here
            if tokenizer.eos_token is None:
                raise UserError(f"{name}: its tokenizer has neither a padding nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        if config.is_encoder_decoder and config.model_type not in _ENCODER_ALONE:
            network = network.get_encoder()
        if config.model_type == "vision-text-dual-encoder":
            network = network.text_model
        return cls(network, tokenizer, pooling=pooling, length=length)

    def train(self, mode: bool = True) -> "PooledTextEncoder":
        """Ignores ``mode``: a frozen encoder stays in evaluation mode when the modules around it are trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, texts: str | Sequence[str]) -> Float[Tensor, "B D"]:
        """One vector for each text, or for a single text, on the encoder's device."""
        texts = text_list(texts, least=0)
        pieces = [self._pooled(texts[at : at + _ROWS]) for at in range(0, len(texts), _ROWS)]
        return torch.cat(pieces) if pieces else torch.empty(0, self.width)

    @torch.no_grad()
    def tokens(self, texts: str | Sequence[str]) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"]]:
        """Features of every token, zero at padding, and which tokens are valid."""
        texts = [texts] if isinstance(texts, str) else texts
        output, valid_BL = self._run(texts)
        return output.last_hidden_state.masked_fill(~valid_BL[..., None], 0.0), valid_BL

    def _pooled(self, texts: Sequence[str]) -> Tensor:
        output, valid_BL = self._run(texts)
        if self.pooling == "auto":
            return output.text_embeds
        hidden_BLD = output.last_hidden_state
        match self.pooling:
            case "cls":
                return hidden_BLD[:, 0]
            case "last":
                return hidden_BLD[torch.arange(len(hidden_BLD)), valid_BL.sum(1) - 1]
        weight_BL1 = valid_BL[..., None].to(hidden_BLD.dtype)
        return (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)

    def _run(self, texts: Sequence[str]) -> tuple[Any, Tensor]:
        """The network's output and the valid tokens [B L]. Raises UserError for a text without tokens."""
        encoded = self.tokenizer(
            [clean_for_clip(text) for text in texts] if self.projected else list(texts),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
            return_attention_mask=True,
        )
        device = next(self.network.parameters()).device
        ids_BL, valid_BL = encoded["input_ids"].to(device), encoded["attention_mask"].to(device).bool()
        if not bool(valid_BL.any(1).all()):
            raise UserError(f"no token is left of the text {texts[int((~valid_BL.any(1)).nonzero()[0])]!r}: remove it")
        return self.network(input_ids=ids_BL, attention_mask=valid_BL.long()), valid_BL


def _sentence_pooling(name: str) -> TextPooling:
    """The pooling that a sentence encoder was trained with, which its folder or repository names; else the mean."""
    try:
        found = transformers.utils.cached_file(
            name,
            "1_Pooling/config.json",
            local_files_only=Path(name).is_dir(),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        modes = json.loads(Path(found).read_text()) if found else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: its 1_Pooling/config.json cannot be read: {first_line(error)}") from error
    if modes.get("pooling_mode_cls_token"):
        return "cls"
    return "last" if modes.get("pooling_mode_lasttoken") else "mean"


def open_text_encoder(name: str | Path, *, pooling: TextPooling = "auto", length: int = 128) -> PooledTextEncoder:
    """The encoder of a folder, hub name, package or run folder, which reads at most ``length`` tokens of a text.

    Raises UserError if it cannot be loaded.
    """
    return PooledTextEncoder.from_pretrained(resolve(name, "text"), pooling=pooling, length=length)
