"""Training a small T5 on the texts at hand, on its own or as the second stage of ITIT."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState

from diptych.data.batch import Items
from diptych.data.columns import Columns
from diptych.data.streams import Batches, Stream
from diptych.errors import UserError
from diptych.eval.text_encoder import evaluate_text_encoder
from diptych.models.text_encoder import TextEncoder
from diptych.models.text_tokenizer import train_tokenizer
from diptych.objectives.span_corruption import SpanCorruption, TextEncoderConfig
from diptych.recipes.data import open_finite
from diptych.recipes.folders import write_config, write_json
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.loop import train

_SCORED = 512


@dataclass(kw_only=True, slots=True)
class TextEncoderStage:
    """How a text encoder is trained, wherever its texts come from."""

    model: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The network and its span corruption."""
    length: int = 64
    """Most tokens of a text while training."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(betas=(0.9, 0.98), weight_decay=0.01))
    """The optimiser."""

    def fit(self, texts: Iterable[str], out: Path, *, title: str = "text encoder") -> TextEncoder:
        """Train a tokenizer and a T5 in the folder ``out`` (resuming what is there)."""
        texts = list(texts)
        tokenizer = train_tokenizer(
            texts, vocab_size=self.model.vocab_size, sentinels=self.model.sentinels, lowercase=self.model.lowercase
        )
        objective = SpanCorruption(tokenizer, config=self.model, seed=self.train.seed)
        ids_XL, valid_XL = objective.text_encoder().tokenize(texts, length=self.length)
        longest = int(valid_XL.sum(1).max())
        ids_XL, valid_XL = ids_XL[:, :longest], valid_XL[:, :longest]

        def take(index: np.ndarray, epoch: np.ndarray) -> Items:
            return Items(ids_BL=ids_XL[index], valid_BL=valid_XL[index])

        batches = Batches(
            {"texts": Stream(size=len(texts), take=take)},
            multiples=objective.streams, batch_size=self.train.batch_size, seed=self.train.seed,
        )  # fmt: skip
        identity = {"model": asdict(self.model), "length": self.length}
        train(objective, batches, out=out, train=self.train, optim=self.optim, title=title, identity=identity)
        encoder = objective.text_encoder()
        if PartialState().is_main_process:
            score = evaluate_text_encoder(encoder, texts[:_SCORED], length=self.length)
            print(f"{title}: {score}, on {score.texts:,} of its own texts", flush=True)
            write_json(out / "text_encoder.json", asdict(score))
        return encoder


@dataclass(kw_only=True, slots=True)
class TextEncoderRun:
    """`diptych fit text-encoder-*`: a small T5 from a source of texts."""

    texts: str
    """Texts to learn from: any source."""
    columns: Columns = field(default_factory=Columns)
    """Names of columns that cannot be guessed."""
    stage: TextEncoderStage = field(default_factory=TextEncoderStage)
    """How it is trained."""

    def fit(self, out: Path, *, recipe: str) -> None:
        """Leaves ``out/text_encoder``, a plain transformers folder with its tokenizer."""
        source = open_finite(self.texts, self.columns)
        if not source.has_captions:
            raise UserError(f"{self.texts}: has no texts to train a text encoder on")
        write_config(out, recipe=recipe, run=self)
        texts = (text for item in range(len(source)) for text in source.captions(item))
        self.stage.fit(texts, out).save_pretrained(out / "text_encoder")
