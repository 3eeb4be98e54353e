"""The frozen text encoder: any T5 of `transformers` with its tokenizer.

Shapes: B texts, L text tokens, F width of the features, E width of the input embeddings, V rows of the embedding.
"""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diptych.errors import UserError, first_line
from diptych.io import replace_folder, without_progress_bars
from diptych.tokenizers.text_tokenizer import TextTokenizer

if TYPE_CHECKING:  # T5 of transformers takes seconds to import; its tokenizer alone needs none of it
    import transformers
    from transformers import PreTrainedTokenizerFast

FeatureKind = Literal["output", "output_and_embeddings"]
"""Features of a token: the output of the encoder, or its output and the token's input embedding."""
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


class TextEncoder(nn.Module, TextTokenizer):
    """The encoder of a T5 with frozen weights, always in evaluation mode, and its tokenizer.

    Gradients still flow *through* it, from :meth:`features_from_embeddings` to its input: the image-to-text-to-image
    cycle needs them. Features at invalid positions are exactly zero, and what stands there does not change the others.

    Raises UserError for a tokenizer that is not T5's or does not fit the model.
    """

    banned_V: Tensor
    """True for ``banned_ids``."""

    def __init__(self, t5: "transformers.T5EncoderModel", tokenizer: "PreTrainedTokenizerFast"):
        from diptych.encoders.loading import fuse_gelu

        nn.Module.__init__(self)
        t5.set_attn_implementation("sdpa")
        self.t5 = fuse_gelu(t5).requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.feature_kind: FeatureKind = "output"
        """Which features are computed. The ITIT network that reads them says so in its config."""
        TextTokenizer.__init__(self, tokenizer.backend_tokenizer, vocab_rows=self.embedding.weight.shape[0])
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
        return self.t5.config.d_model * (2 if self.feature_kind == "output_and_embeddings" else 1)

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
        """As :meth:`features`, from rows of ``embedding`` or mixtures of them; differentiable in ``embeds_BLE``."""
        # A row without any valid token would have nothing to attend to and give NaN; its features are zeroed below.
        attend_BL = valid_BL | ~valid_BL.any(dim=1, keepdim=True)
        # Four dimensions, so that transformers takes it as it is: its own check of a flat one waits for the device.
        # In the precision of the weights, whatever that of the training: cached features must equal computed ones.
        with torch.autocast(embeds_BLE.device.type, enabled=False):
            embeds_BLE = embeds_BLE.to(self.embedding.weight.dtype)
            features_BLF = self.t5(inputs_embeds=embeds_BLE, attention_mask=attend_BL[:, None, None]).last_hidden_state
            if self.feature_kind == "output_and_embeddings":
                features_BLF = torch.cat([features_BLF, embeds_BLE], dim=-1)
        return features_BLF.masked_fill(~valid_BL[:, :, None], 0.0)

    # Files

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> "TextEncoder":
        """From a `transformers` folder (nothing touches the network) or a hub name; only the encoder is read.

        ``dtype`` None keeps the precision of the file. Raises UserError for whatever is missing, damaged or not T5.
        """
        import transformers

        folder = Path(name)
        if not folder.is_dir() and (folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2):
            raise UserError(f"text encoder {name}: no such folder")
        where: dict[str, Any] = {"local_files_only": folder.is_dir()}
        part = "config.json"
        try:
            config = transformers.AutoConfig.from_pretrained(name, **where)
            if config.model_type != "t5":
                raise UserError(f"a {config.model_type!r} model, not a T5")
            part = "tokenizer"
            if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
                raise UserError(f"none of {', '.join(_TOKENIZER_FILES)} is there")
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, **where)
            part = "weights"
            options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
            with without_progress_bars(name):
                loaded: Any = transformers.T5EncoderModel.from_pretrained(name, **options, **where)
            t5, report = loaded  # its annotation names the first of the two only
            if report["missing_keys"]:
                raise UserError(f"{sorted(report['missing_keys'])[0]} is missing")
            part = "tokenizer"
            return cls(t5, tokenizer)
        except Exception as error:  # the libraries differ in what they raise for a broken file
            reason = first_line(error)
            raise UserError(f"text encoder {name}, {part}: {reason}; give the folder or hub name of a T5") from error

    @without_progress_bars()
    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """A plain folder for `T5EncoderModel` and `AutoTokenizer`; an older one of that name is replaced whole."""
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            fresh = Path(scratch) / "fresh"
            self.t5.save_pretrained(fresh)
            self.tokenizer.save_pretrained(fresh)
            replace_folder(fresh, target)
