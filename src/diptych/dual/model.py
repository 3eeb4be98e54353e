"""An image tower and a text tower that meet in one space: a plain `transformers.CLIPModel` with its processor.

Shapes: B rows, H and W pixels, L text tokens, S tokens of an image (CLS and patches) or a text, W width of a tower, D
width of the space.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Int, UInt8
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from diptych.errors import UserError
from diptych.nn.inference import Device, eval_mode, pick_device

LARGEST_SCALE = 100.0
_HEAD = 64


@dataclass(kw_only=True, slots=True)
class DualEncoderConfig:
    image_size: int = 224
    """Side of the pictures that the image tower sees."""
    patch: int = 16
    """Side of a patch; an image becomes (image-size / patch)^2 tokens and CLS."""
    image_width: int = 768
    """Width of the image tower. Heads are 64 wide in both towers."""
    image_depth: int = 12
    """Blocks of the image tower."""
    max_text_len: int = 77
    """Most tokens of a text, its two marks included."""
    text_width: int = 512
    """Width of the text tower."""
    text_depth: int = 12
    """Blocks of the text tower."""
    vocab_size: int = 49408
    """Most entries of the text tokenizer, where it is trained."""
    width: int = 512
    """Width of the space in which images and texts meet."""


def tiny() -> DualEncoderConfig:
    """For pictures of 64 pixels and short captions on one CPU core."""
    return DualEncoderConfig(
        image_size=64, patch=16, image_width=128, image_depth=4, max_text_len=32, text_width=128, text_depth=3,
        vocab_size=4096, width=128,
    )  # fmt: skip


def small() -> DualEncoderConfig:
    """ViT-S/16 beside a text tower as wide, as open_clip has it."""
    return DualEncoderConfig(image_width=384, text_width=384, width=384)


def vit_b_16() -> DualEncoderConfig:
    """CLIP's ViT-B/16: 150M parameters."""
    return DualEncoderConfig()


def vit_l_16() -> DualEncoderConfig:
    """CLIP's larger text tower beside ViT-L/16."""
    return DualEncoderConfig(image_width=1024, image_depth=24, text_width=768, width=768)


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerOutput:
    """A side of a pair after its projection, not normalised."""

    pooled_BD: Float[Tensor, "B D"]
    """What is compared: the image's CLS, the text's end mark."""
    state_BW: Float[Tensor, "B W"]
    """The same before the projection, normed."""
    tokens_BSD: Float[Tensor, "B S D"] | None = None
    """All tokens, normed and projected like the pooled one, where they were asked for."""


class DualEncoder(nn.Module):
    """CLIP's two towers, its tokenizer and its way of preparing pixels."""

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, clip: "transformers.CLIPModel", processor: "transformers.CLIPProcessor") -> None:
        from diptych.dual.clip_speed import quicken

        super().__init__()
        self.clip, self.processor = quicken(clip), processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        config: Any = clip.config  # its annotations allow parts that a finished configuration never lacks
        self.image_size: int = config.vision_config.image_size
        self.image_tower_width: int = config.vision_config.hidden_size
        self.text_tower_width: int = config.text_config.hidden_size
        self.max_text_len: int = config.text_config.max_position_embeddings
        self.width: int = config.projection_dim
        for name in ("mean", "std"):
            values = torch.tensor(getattr(processor.image_processor, f"image_{name}"))
            self.register_buffer(f"{name}_311", values.view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: DualEncoderConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> "DualEncoder":
        """Random weights, as CLIP initialises them; they follow from ``seed`` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip = transformers.CLIPModel(_clip_config(config, tokenizer))
        side = {"height": config.image_size, "width": config.image_size}
        pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": config.image_size}, crop_size=side)
        return cls(clip, transformers.CLIPProcessor(pixels, tokenizer))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The learned factor on cosines: 1 / temperature."""
        return self.clip.logit_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale at 100 or below, as CLIP does after each update."""
        self.clip.logit_scale.clamp_(max=torch.tensor(LARGEST_SCALE).log().item())

    # Training

    def text_positions(self, length: int) -> Float[Tensor, "L W"]:
        """The text tower's learned positions."""
        return self.clip.text_model.embeddings.position_embedding.weight[:length]

    def encode_images(self, pixels_B3HW: Float[Tensor, "B 3 H W"], *, keep_tokens: bool = False) -> TowerOutput:
        """``pixels_B3HW`` in [0, 1], of side ``image_size``."""
        normal_B3HW = (pixels_B3HW - self.mean_311) / self.std_311
        states_BSW = self.clip.vision_model(pixel_values=normal_B3HW).last_hidden_state
        if not keep_tokens:
            states_BSW = states_BSW[:, :1]
        states_BSW = self.clip.vision_model.post_layernorm(states_BSW)
        tokens_BSD = self.clip.visual_projection(states_BSW)
        kept = tokens_BSD if keep_tokens else None
        return TowerOutput(pooled_BD=tokens_BSD[:, 0], state_BW=states_BSW[:, 0], tokens_BSD=kept)

    def encode_texts(
        self, ids_BL: Int[Tensor, "B L"], valid_BL: Bool[Tensor, "B L"], *, keep_tokens: bool = False
    ) -> TowerOutput:
        """Padding is on the right, where causal attention hides it: only tokens at invalid positions are arbitrary."""
        states_BLW = self.clip.text_model(input_ids=ids_BL).last_hidden_state
        state_BW = states_BLW[torch.arange(len(ids_BL), device=ids_BL.device), valid_BL.sum(1) - 1]
        tokens_BLD = self.clip.text_projection(states_BLW) if keep_tokens else None
        return TowerOutput(pooled_BD=self.clip.text_projection(state_BW), state_BW=state_BW, tokens_BSD=tokens_BLD)

    def tokenize(self, texts: Sequence[str]) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """Ids and their validity on the CPU, as long as the longest text. Marks written out in a text are letters."""
        told = self._cut(texts, padding=True, return_tensors="pt")
        return told["input_ids"], told["attention_mask"].bool()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The same without padding."""
        return self._cut(texts)["input_ids"]

    def _cut(self, texts: Sequence[str], **how: Any) -> Any:
        return self.tokenizer(
            list(texts), truncation=True, max_length=self.max_text_len, split_special_tokens=True, **how
        )

    # Use

    def embed_images(self, pixels_B3HW: UInt8[Tensor, "B 3 H W"], *, batch_size: int = 64) -> Float[Tensor, "B D"]:
        """L2-normalised embeddings of square pictures of side ``image_size``, fp32, on the encoder's device."""
        with eval_mode(self):
            parts = [
                self.encode_images(part.to(self.mean_311.device).float() / 255).pooled_BD
                for part in pixels_B3HW.split(batch_size)
            ]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256) -> Float[Tensor, "B D"]:
        """L2-normalised embeddings, fp32, on the encoder's device."""
        device = self.mean_311.device
        parts = []
        with eval_mode(self):
            for start in range(0, len(texts), batch_size):
                ids_BL, valid_BL = self.tokenize(texts[start : start + batch_size])
                parts.append(self.encode_texts(ids_BL.to(device), valid_BL.to(device)).pooled_BD)
        return F.normalize(torch.cat(parts).float(), dim=-1)

    # Files

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, device: Device = "cpu") -> "DualEncoder":
        """From a CLIP folder (nothing touches the network) or a hub name. Raises UserError for what is no CLIP."""
        where: dict[str, Any] = {"local_files_only": Path(name).is_dir()}
        try:
            config = transformers.CLIPConfig.from_pretrained(name, **where)
            if config.model_type != "clip":
                raise UserError(f"a {config.model_type!r} model")
            clip = transformers.CLIPModel.from_pretrained(name, dtype=torch.float32, **where)
            processor = transformers.AutoProcessor.from_pretrained(name, **where)
            return cls(clip, processor).to(pick_device(device))
        except Exception as error:  # every library below has its own idea of what a broken file raises
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise UserError(f"dual encoder {name}: {reason}; give the folder or hub name of a CLIP") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """A plain folder for `CLIPModel` and `AutoProcessor`."""
        self.clip.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _clip_config(config: DualEncoderConfig, tokenizer: PreTrainedTokenizerBase) -> "transformers.CLIPConfig":
    def tower(width: int, depth: int) -> dict[str, Any]:
        # GELU is one kernel where CLIP's own "quick" GELU is three.
        return {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "hidden_act": "gelu",
            "num_attention_heads": max(1, width // _HEAD), "projection_dim": config.width,
        }  # fmt: skip

    text = tower(config.text_width, config.text_depth) | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.max_text_len,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    image = tower(config.image_width, config.image_depth) | {
        "image_size": config.image_size,
        "patch_size": config.patch,
    }
    return transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=config.width)


# JOINED models.clip_tokenizer
#| Training a tokenizer in CLIP's format, a byte-level BPE over lower-cased words, on the user's own texts.
#|
#| The result is a `transformers.CLIPTokenizer`. Ids, as in CLIP: 256 bytes, 256 bytes that end a word, the merges, then
#| `<|startoftext|>` and `<|endoftext|>`, which also pads. Any text can be spelled: no letter is unknown.


_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_SMALLEST = 2 * len(_LETTERS) + 2


def train_clip_tokenizer(texts: Iterable[str], *, vocab_size: int, length: int) -> CLIPTokenizer:
    """A tokenizer of at most ``vocab_size`` ids that cuts texts to ``length`` ids; merges that occur once are left out.

    Raises UserError when there is no text or no room for all bytes.
    """
    if vocab_size < _SMALLEST:
        raise UserError(f"model.vocab-size is {vocab_size}; all bytes need at least {_SMALLEST}")
    whole = CLIPTokenizer().backend_tokenizer  # CLIP's own rules of lower case and of what is a word
    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer, learner.pre_tokenizer = whole.normalizer, whole.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, min_frequency=2, initial_alphabet=_LETTERS, end_of_word_suffix=_WORD_END,
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    if not merges:
        raise UserError("the texts for the tokenizer are empty or never repeat themselves: give more of them")
    merges = merges[: vocab_size - _SMALLEST]  # the trainer counts only the word ends that occur
    pieces = [*_LETTERS, *(letter + _WORD_END for letter in _LETTERS), *("".join(pair) for pair in merges)]
    ids = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, _START, _END]))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)  # type: ignore[arg-type]
