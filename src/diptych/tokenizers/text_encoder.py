"""The frozen text encoder: a T5 of `transformers` with its tokenizer, or any other text encoder with T5's first ids.

Shapes: B texts, L text tokens, P special tokens before a text, D width of the network, E width of the input embeddings,
F width of the features, V rows of the embedding.
"""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from diptych.errors import UserError, first_line
from diptych.io import replace_folder, without_progress_bars
from diptych.tokenizers.text_tokenizer import CONTROLS, EOS, PIECES, TextTokenizer, with_t5_ids

if TYPE_CHECKING:  # T5 of transformers takes seconds to import; its tokenizer alone needs none of it
    import transformers
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

FeatureKind = Literal["output", "output_and_embeddings"]
"""Features of a token: the output of the encoder, or its output and the token's input embedding."""
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_ENDLESS = 10**9
"""Tokenizers without a limit name a far larger one."""


class TextEncoder(nn.Module, TextTokenizer):
    """The encoder of a T5 with frozen weights, always in evaluation mode, and its tokenizer.

    Gradients still flow *through* it, from :meth:`features_from_embeddings` to its input: the image-to-text-to-image
    cycle needs them. Features at invalid positions are exactly zero, and what stands there does not change the others.

    Raises UserError for a tokenizer that is not T5's or does not fit the model.
    """

    banned_V: Tensor
    """True for ``banned_ids``."""
    feature_kind: FeatureKind = "output"
    """Which features are computed. The ITIT network that reads them says so in its config."""
    longest: int | None = None
    """Largest number of tokens of a text, its end included. None: there is no limit."""
    network_width: int
    """D."""
    tokenizer: "PreTrainedTokenizerBase"
    """The model's own, as it was loaded."""

    def __init__(self, t5: "transformers.T5EncoderModel", tokenizer: "PreTrainedTokenizerFast"):
        from diptych.encoders.loading import fuse_gelu

        nn.Module.__init__(self)
        t5.set_attn_implementation("sdpa")
        self.t5 = fuse_gelu(t5).requires_grad_(False).eval()
        self.tokenizer, self.network_width = tokenizer, t5.config.d_model
        self._read_by(tokenizer.backend_tokenizer)

    def _read_by(self, backend: Tokenizer) -> None:
        """Texts are read by ``backend``, whose ids are rows of ``embedding``."""
        TextTokenizer.__init__(self, backend, vocab_rows=self.embedding.weight.shape[0])
        banned_V = torch.zeros(self.vocab_rows, dtype=torch.bool)
        banned_V[list(self.banned_ids)] = True
        # The tokenizer says which they are, so they are no part of the weights.
        self.register_buffer("banned_V", banned_V, persistent=False)

    @property
    def embedding(self) -> nn.Embedding:
        """The input table, weight [V, E]."""
        table = self.t5.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def width(self) -> int:
        """Width of the features (F)."""
        beside = self.embedding.embedding_dim if self.feature_kind == "output_and_embeddings" else 0
        return self.network_width + beside

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stays in evaluation mode, also when the module around it is switched to training."""
        return super().train(False)

    # Features

    @torch.no_grad()
    def features(self, ids_BL: Int[Tensor, "B L"], valid_BL: Bool[Tensor, "B L"]) -> Float[Tensor, "B L F"]:
        """Features of texts given as ids, without a gradient."""
        return self.features_from_embeddings(self.embedding(ids_BL), valid_BL)

    def features_from_embeddings(
        self, embeds_BLE: Float[Tensor, "B L E"], valid_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L F"]:
        """As :meth:`features`, from rows of ``embedding`` or mixtures of them; differentiable in ``embeds_BLE``.

        They are computed in the type of the weights and given in fp32.
        """
        # A row without any valid token would have nothing to attend to and give NaN; its features are zeroed below.
        attend_BL = valid_BL | ~valid_BL.any(dim=1, keepdim=True)
        # In the precision of the weights: whoever loads them chooses it, and autocast would convert them at each use.
        with torch.autocast(embeds_BLE.device.type, enabled=False):
            embeds_BLE = embeds_BLE.to(self.embedding.weight.dtype)
            features_BLF = self._hidden(embeds_BLE, attend_BL)
            if self.feature_kind == "output_and_embeddings":
                features_BLF = torch.cat([features_BLF, embeds_BLE], dim=-1)
        return features_BLF.float().masked_fill(~valid_BL[:, :, None], 0.0)

    def _hidden(self, embeds_BLE: Tensor, attend_BL: Tensor) -> Tensor:
        """The network's last hidden state [B L D]; no token looks at one outside ``attend_BL``."""
        # Four dimensions, so that transformers takes it as it is: its own check of a flat one waits for the device.
        return self.t5(inputs_embeds=embeds_BLE, attention_mask=attend_BL[:, None, None]).last_hidden_state

    # Files

    @staticmethod
    def from_pretrained(
        name: str | os.PathLike[str], *, texts: Iterable[str] | None = None, dtype: torch.dtype | None = None
    ) -> "TextEncoder":
        """From a `transformers` folder (which needs no internet), a run folder, a hub name or a package.

        Args:
            name: what to load. Of a T5, CLIP or other model of several parts only the text encoder is read.
            texts: the vocabulary of a model that is no T5 is limited to what these texts need, unless the folder has
                one already. None: all its pieces.
            dtype: precision of the weights. None keeps that of the file.

        Raises:
            UserError: something is missing or damaged, or the model is no text encoder that takes embeddings.
        """
        import transformers

        from diptych.encoders.loading import load, load_config, load_weights, resolve

        found = resolve(Path(name) if isinstance(name, os.PathLike) else name, "text")
        if load_config(found, "a text encoder").model_type != "t5":
            adapted = _AdaptedTextEncoder.open(found, texts=texts)
            return adapted if dtype is None else adapted.to(dtype)
        if Path(found).is_dir() and not any((Path(found) / file).is_file() for file in _TOKENIZER_FILES):
            raise UserError(f"{found}: it has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there")
        tokenizer: Any = load(found, "a tokenizer", transformers.AutoTokenizer.from_pretrained)
        t5, _ = load_weights(found, "a T5", transformers.T5EncoderModel, dtype=dtype)
        try:
            return TextEncoder(t5, tokenizer)
        except UserError as error:
            raise UserError(f"{found}: {error}") from error

    @without_progress_bars()
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """A plain folder for `transformers` and its `AutoTokenizer`; an older one of that name is replaced whole."""
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            fresh = Path(scratch) / "fresh"
            self._write(fresh)
            self.tokenizer.save_pretrained(fresh)
            replace_folder(fresh, target)

    def _write(self, folder: Path) -> None:
        self.t5.save_pretrained(folder)


class _AdaptedTextEncoder(TextEncoder):
    """Any other text encoder of `transformers`, by T5's first ids: 0 pads a text, 1 ends it, 2 is an unknown letter.

    Id 1 is embedded as the model's own end of a text (`[SEP]`), 2 as its unknown token, and a piece as itself. What the
    model begins a text with (`[CLS]`) is put before it inside, and its features are left out again.
    """

    before_PE: Tensor

    def __init__(
        self, network: "transformers.PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", pieces: Tokenizer
    ):
        nn.Module.__init__(self)
        self.network, self.tokenizer, self.pieces = network, tokenizer, pieces
        before, end = _surroundings(tokenizer)
        unknown = end if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        own = tokenizer.get_vocab()
        names = [str(pieces.id_to_token(number)) for number in range(len(CONTROLS), pieces.get_vocab_size())]
        if strange := [name for name in names if name not in own]:
            raise UserError(
                f"{PIECES} has the piece {strange[0]!r}, which its tokenizer has not: copy the folder again"
            )
        ids_V = torch.tensor([tokenizer.pad_token_id, end, unknown, *(own[name] for name in names)])
        with torch.no_grad():  # by a call, as some models scale what they look up
            rows_VE = network.get_input_embeddings()(ids_V)
            self.register_buffer("before_PE", network.get_input_embeddings()(torch.tensor(before, dtype=torch.int64)))
        self.table = nn.Embedding.from_pretrained(rows_VE.clone(), freeze=True)
        self._read_by(pieces)
        self.longest = _longest(network, tokenizer, len(before))
        self._check_features([*before, *ids_V[[len(ids_V) - 1, 3, EOS]].tolist()])

    @classmethod
    def open(cls, name: str, *, texts: Iterable[str] | None) -> "_AdaptedTextEncoder":
        """From a folder or a hub name. Raises UserError as :meth:`from_pretrained`."""
        from diptych.encoders.text import open_text_encoder

        opened = open_text_encoder(name)
        backend = getattr(opened.tokenizer, "backend_tokenizer", None)
        try:
            if backend is None:
                raise UserError("its tokenizer is not one of the library tokenizers, in a tokenizer.json")
            if opened.network.config.is_encoder_decoder:
                raise UserError(f"the encoder of a {opened.network.config.model_type} model cannot be saved alone")
            kept = Path(name) / PIECES
            pieces = Tokenizer.from_file(str(kept)) if kept.is_file() else with_t5_ids(backend, texts)
            return cls(opened.network, opened.tokenizer, pieces)
        except Exception as error:  # tokenizers and the models raise errors of all kinds
            raise UserError(f"{name}: cannot be used as a text encoder: {first_line(error)}") from error

    @property
    def embedding(self) -> nn.Embedding:
        """As in the base class: the rows of the model's input embeddings for T5's first ids and the pieces."""
        return self.table

    def _hidden(self, embeds_BLE: Tensor, attend_BL: Tensor) -> Tensor:
        before = len(self.before_PE)
        embeds_BLE = torch.cat([self.before_PE.expand(len(embeds_BLE), -1, -1), embeds_BLE], dim=1)
        attend_BL = torch.cat([attend_BL.new_ones(len(attend_BL), before), attend_BL], dim=1)
        return self._last_hidden_state(embeds_BLE, attend_BL)[:, before:]

    def _last_hidden_state(self, embeds_BLE: Tensor, attend_BL: Tensor) -> Tensor:
        import transformers

        clip: Any = getattr(self.network, "text_model", self.network)
        if not isinstance(clip, transformers.CLIPTextModel):
            return self.network(inputs_embeds=embeds_BLE, attention_mask=attend_BL.long()).last_hidden_state
        # CLIP's text model takes ids alone, though its parts take embeddings.
        length = attend_BL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=attend_BL.device).tril()
        hidden_BLD = clip.embeddings(inputs_embeds=embeds_BLE)
        hidden_BLD = clip.encoder(hidden_BLD, attention_mask=attend_BL[:, None, None] & causal_LL).last_hidden_state
        return clip.final_layer_norm(hidden_BLD)

    @torch.no_grad()
    def _check_features(self, ids: list[int]) -> None:
        """Raise UserError if the network makes something else of embeddings than of the ids of a text."""
        ids_BL = torch.tensor([ids])
        expected_BLD = self.network(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL)).last_hidden_state
        self.network_width = expected_BLD.shape[-1]
        embeds_BLE = self.network.get_input_embeddings()(ids_BL)
        found_BLD = self._last_hidden_state(embeds_BLE, torch.ones_like(ids_BL, dtype=torch.bool))
        if not torch.allclose(found_BLD.float(), expected_BLD.float(), rtol=1e-2, atol=1e-2):
            kind = self.network.config.model_type
            raise UserError(f"a {kind} model does not give the same features for embeddings as for ids")

    def _write(self, folder: Path) -> None:
        self.network.save_pretrained(folder)
        self.pieces.save(str(folder / PIECES))


def _surroundings(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], int]:
    """The ids that the model's tokenizer puts before a text, and the one with which it ends it."""
    whole = tokenizer("a")["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    places = range(len(whole) - len(inner) + 1)
    begin = next((at for at in places if whole[at : at + len(inner)] == inner), None)
    if begin is None:
        raise UserError("its tokenizer cuts a text differently beside its special tokens")
    after = whole[begin + len(inner) :] or [tokenizer.eos_token_id]
    if len(after) > 1 or after[0] is None:
        raise UserError(f"its tokenizer ends a text with {len(whole) - len(inner) - begin} special tokens, not with 1")
    return whole[:begin], after[0]


def _longest(network: nn.Module, tokenizer: "PreTrainedTokenizerBase", before: int) -> int | None:
    """Largest number of tokens after the special ones at the beginning; None without a limit."""
    config: Any = network.config
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    for name, table in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # RoBERTa and its like count the positions from the one after the padding's.
            limits.append(table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
    found = [limit for limit in limits if isinstance(limit, int) and 0 < limit < _ENDLESS]
    return min(found) - before if found else None
