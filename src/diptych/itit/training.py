"""Training ITIT: the stages of a run, from the sources to a folder that captions and draws."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych.data.encode import DataTokenizers
from diptych.data.streams import BatchSampler
from diptych.errors import UserError
from diptych.itit.data import DataConfig, DataSplit, Subset, encode_part, open_parts
from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig
from diptych.itit.model import ITIT, ItitConfig
from diptych.itit.objective import ItitObjective, ItitObjectiveConfig
from diptych.itit.pipeline import Diptych, data_tokenizers
from diptych.itit.report import Samples
from diptych.nn.inference import pick_device
from diptych.run_folder import part_of, read_config, save_model, write_config
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.training import TextEncoderStage, TokenizerStage
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first, wait_for_everyone
from diptych.train.loop import Hook, TrainResult, train


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How the trained run draws and writes unless told otherwise."""

    image: ImageGenerationConfig = field(default_factory=ImageGenerationConfig)
    """Pictures from texts."""
    text: TextGenerationConfig = field(default_factory=TextGenerationConfig)
    """Texts from pictures."""


@dataclass(kw_only=True, slots=True)
class ItitRun:
    """`diptych fit itit-*`: a network that captions and draws."""

    data: DataConfig
    """What it learns from."""
    tokenizer: str | None = None
    """Image tokenizer: a diffusers VQModel folder, an earlier run or a hub name. Not given: one is trained first."""
    text_encoder: str | None = None
    """Text encoder: a T5 folder, an earlier run or a hub name. Not given: one is trained first."""
    tokenizer_stage: TokenizerStage = field(default_factory=TokenizerStage)
    """How the image tokenizer is trained, if it is."""
    text_encoder_stage: TextEncoderStage = field(default_factory=TextEncoderStage)
    """How the text encoder is trained, if it is."""
    model: ItitConfig = field(default_factory=ItitConfig)
    """The network. Image tokens, codebook, text features and vocabulary follow from the two above."""
    objective: ItitObjectiveConfig = field(default_factory=ItitObjectiveConfig)
    """Its losses."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """How the result draws and writes."""

    def fit(self, out: Path, *, recipe: str) -> TrainResult:
        """All stages, each resumed or skipped if it has been done before. Leaves a self-contained run folder."""
        self.check()
        self._check_stages(out)
        ready = self.prepare(out)
        write_config(out, recipe=recipe, run=self, generation=asdict(self.generation))
        objective = self.build(ready)
        samples = Samples(self.diptych(objective, ready), ready.encoded, self.data, out / "samples")
        result = self.train_on(ready, objective, out, hooks=[Hook(every=self.train.eval_every, run=samples.run)])
        if result.finished and is_main_process():
            with result.eval_mode(objective):
                samples.report(out, recipe=recipe)
        return result

    def check(self) -> None:
        """Raise UserError for combinations of fields that no stage would notice early."""
        unpaired = (self.objective.texts, self.objective.images) != ("off", "off")
        if unpaired and self.objective.cycle_start_step >= self.train.steps:
            raise UserError(
                f"--objective.cycle-start-step {self.objective.cycle_start_step} is not before --train.steps {self.train.steps}, "
                "so unpaired data would never be used: lower it, or switch --objective.texts and .images off"
            )

    def _check_stages(self, out: Path) -> None:
        """What a run was begun with it keeps: its tokenizers are not trained or copied again."""
        if not (out / "config.json").is_file():
            return
        before = read_config(out)["run"]
        now = json.loads(json.dumps(asdict(self)))
        for given, stage in (("tokenizer", "tokenizer_stage"), ("text_encoder", "text_encoder_stage")):
            if (before[given], before[stage]["model"]) != (now[given], now[stage]["model"]):
                raise UserError(f"{out}: begun with another {given}: give the same one, or train into another folder")

    def prepare(self, out: Path) -> "Prepared":
        """Tokenizer, text encoder and encoded data, made in ``out`` or found there."""
        join_processes(self.train.device)
        parts = open_parts(self.data)
        tokenizer = self._tokenizer(parts, out)
        text_encoder = self._text_encoder(parts, out)
        return Prepared(tokenizer, text_encoder, self._encode(parts, tokenizer, text_encoder, out))

    def build(self, ready: "Prepared") -> ItitObjective:
        """The network with its objective; its initial weights follow from ``train.seed`` alone."""
        config = replace(
            self.model,
            image_tokens=ready.tokenizer.tokens,
            codebook_size=ready.tokenizer.codebook_size,
            text_features=ready.text_encoder.width,
            vocab_size=ready.text_encoder.vocab_rows,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            return ItitObjective(ITIT(config), ready.text_encoder, self.objective)

    def train_on(
        self, ready: "Prepared", objective: ItitObjective, out: Path, *, hooks: Sequence[Hook] = (), title: str = "ITIT"
    ) -> TrainResult:
        """The last stage: train on encoded data and save ``out/model``."""
        stores = {name: getattr(ready.encoded, name) for name in ("pairs", "images", "texts")}
        pairs, images, texts = stores["pairs"], stores["images"], stores["texts"]
        batches = BatchSampler(
            {
                "pairs": pairs.source.pairs(pairs.items, seed=self.train.seed),
                "images": images.source.images(images.items),
                "texts": texts.source.texts(texts.items),
            },
            multiples=objective.streams, batch_size=self.train.batch_size, seed=self.train.seed,
        )  # fmt: skip
        identity = {
            "model": asdict(objective.model.config),
            "objective": asdict(self.objective),
            "data": {name: [len(part.items), part.source.manifest["made_by"]] for name, part in stores.items()},
        }
        result = train(
            objective, batches, out=out, train=self.train, optim=self.optim, hooks=hooks, title=title, identity=identity
        )
        with result.eval_mode(objective):
            if is_main_process():
                save_model(objective.model, out / "model")
        return result

    # Stages

    def _tokenizer(self, parts: DataSplit, out: Path) -> ImageTokenizer:
        def make() -> ImageTokenizer:
            if self.tokenizer is not None:
                return ImageTokenizer.from_pretrained(part_of(self.tokenizer, "tokenizer"))
            folder, share = out / "stages" / "tokenizer", self.data.max_skipped_share
            return self.tokenizer_stage.fit(parts.raw_images(), folder, title="1/3 tokenizer", max_skipped_share=share)

        return _once(out / "tokenizer", make, ImageTokenizer.from_pretrained)

    def _text_encoder(self, parts: DataSplit, out: Path) -> TextEncoder:
        def make() -> TextEncoder:
            if self.text_encoder is not None:
                return TextEncoder.from_pretrained(part_of(self.text_encoder, "text_encoder"))
            folder = out / "stages" / "text_encoder"
            return self.text_encoder_stage.fit(parts.raw_texts(), folder, title="2/3 text encoder")

        return _once(out / "text_encoder", make, TextEncoder.from_pretrained)

    def _encode(self, parts: DataSplit, tokenizer: ImageTokenizer, text_encoder: TextEncoder, out: Path) -> DataSplit:
        device = pick_device(self.train.device)
        tokenizer, text_encoder = tokenizer.to(device), text_encoder.to(device)
        both = data_tokenizers(tokenizer, text_encoder, length=self.model.max_text_len)
        captions = _captions(parts.texts) + (0 if parts.texts is parts.pairs else _captions(parts.pairs))
        features_mb = captions * self.model.max_text_len * text_encoder.width * 2 / 2**20
        cached = features_mb <= self.data.feature_cache_mb
        with_features = data_tokenizers(tokenizer, text_encoder, length=self.model.max_text_len, features=cached)

        def one(name: str, what: DataTokenizers) -> Subset:
            part = getattr(parts, name)
            with main_process_first():
                return encode_part(part, out / "encoded" / name, what, data=self.data, advance=_say(name))

        pairs = one("pairs", with_features)
        return DataSplit(
            pairs=pairs,
            images=pairs if parts.images is parts.pairs else one("images", replace(both, ids=None)),
            texts=pairs if parts.texts is parts.pairs else one("texts", replace(with_features, tokens=None)),
        )

    def diptych(self, objective: ItitObjective, ready: "Prepared") -> Diptych:
        """The network in training as something that captions and draws."""
        device = pick_device(self.train.device)
        image, text = self.generation.image, self.generation.text
        return Diptych(
            ready.tokenizer, ready.text_encoder, objective.model,
            image_generation=image, text_generation=text, device=device,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that ITIT trains with."""

    tokenizer: ImageTokenizer
    text_encoder: TextEncoder
    encoded: DataSplit


def _once(folder: Path, make: Callable[[], Any], load: Callable[[Path], Any]) -> Any:
    """What ``folder`` holds; if it does not exist yet, make and save it. Every process reads the same files."""
    if not folder.is_dir():
        made = make()
        if is_main_process():
            save_model(made, folder)
        wait_for_everyone()
    loaded = load(folder)
    assert isinstance(loaded, nn.Module)
    return loaded


def _captions(part: Subset) -> int:
    if hasattr(part.source, "starts"):
        return 0  # encoded already, with or without features
    sample = part.items[:: max(1, len(part.items) // 256)]
    mean = sum(len(part.source.captions(int(item))) for item in sample) / max(1, len(sample))
    return int(mean * len(part.items))


def _say(name: str) -> Callable[[int, int], None]:
    """One line that counts in a terminal; elsewhere only its end."""

    def advance(done: int, total: int) -> None:
        if done == total or sys.stdout.isatty():
            print(f"\r3/3 encoding {name}: {done:,} of {total:,}", end="\n" if done == total else "", flush=True)

    return advance
