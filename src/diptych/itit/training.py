"""Training of ITIT: the stages of a run, from its sources to a folder that captions and generates images."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych.data.encode import DataTokenizers
from diptych.data.store import Store
from diptych.data.streams import BatchSampler
from diptych.errors import UserError
from diptych.itit.data import DataConfig, DataSplit, Subset, encode_subset, open_data
from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig
from diptych.itit.model import ItitConfig
from diptych.itit.objective import ItitObjective, ItitObjectiveConfig
from diptych.itit.pipeline import Diptych, data_tokenizers
from diptych.itit.report import Samples
from diptych.nn.inference import pick_device
from diptych.run_folder import Kind, kind_of, part_of, read_config, save_model, write_config
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.training import TextEncoderStage, TokenizerStage
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first, wait_for_everyone
from diptych.train.loop import Hook, TrainResult, train


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """How a trained run generates, unless a command says otherwise."""

    image: ImageGenerationConfig = field(default_factory=ImageGenerationConfig)
    """Settings of the generation of images from texts."""
    text: TextGenerationConfig = field(default_factory=TextGenerationConfig)
    """Settings of the generation of texts from images."""


_WHITENED = 2000
"""Number of texts whose features decide the whitening."""


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """The frozen tokenizer and text encoder of a run, and its data encoded with both."""

    tokenizer: ImageTokenizer
    text_encoder: TextEncoder
    encoded: DataSplit

    def text_features(self, *, texts: int) -> Float[Tensor, "M F"]:
        """Frozen features of the tokens of the first ``texts`` texts, padding left out."""
        stream = _store(self.encoded.texts).texts(self.encoded.texts.items)
        rows = np.arange(min(texts, stream.size))
        examples = stream.take(rows, np.zeros_like(rows))
        features_BLF = examples.features_BLF
        if features_BLF is None:
            device = self.text_encoder.embedding.weight.device
            features_BLF = self.text_encoder.features(examples.ids_BL.to(device), examples.valid_BL.to(device)).cpu()
        return features_BLF[examples.valid_BL].float()


@dataclass(kw_only=True, slots=True)
class ItitRun:
    """`diptych fit itit-*`: a network that captions images and generates images from texts."""

    kind: ClassVar[Kind] = "itit"

    data: DataConfig
    """Sources of the pairs, the unpaired images and the unpaired texts, and how they are split."""
    tokenizer: str | None = None
    """Image tokenizer: a diffusers VQModel folder, an earlier run or a hub name. Default: one is trained first."""
    text_encoder: str | None = None
    """Text encoder: a T5 folder, an earlier run or a hub name. Default: one is trained first."""
    tokenizer_stage: TokenizerStage = field(default_factory=TokenizerStage)
    """Training of the image tokenizer, if none is given."""
    text_encoder_stage: TextEncoderStage = field(default_factory=TextEncoderStage)
    """Training of the text encoder, if none is given."""
    model: ItitConfig = field(default_factory=ItitConfig)
    """Sizes of the network. Those of image tokens, codebook, text features and vocabulary follow from the two above."""
    objective: ItitObjectiveConfig = field(default_factory=ItitObjectiveConfig)
    """Losses on pairs and on unpaired data."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training loop: steps, batch size, checkpoints, hardware."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Settings of the optimizer."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Settings with which the trained run generates, unless a command says otherwise."""

    def fit(self, out: Path, *, recipe: str) -> TrainResult:
        """Run all stages; a stage that an earlier call has begun is resumed, and one that it has finished is skipped.

        Leaves a run folder that needs nothing outside it. Raises UserError for settings or data that cannot be used.
        """
        self.check()
        self._check_run_folder(out)
        if not all((out / part).is_dir() for part in ("tokenizer", "text_encoder")):
            # A repeat of a run that is killed below finds here which tokenizers were made.
            write_config(out, recipe=recipe, run=self)
        inputs = self.prepare(out)
        write_config(out, recipe=recipe, run=self)
        objective = self.build(inputs)
        samples = Samples(self.diptych(objective, inputs), inputs.encoded, self.data, out / "samples")
        hooks = [Hook(every=self.train.eval_every, run=samples.run)]
        result = self.train_on(inputs, objective, out, hooks=hooks)
        if result.finished and is_main_process():
            with result.eval_mode(objective):
                samples.report(out, recipe=recipe)
        return result

    def check(self) -> None:
        """Raise UserError for combinations of fields that no stage would notice early."""
        unpaired = (self.objective.texts, self.objective.images) != ("off", "off")
        start, steps = self.objective.cycle_start_step, self.train.steps
        if unpaired and start >= steps:
            raise UserError(
                f"--objective.cycle-start-step {start} is not before --train.steps {steps}, "
                "so unpaired data would never be used: lower it, or switch --objective.texts and .images off"
            )

    def _check_run_folder(self, out: Path) -> None:
        """Raise UserError if ``out`` holds a run of another kind, or a tokenizer or text encoder of other settings.

        The config is written before either is made. So the settings of one that is not there yet may still change.
        """
        if not (out / "config.json").is_file():
            return
        if (kind := kind_of(out)) != self.kind:
            raise UserError(f"{out}: holds a run of the kind {kind!r}: train into another folder")
        before = read_config(out)["run"]
        now = json.loads(json.dumps(asdict(self)))
        for given, stage in (("tokenizer", "tokenizer_stage"), ("text_encoder", "text_encoder_stage")):
            other = (before[given], before[stage]["model"]) != (now[given], now[stage]["model"])
            if other and (out / given).is_dir():
                raise UserError(f"{out}: begun with another {given}: give the same one, or train into another folder")

    # The stages before the network's training

    def prepare(self, out: Path) -> TrainingInputs:
        """Open the data, get the tokenizer and the text encoder, and encode the data with both, all in ``out``."""
        join_processes(self.train.device)
        data = open_data(self.data)
        tokenizer = self._tokenizer(data, out)
        text_encoder = self._text_encoder(data, out)
        return TrainingInputs(tokenizer, text_encoder, self._encode(data, tokenizer, text_encoder, out))

    def _tokenizer(self, data: DataSplit, out: Path) -> ImageTokenizer:
        """The image tokenizer in ``out``; if there is none yet, the given one is copied there or one is trained."""
        if _is_missing(out / "tokenizer"):
            if self.tokenizer is not None:
                made = ImageTokenizer.from_pretrained(part_of(self.tokenizer, "tokenizer"))
            else:
                folder, share = out / "stages" / "tokenizer", self.data.max_skipped_share
                images = data.raw_images()
                made = self.tokenizer_stage.fit(images, folder, title="1/3 tokenizer", max_skipped_share=share)
            _save_once(made, out / "tokenizer")
        return ImageTokenizer.from_pretrained(out / "tokenizer")

    def _text_encoder(self, data: DataSplit, out: Path) -> TextEncoder:
        """The text encoder in ``out``; if there is none yet, the given one is copied there or one is trained."""
        if _is_missing(out / "text_encoder"):
            if self.text_encoder is not None:
                made = TextEncoder.from_pretrained(part_of(self.text_encoder, "text_encoder"))
            else:
                folder = out / "stages" / "text_encoder"
                made = self.text_encoder_stage.fit(data.raw_texts(), folder, title="2/3 text encoder")
            _save_once(made, out / "text_encoder")
        text_encoder = TextEncoder.from_pretrained(out / "text_encoder")
        text_encoder.feature_kind = self.model.text_input
        return text_encoder

    def _encode(self, data: DataSplit, tokenizer: ImageTokenizer, text_encoder: TextEncoder, out: Path) -> DataSplit:
        """Image tokens and text ids of all data, and the text features if they are small enough to be stored."""
        device, length = pick_device(self.train.device), self.model.max_text_len
        tokenizer, text_encoder = tokenizer.to(device), text_encoder.to(device)
        captions = _count_captions(data.texts) + (0 if data.texts is data.pairs else _count_captions(data.pairs))
        features_mb = captions * length * text_encoder.width * 2 / 2**20
        cached = features_mb <= self.data.feature_cache_mb
        both = data_tokenizers(tokenizer, text_encoder, length=length)
        with_features = data_tokenizers(tokenizer, text_encoder, length=length, features=cached)

        def encode(subset: Subset, name: str, tokenizers: DataTokenizers) -> Subset:
            with main_process_first():
                folder = out / "encoded" / name
                return encode_subset(subset, folder, tokenizers, data=self.data, advance=_progress(name))

        pairs = images = texts = encode(data.pairs, "pairs", with_features)
        if data.images is not data.pairs:
            images = encode(data.images, "images", replace(both, tokenize_texts=None))
        if data.texts is not data.pairs:
            texts = encode(data.texts, "texts", replace(with_features, tokenize_images=None))
        return DataSplit(pairs=pairs, images=images, texts=texts)

    # The network and its training

    def build(self, inputs: TrainingInputs) -> ItitObjective:
        """The network with its objective; its initial weights follow from ``train.seed`` and, if they are whitened,
        the text features."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            model = self.model.build(inputs.tokenizer, inputs.text_encoder)
            if model.config.whiten_text:
                model.fit_whitening(inputs.text_features(texts=_WHITENED))
            return ItitObjective(model, inputs.text_encoder, self.objective)

    def diptych(self, objective: ItitObjective, inputs: TrainingInputs) -> Diptych:
        """The network in training as a pipeline, which captions and generates with its present weights."""
        return Diptych(
            inputs.tokenizer,
            inputs.text_encoder,
            objective.model,
            image_generation=self.generation.image,
            text_generation=self.generation.text,
            device=pick_device(self.train.device),
        )

    def train_on(
        self,
        inputs: TrainingInputs,
        objective: ItitObjective,
        out: Path,
        *,
        hooks: Sequence[Hook] = (),
        title: str = "ITIT",
    ) -> TrainResult:
        """Train on the encoded data, and save the network in ``out/model``."""
        seed, data = self.train.seed, inputs.encoded
        batches = BatchSampler(
            {
                "pairs": _store(data.pairs).pairs(data.pairs.items, seed=seed),
                "images": _store(data.images).images(data.images.items),
                "texts": _store(data.texts).texts(data.texts.items),
            },
            multiples=objective.streams,
            batch_size=self.train.batch_size,
            seed=seed,
        )
        subsets = {"pairs": data.pairs, "images": data.images, "texts": data.texts}
        identity = {
            "model": asdict(objective.model.config),
            "objective": asdict(self.objective),
            "data": {
                name: {"count": len(each.items), **_store(each).manifest["made_by"]} for name, each in subsets.items()
            },
        }
        result = train(
            objective, batches, out=out, train=self.train, optim=self.optim, hooks=hooks, title=title, identity=identity
        )
        with result.eval_mode(objective):
            if is_main_process():
                save_model(objective.model, out / "model")
        return result


def _is_missing(folder: Path) -> bool:
    """Whether no process has made ``folder`` yet. All processes answer alike: none goes on before all have looked."""
    missing = not folder.is_dir()
    wait_for_everyone()
    return missing


def _save_once(made: ImageTokenizer | TextEncoder, folder: Path) -> None:
    """Save from the first process; the others wait, as every process reads the saved files."""
    if is_main_process():
        save_model(made, folder)
    wait_for_everyone()


def _store(subset: Subset) -> Store:
    assert isinstance(subset.source, Store)
    return subset.source


def _count_captions(subset: Subset) -> int:
    """Estimate from up to 256 items; 0 for data that is encoded already, with or without features."""
    if isinstance(subset.source, Store):
        return 0
    source, sample = subset.source, subset.items[:: max(1, len(subset.items) // 256)]
    mean = sum(len(source.captions(int(item))) for item in sample) / max(1, len(sample))
    return int(mean * len(subset.items))


def _progress(name: str) -> Callable[[int, int], None]:
    """Prints one line that counts in a terminal; elsewhere only its end."""

    def advance(done: int, total: int) -> None:
        if done == total or sys.stdout.isatty():
            print(f"\r3/3 encoding {name}: {done:,} of {total:,}", end="\n" if done == total else "", flush=True)

    return advance
