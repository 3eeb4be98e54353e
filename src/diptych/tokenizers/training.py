"""Training image tokenizers and text encoders, each on its own or as a stage of ITIT.

A stage says how; a run adds where the data come from, and is what `diptych fit` carries out.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from diptych.data.batch import ImageExamples, TextExamples
from diptych.data.check import content_digest
from diptych.data.pixels import SkippedItems, pixel_stream
from diptych.data.sources import Source, open_finite
from diptych.data.sources.columns import Columns
from diptych.data.splits import Subset
from diptych.data.streams import BatchSampler, Stream
from diptych.errors import UserError
from diptych.eval.frechet import RandomFeatures
from diptych.report.html import ReportTable, Section, Text, closing_line, write_run_report
from diptych.report.sheet import Cell, comparison, save_png
from diptych.run_folder import Kind, write_config, write_json
from diptych.tokenizers.evaluation import evaluate_text_encoder, evaluate_tokenizer, nearest_texts
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from diptych.tokenizers.span_corruption import SpanCorruption, TextEncoderConfig
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import TextTokenizer, train_tokenizer
from diptych.tokenizers.vqgan import VQGAN, VQGANConfig
from diptych.train.config import FILES, OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process
from diptych.train.loop import train
from diptych.train.objective import Objective
from diptych.train.pace import MOST_GROWTH, Budget, RunPlan, StageCost

TOKENIZER, TEXT_ENCODER = "tokenizer", "text encoder"
"""Names of the two stages in the plan of a run."""
_SHOWN = 8
"""Number of images or texts in the report."""
_NEIGHBOURS = "Texts with the one among others whose features are most alike: what the encoder keeps of a text."
_SCORED = 512
"""Number of images or texts of the training set that a finished stage is scored on."""


@dataclass(kw_only=True, slots=True)
class TokenizerStage:
    """How an image tokenizer is trained, wherever its images come from."""

    slow_field: ClassVar[str | None] = None
    model: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    """Size and shape of the network."""
    objective: VQGANConfig = field(default_factory=VQGANConfig)
    """Weights of the losses."""
    flip: bool = True
    """Whether images are mirrored left to right, each in half of the epochs at random."""
    shards_together: int = 0
    """Number of tars that are shuffled together, so that a step reads few of them; 0 shuffles all images together."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and bookkeeping of the training."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(betas=(0.9, 0.99), weight_decay=0.0))
    """Optimizer and learning rate."""

    @property
    def slow_from(self) -> int:
        """First step with the discriminator."""
        return round(self.objective.adversarial_start * self.train.steps) if self.objective.adversarial_weight else 0

    def fit(
        self,
        subsets: list[Subset[Source]],
        out: Path,
        *,
        title: str = "tokenizer",
        max_skipped_share: float = 0.01,
        plan: RunPlan | None = None,
    ) -> ImageTokenizer:
        """Trains on the images of ``subsets`` in the folder ``out``, from its newest checkpoint if it has one.

        Prints the score on some of these images and writes it to ``tokenizer.json``; images that could not be read are
        listed in ``skipped.jsonl``. Raises UserError when more than ``max_skipped_share`` of the images are unreadable.
        """
        skipped = SkippedItems(max_skipped_share=max_skipped_share)
        stream = pixel_stream(
            subsets,
            size=self.model.image_size,
            skipped=skipped,
            flip=self.flip,
            seed=self.train.seed,
            shards_together=self.shards_together,
        )

        def make(stage: TokenizerStage) -> tuple[VQGAN, BatchSampler]:
            tokenizer = ImageTokenizer.from_config(stage.model, seed=stage.train.seed)
            objective = VQGAN(tokenizer, stage.objective, steps=stage.train.steps, seed=stage.train.seed)
            return objective, _sampler({"images": stream}, objective, stage.train)

        plan = plan or RunPlan([StageCost(name=TOKENIZER, steps=self.train.steps)])
        # Codes without a network begin as a k-means: steps beyond those of the recipe change nothing.
        most = MOST_GROWTH if self.model.widths else 1.0
        stage, pace = plan.fit_stage(TOKENIZER, self, out, make, most=most)
        objective, batches = make(stage)
        tokenizer = objective.tokenizer
        identity: dict[str, Any] = {"model": asdict(self.model), "objective": asdict(self.objective), "flip": self.flip}
        identity[FILES] = "-".join(content_digest(subset.source) for subset in subsets)
        if self.shards_together:
            identity["shards_together"] = self.shards_together
        if objective.perceptual is not None:
            identity["perceptual"] = objective.perceptual.digest
        result = train(
            objective,
            batches,
            out=out,
            train=stage.train,
            optim=stage.optim,
            title=title,
            identity=identity,
            pace=pace,
            report=plan.report,
        )
        if is_main_process():
            for line in skipped.report(out / "skipped.jsonl"):
                print(line, file=sys.stderr, flush=True)
        with result.eval_mode(objective):
            if is_main_process():
                score = evaluate_tokenizer(tokenizer, _first(stream, _SCORED), extractor=RandomFeatures())
                print(f"{title}: {score}, on {score.images:,} of its own images", flush=True)
                write_json(out / "tokenizer.json", asdict(score))
                _save_samples(tokenizer, next(_first(stream, _SHOWN)), out / "samples")
            return ImageTokenizer(tokenizer.network, image_size=tokenizer.image_size).cpu()


def _report(out: Path, state: str) -> None:
    write_run_report(out, state=state)


def _save_samples(tokenizer: ImageTokenizer, pixels_B3HW: Tensor, folder: Path) -> None:
    """A sheet of images before and after."""
    after = tokenizer.decode(tokenizer.encode(pixels_B3HW)).cpu()
    rows = {"image": pixels_B3HW.cpu(), "after": after}
    cells = {name: [Cell(image=p) for p in each.permute(0, 2, 3, 1).numpy()] for name, each in rows.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_png(folder / "after.png", comparison(cells, title="what the tokens keep"))


def _sampler(streams: dict[str, Stream[Any]], objective: Objective, train: TrainConfig) -> BatchSampler:
    return BatchSampler(streams, multiples=objective.streams, batch_size=train.batch_size, seed=train.seed)


def _first(stream: Stream[ImageExamples], count: int) -> Iterator[Tensor]:
    """The first ``count`` images of a stream, in batches of about 64."""
    for rows in np.array_split(np.arange(min(count, stream.size)), -(-min(count, stream.size) // 64)):
        yield stream.take(rows, np.zeros_like(rows)).pixels_B3HW


@dataclass(kw_only=True, slots=True)
class TokenizerRun:
    """`diptych fit vqgan-*`: an image tokenizer from a source of images."""

    kind: ClassVar[Kind] = "tokenizer"

    images: str
    """Source of the images to learn from."""
    columns: Columns = field(default_factory=Columns)
    """Names of the source's columns where they cannot be guessed."""
    stage: TokenizerStage = field(default_factory=TokenizerStage)
    """Training of the image tokenizer."""

    def fit(self, out: Path, *, recipe: str, budget: Budget | None = None) -> None:
        """Leaves ``out/tokenizer``, a plain diffusers folder. Raises UserError for a source without images."""
        source = open_finite(self.images, self.columns)
        if not source.has_images:
            raise UserError(f"{self.images}: has no images to train a tokenizer on")
        write_config(out, recipe=recipe, run=self)
        plan = RunPlan(
            [StageCost(name=TOKENIZER, steps=self.stage.train.steps)],
            budget=Budget.of_run(out, budget),
            report=partial(_report, out),
        )
        self.stage.fit([Subset(source, np.arange(len(source)))], out, plan=plan).save_pretrained(out / "tokenizer")
        if is_main_process():
            write_run_report(out)
            score = json.loads((out / "tokenizer.json").read_text())
            print(closing_line(out, self.kind, score=f"PSNR {score['psnr']:.1f} dB"), flush=True)


@dataclass(kw_only=True, slots=True)
class TextEncoderStage:
    """How a text encoder is trained, wherever its texts come from."""

    slow_field: ClassVar[str | None] = None
    model: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """Size and shape of the network, and its span corruption."""
    max_text_len: int = 64
    """Largest number of tokens of a text; longer texts are cut off while training."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and bookkeeping of the training; with 0 steps the weights stay the random ones that they begin with."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(betas=(0.9, 0.98), weight_decay=0.01))
    """Optimizer and learning rate."""

    @property
    def slow_from(self) -> int:
        """0: all steps take the same time."""
        return 0

    def fit(
        self, texts: Iterable[str], out: Path, *, title: str = "text encoder", plan: RunPlan | None = None
    ) -> TextEncoder:
        """Trains a text tokenizer and a T5 in the folder ``out``, from its newest checkpoint if it has one.

        With 0 steps only the text tokenizer is trained. Prints the score on some of these texts and writes it to
        ``text_encoder.json``. Raises UserError for texts without a word.
        """
        texts = list(texts)
        tokenizer = train_tokenizer(
            texts, vocab_size=self.model.vocab_size, sentinels=self.model.sentinels, lowercase=self.model.lowercase
        )
        rows = self.model.t5(vocab_real=len(tokenizer)).vocab_size
        ids = TextTokenizer(tokenizer.backend_tokenizer, vocab_rows=rows)
        ids_XL, valid_XL = ids.tokenize(texts, length=self.max_text_len)
        longest = int(valid_XL.sum(1).max())
        ids_XL, valid_XL = ids_XL[:, :longest], valid_XL[:, :longest]

        def take(index: np.ndarray, epoch: np.ndarray) -> TextExamples:
            return TextExamples(ids_BL=ids_XL[index], valid_BL=valid_XL[index])

        stream = Stream(size=len(texts), take=take)

        def make(stage: TextEncoderStage) -> tuple[SpanCorruption, BatchSampler]:
            objective = SpanCorruption(tokenizer, config=stage.model, seed=stage.train.seed)
            return objective, _sampler({"texts": stream}, objective, stage.train)

        if not self.train.steps:
            objective, _ = make(self)
        else:
            plan = plan or RunPlan([StageCost(name=TEXT_ENCODER, steps=self.train.steps)])
            stage, pace = plan.fit_stage(TEXT_ENCODER, self, out, make)
            objective, batches = make(stage)
            digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
            identity = {"model": asdict(self.model), "max_text_len": self.max_text_len, FILES: digest}
            train(
                objective,
                batches,
                out=out,
                train=stage.train,
                optim=stage.optim,
                title=title,
                identity=identity,
                pace=pace,
                report=plan.report,
            )
        encoder = objective.text_encoder()
        if is_main_process():
            score = evaluate_text_encoder(encoder, texts[:_SCORED], length=self.max_text_len)
            print(f"{title}: {score}, on {score.texts:,} of its own texts", flush=True)
            write_json(out / "text_encoder.json", asdict(score))
        return encoder


@dataclass(kw_only=True, slots=True)
class TextEncoderRun:
    """`diptych fit text-encoder-*`: a small T5 from a source of texts."""

    kind: ClassVar[Kind] = "text encoder"

    texts: str
    """Source of the texts to learn from."""
    columns: Columns = field(default_factory=Columns)
    """Names of the source's columns where they cannot be guessed."""
    stage: TextEncoderStage = field(default_factory=TextEncoderStage)
    """Training of the text encoder."""

    def fit(self, out: Path, *, recipe: str, budget: Budget | None = None) -> None:
        """Leaves ``out/text_encoder``, a plain transformers folder with its tokenizer.

        Raises UserError for a source without texts.
        """
        source = open_finite(self.texts, self.columns)
        if not source.has_captions:
            raise UserError(f"{self.texts}: has no texts to train a text encoder on")
        write_config(out, recipe=recipe, run=self)
        texts = (text for item in range(len(source)) for text in source.captions(item))
        plan = RunPlan(
            [StageCost(name=TEXT_ENCODER, steps=self.stage.train.steps)],
            budget=Budget.of_run(out, budget),
            report=partial(_report, out),
        )
        encoder = self.stage.fit(texts, out, plan=plan)
        encoder.save_pretrained(out / "text_encoder")
        if is_main_process():
            some = list(islice((text for i in range(len(source)) for text in source.captions(i)), _SCORED))
            neighbours = nearest_texts(encoder, some, length=self.stage.max_text_len, shown=_SHOWN)
            table = ReportTable(head=["text", "nearest other text", "cosine"], rows=neighbours)
            write_run_report(out, samples=[Section("Samples", [Text(_NEIGHBOURS), table])])
            score = json.loads((out / "text_encoder.json").read_text())
            headline = f"features vary in {score['effective_rank']:.1f} of {score['width']} directions"
            print(closing_line(out, self.kind, score=headline), flush=True)
