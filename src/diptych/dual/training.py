"""Training dual encoders: ITO and the methods that it is compared with, on the same batches."""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase

from diptych.data.batch import CaptionedImageExamples, CaptionedStateExamples
from diptych.data.check import VALIDATION, Part, check_parts, content_digest, note_on_lengths
from diptych.data.pixels import ReadableImages, SkippedItems
from diptych.data.sources import Source, open_finite, open_source, require_pairs
from diptych.data.streams import BatchSampler, Stream
from diptych.dual.data import CaptionIds, PairsData, States, StatesConfig, cached_states, pair_stream
from diptych.dual.evaluation import (
    EmbeddedImages,
    EmbeddedPairs,
    compare_finished,
    embed_pairs,
    embed_readable,
    readable_images,
    score_retrieval,
)
from diptych.dual.ito import ItoConfig
from diptych.dual.model import DualEncoder, DualEncoderConfig, train_clip_tokenizer
from diptych.dual.objective import ClipConfig, PairsConfig, SlipConfig
from diptych.dual.towers import TowersEncoder
from diptych.errors import UserError
from diptych.nn.inference import pick_device
from diptych.report.html import closing_line, outcome, write_run_report
from diptych.report.sheet import Cell, comparison, save_png
from diptych.run_folder import Kind, part_of, save_model, write_config
from diptych.train.checkpoint import BestWeights, Score
from diptych.train.config import FILES, OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first, process_count
from diptych.train.logging import Measured
from diptych.train.loop import Hook, TrainResult, train
from diptych.train.objective import Objective
from diptych.train.pace import Budget, RunPlan, StageCost, training_seconds

_SHOWN, _FOUND = 6, 3
"""Number of texts on the sheet of samples, and of images that are shown for each."""
_THUMBNAIL = 128
"""Side in pixels of these images."""
_TRIED_ROWS = 32
"""Number of pairs of the steps that are timed to choose the towers."""
_TIMED = 16
"""Number of images with which a validation is timed."""
_VALID_SHARE = 0.04
"""Share of a budget that one validation takes at most."""
_VALID_ONCE_SHARE = 0.1
"""The same for frozen towers, which compute the features of a validation once."""
_LEAST_TRAINING, _MOST_TRAINING = 0.15, 0.5
"""Smallest and largest share of the rest of a budget for training on frozen towers. Between them it gets the time of
its steps; the features of images and captions get what is left."""


@dataclass(kw_only=True, slots=True)
class DualRun:
    """A dual encoder trained on pairs. Each family of recipes has a subclass, which sets the kind of objective."""

    kind: ClassVar[Kind] = "dual"
    slow_field: ClassVar[str | None] = None

    data: PairsData
    """The captioned images to learn from and to validate on."""
    start: str | None = None
    """A CLIP to continue from: a folder, an earlier run or a hub name. Not given: random weights."""
    tokenizer: str | None = None
    """Text tokenizer in CLIP's format, a folder or a hub name. Not given: one is trained on the captions."""
    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    """Sizes of the two towers. Not used where `start` is given."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length of the run, batches, hardware, and what is written on the way."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    objective: PairsConfig
    """The losses, and the views and captions that they compare."""
    patience: int = 5
    """Number of validations in a row without a better mean R@1 after which training ends, if `data.valid` is given. The
    best weights are kept."""

    def fit(self, out: Path, *, recipe: str, budget: Budget | None = None) -> TrainResult:
        """Train, and leave ``out/model``, a plain CLIP folder, and the validation retrieval in ``metrics.jsonl``.

        Raises UserError for data without images or captions, and for invalid settings.
        """
        join_processes(self.train.device)
        source, summary = self._open_data()
        self._fit_batch(source)

        def report(state: str) -> None:
            write_run_report(out, state=state)

        best = BestWeights(out / "best", patience=self.patience) if self.data.valid else None
        plan = RunPlan([StageCost(name=recipe, steps=self.train.steps)], budget=Budget.of_run(out, budget))
        skipped = SkippedItems(max_skipped_share=self.data.max_skipped_share)
        model = self._model(source, out)
        captions = CaptionIds.read(source, np.arange(len(source)), model.ids)
        if (note := note_on_lengths(np.diff(captions.starts), model.max_text_len)) and is_main_process():
            print(f"{note}; raise --model.max-text-len", file=sys.stderr, flush=True)
        states: States | None = None

        def make(run: DualRun, model: DualEncoder) -> tuple[Objective, BatchSampler]:
            model.tune_for_training()
            objective = run._objective(model)
            if states is None:
                stream: Stream[Any] = run._pixels(source, captions, model, skipped)
            else:
                stream = states.stream(captions, per_image=run.objective.captions, seed=run.train.seed)
            rows, seed = run.train.batch_size, run.train.seed
            return objective, BatchSampler({"pairs": stream}, multiples=objective.streams, batch_size=rows, seed=seed)

        resized = self._with_affordable_towers(lambda run: make(run, copy.deepcopy(model)), plan)
        if resized is not self:
            model = resized._model(source, out)
        affordable, seconds = resized._affordable_evaluation(model, out, plan)
        if isinstance(model, TowersEncoder) and model.frozen:
            if self.data.shards_together:
                raise UserError("--data.shards-together has no effect on frozen towers, which read each image once")
            seconds = affordable._remember_validation(model, out)
            if plan.budget is not None:
                captions = captions.in_random_order()  # its beginning is what the budget may have to do with
            states = self._states(model, source, captions, out, plan, skipped)
            affordable._lower_batch(len(states.rows_N))

        # Trial steps change a model.
        run, pace = plan.fit_stage(
            recipe, affordable, out, lambda run: make(run, copy.deepcopy(model)), evaluation_seconds=seconds
        )
        hooks = run._hooks(model, out, best)
        write_config(out, recipe=recipe, run=run, data=summary)
        objective, batches = make(run, model)
        result = train(
            objective,
            batches,
            out=out,
            train=run.train,
            optim=run.optim,
            hooks=hooks,
            title=recipe,
            identity=run._identity(model, source, captioned_images=batches.streams["pairs"].size),
            pace=pace,
            report=report,
        ).with_best(best, objective)
        if is_main_process():
            for line in skipped.report(out / "skipped.jsonl"):
                print(line, file=sys.stderr, flush=True)
        with result.eval_mode(objective):
            if is_main_process():
                model.clamp_scale()
                save_model(model, out / "model")
        if result.finished and is_main_process():
            run._report_result(out, model, best)
        return result

    def _open_data(self) -> tuple[Source, str]:
        """The pairs, and the line about all data that is printed before the training."""
        source = open_finite(self.data.pairs, self.data.columns)
        require_pairs(source, self.data.pairs)
        parts = [Part("pair", source, range(len(source)))]
        if self.data.valid is not None:
            valid = open_finite(self.data.valid, self.data.columns)
            parts.append(Part(VALIDATION, valid, range(min(len(valid), self.data.valid_images))))
        summary = check_parts(parts, max_skipped_share=self.data.max_skipped_share)
        if is_main_process():
            print(summary, flush=True)
        return source, summary

    def _identity(self, model: DualEncoder, source: Source, *, captioned_images: int) -> dict[str, Any]:
        """What the losses depend on besides the loop's own fields; a resumed run must have the same."""
        together = {"shards_together": self.data.shards_together} if self.data.shards_together else {}
        return {
            "model": model.clip.config.to_diff_dict() | model.training_settings(),
            "objective": self.objective.identity(),
            "data": {
                "pairs": source.name,
                "captioned_images": captioned_images,
                "decode_size": self.data.decode_size,
            },
            FILES: content_digest(source),
            **together,
        }

    def _report_result(self, out: Path, model: DualEncoder, best: BestWeights | None) -> None:
        """Write the report of a finished run and, with `--data.valid`, its comparison; print both in short."""
        if best is not None:
            compare_finished(out, model, self._valid_images(model, out))
        write_run_report(out)
        step = best.score.step if best is not None and best.score is not None else None
        score = outcome(out, step=step, select="mean_r1", source=self.data.valid)
        print(closing_line(out, self.kind, score=score), flush=True)

    def _fit_batch(self, source: Source) -> None:
        """Lower a batch size above the number of pairs: copies of a pair in a batch would count as wrong partners."""
        pairs = 0
        for item in range(len(source)):
            pairs += bool(source.captions(item))
            if pairs >= self.train.batch_size:
                return
        self._lower_batch(pairs)

    def _lower_batch(self, pairs: int) -> None:
        """Lower the batch size to the number of pairs, if it is above."""
        if pairs >= self.train.batch_size:
            return
        world = process_count()
        fitting = pairs - pairs % world
        if fitting < 2:
            raise UserError(f"{self.data.pairs}: {pairs} images with captions are too few to tell them apart: add some")
        if is_main_process():
            print(
                f"train.batch-size {self.train.batch_size} is more than the {pairs} images with captions, and a batch "
                f"must hold none of them twice: it is lowered to {fitting}",
                file=sys.stderr,
            )
        self.train = replace(self.train, batch_size=fitting)

    @property
    def slow_from(self) -> int:
        """0: all steps take the same time."""
        return 0

    def _model(self, source: Source, out: Path) -> DualEncoder:
        """The dual encoder that training begins with, on the device that trains."""
        config, device = self.model, pick_device(self.train.device)
        towers = (config.image_tower, config.text_tower)
        if self.start is not None:
            if any(towers):
                raise UserError("--start continues a model, and --model.image-tower begins one: give one of them")
            model = DualEncoder.from_pretrained(part_of(self.start, "model"))
        elif any(towers):
            if config.image_tower is None or config.text_tower is None:
                raise UserError("--model.image-tower and --model.text-tower belong together: give both or none")
            if self.tokenizer is not None:
                raise UserError("--tokenizer is for new towers: a pretrained text tower has its own; leave it away")
            model = TowersEncoder.from_towers(
                config.image_tower,
                config.text_tower,
                width=config.width,
                max_text_len=config.max_text_len,
                seed=self.train.seed,
            )
        else:
            if config.tune != "heads" or config.dropout:
                raise UserError("--model.tune and --model.dropout are for pretrained towers: give --model.image-tower")
            model = DualEncoder.from_config(config, self._tokenizer(source, out), seed=self.train.seed)
        if isinstance(model, TowersEncoder):
            model.set_trainable(config.tune, dropout=config.dropout)
        return model.to(device)

    def _remember_validation(self, model: TowersEncoder, out: Path) -> float:
        """Compute the features of validation once; return the seconds that each validation takes from then on."""
        model.remember(self.data.cache or out / "features")
        if self.data.valid is None or not is_main_process():
            return 0.0
        measure = measure_retrieval(model, self._valid_images(model, out))
        measure(0, model)
        model.save_cache()
        began = time.monotonic()
        measure(0, model)
        return time.monotonic() - began

    def _states_config(self, model: TowersEncoder) -> StatesConfig:
        return StatesConfig(
            views=self.objective.view_configs(),
            keep_tokens=self.objective.keeps_tokens,
            size=self.data.decode_size or model.image_size,
            precision=self.train.precision,
        )

    def _seconds_of_training(self, model: TowersEncoder, captions: CaptionIds) -> float:
        """Seconds of all steps, by trial steps on random states, as there are none of images yet."""
        config, rows = self._states_config(model), self.train.batch_size
        longest = int(np.diff(captions.starts)[: rows * self.objective.captions].max()) if config.keep_tokens else 0
        shape = (rows, len(config.views), model.image_tokens if config.keep_tokens else 1, model.image_tower_width)
        random = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=random)
        texts = torch.randn(rows, self.objective.captions, 1 + longest, model.text_tower_width, generator=random)
        valid = torch.ones(rows, self.objective.captions, longest, dtype=torch.bool)

        def take(index: np.ndarray, epoch: np.ndarray) -> CaptionedStateExamples:
            return CaptionedStateExamples(images_BVSF=images, texts_BMLF=texts, valid_BML=valid)[: len(index)]

        def make(run: DualRun) -> tuple[Objective, BatchSampler]:
            objective = run._objective(copy.deepcopy(model))
            stream: Stream[Any] = Stream(size=rows, take=take)
            return objective, BatchSampler({"pairs": stream}, multiples=objective.streams, batch_size=rows, seed=0)

        return training_seconds(self, make)

    def _states(
        self,
        model: TowersEncoder,
        source: Source,
        captions: CaptionIds,
        out: Path,
        plan: RunPlan,
        skipped: SkippedItems,
    ) -> States:
        """The states to learn from: of all items, or of as many as a budget has time for beside the training."""
        enough, budget = self._enough(model, captions, plan), plan.budget
        some = ", as many as the budget has time for" if budget is not None else ""
        with main_process_first():
            states, items = cached_states(
                model,
                source,
                captions,
                self._states_config(model),
                cache=self.data.cache or out / "features",
                skipped=skipped,
                enough=enough,
                title=f"computing the features of images and captions{some}",
            )
        if budget is not None:
            budget.decision("images", lambda: items)
            if items < len(captions.items):
                print(f"features: {items:,} of {len(captions.items):,} images fit into the budget", flush=True)
        return states

    def _enough(self, model: TowersEncoder, captions: CaptionIds, plan: RunPlan) -> Callable[[int], bool]:
        """Whether the time for features is over, because the steps of the recipe need the rest of the budget.

        It goes by the clock, since a machine may become slower on the way.
        """
        budget = plan.budget
        if budget is None:
            return lambda items: False
        if (known := budget.decided("images")) is not None:
            return lambda items: items >= known
        left = plan.seconds_for(plan.costs[0].name)
        needed = self._seconds_of_training(model, captions)
        training = min(max(needed, _LEAST_TRAINING * left), _MOST_TRAINING * left)
        return lambda items: plan.seconds_for(plan.costs[0].name) <= training

    def _tokenizer(self, source: Source, out: Path) -> PreTrainedTokenizerBase:
        """The given tokenizer, else that of the run folder. The first process trains it where it is not there yet."""
        folder = out / "tokenizer"
        with main_process_first():
            if self.tokenizer is None and not folder.is_dir():
                texts = (text for item in range(len(source)) for text in source.captions(item))
                trained = train_clip_tokenizer(texts, vocab_size=self.model.vocab_size, length=self.model.max_text_len)
                trained.save_pretrained(folder)
        name = part_of(self.tokenizer, "tokenizer") if self.tokenizer is not None else str(folder)
        return transformers.AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())

    def _with_affordable_towers(
        self, make: Callable[["DualRun"], tuple[Objective, BatchSampler]], plan: RunPlan
    ) -> "DualRun":
        """This run, or with towers as small as those of `ito-tiny` where hardly any steps of its own would fit.

        ``make`` gives the objective and the batches of a run.
        """
        tiny = DualEncoderConfig.tiny()
        given = self.start is not None or self.model.image_tower is not None
        if given or (self.model.image_size, self.model.image_width) <= (tiny.image_size, tiny.image_width):
            return self
        instead = "towers as small as those of ito-tiny, for images of 64 pixels, are trained"
        if not plan.too_short(plan.costs[0].name, self, make, rows=_TRIED_ROWS, instead=instead):
            return self
        return replace(
            self, model=replace(tiny, max_text_len=self.model.max_text_len, vocab_size=self.model.vocab_size)
        )

    def _affordable_evaluation(self, model: DualEncoder, out: Path, plan: RunPlan) -> tuple["DualRun", float]:
        """The run with as many validation images as its budget has time for, and the seconds that these take."""
        if plan.budget is None or self.data.valid is None:
            return self, 0.0
        few = replace(self, data=replace(self.data, valid_images=min(_TIMED, self.data.valid_images)))
        measure = measure_retrieval(model, few._valid_images(model, out))
        measure(0, model)  # the first call costs more than later ones
        began = time.monotonic()
        measure(0, model)
        each = (time.monotonic() - began) / few.data.valid_images
        once = isinstance(model, TowersEncoder) and model.frozen
        share = _VALID_ONCE_SHARE if once else _VALID_SHARE
        fits = int(share * 60 * plan.budget.minutes / each)
        images = plan.budget.decision("valid_images", lambda: max(_TIMED, min(fits, self.data.valid_images)))
        if images < self.data.valid_images:
            print(f"validation: {images:,} of {self.data.valid_images:,} images fit into the budget", flush=True)
        return replace(self, data=replace(self.data, valid_images=images)), each * images

    def _valid_images(self, model: DualEncoder, out: Path) -> ReadableImages:
        """The images of `--data.valid`; what cannot be read is reported now, not at the first evaluation."""
        assert self.data.valid is not None
        source = open_source(self.data.valid, columns=self.data.columns)
        require_pairs(source, self.data.valid)
        skipped = SkippedItems(max_skipped_share=self.data.max_skipped_share)
        limit, cache_mb = self.data.valid_images, self.data.cache_mb
        images = readable_images(source, limit=limit, size=model.image_size, skipped=skipped, cache_mb=cache_mb)
        if not any(source.captions(int(item)) for item in images.items):
            raise UserError(f"{self.data.valid}: has no captioned image to measure retrieval on")
        for _ in images:
            pass
        if is_main_process():
            for line in skipped.report(out / "skipped_valid.jsonl"):
                print(line, file=sys.stderr, flush=True)
        return images

    def _hooks(self, model: DualEncoder, out: Path, best: BestWeights | None) -> list[Hook]:
        if self.data.valid is None or best is None:
            return []
        measure = measure_retrieval(model, self._valid_images(model, out), folder=out / "samples")

        def run(step: int, objective: nn.Module) -> dict[str, Measured]:
            found = measure(step, objective)
            value = found["valid/mean_r1"]
            assert isinstance(value, float | int)
            best.offer(Score(step=step, value=value), objective)
            return found

        return [Hook(every=self.train.eval_every, run=run, stop_early=best.is_over)]

    def _objective(self, model: DualEncoder) -> Objective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)  # for weights outside the model, which are dropped after training
            if isinstance(model, TowersEncoder) and model.frozen:
                return self.objective.build(model.heads())
            return self.objective.build(model)

    def _pixels(
        self, source: Source, captions: CaptionIds, model: DualEncoder, skipped: SkippedItems
    ) -> Stream[CaptionedImageExamples]:
        return pair_stream(
            source,
            captions,
            size=self.data.decode_size or model.image_size * 3 // 2,
            per_image=self.objective.captions,
            pad=model.tokenizer.pad_token_id,
            skipped=skipped,
            cache_mb=self.data.cache_mb,
            seed=self.train.seed,
            shards_together=self.data.shards_together,
        )


@dataclass(kw_only=True, slots=True)
class ClipRun(DualRun):
    """`diptych fit clip-*` and `siglip-*`."""

    objective: ClipConfig = field(default_factory=ClipConfig)
    """CLIP's or SigLIP's loss, and the views and captions that it compares."""


@dataclass(kw_only=True, slots=True)
class ItoRun(DualRun):
    """`diptych fit ito-*`."""

    objective: ItoConfig = field(default_factory=ItoConfig)
    """ITO's losses, and the views and captions that they compare."""


@dataclass(kw_only=True, slots=True)
class SlipRun(DualRun):
    """`diptych fit slip-*`."""

    objective: SlipConfig = field(default_factory=SlipConfig)
    """SLIP's losses, and the views and captions that they compare."""


def measure_retrieval(
    model: DualEncoder, images: ReadableImages, *, folder: Path | None = None
) -> Callable[[int, nn.Module], dict[str, Measured]]:
    """A hook that measures retrieval among ``images`` as `diptych evaluate` does, for ``metrics.jsonl``.

    With ``folder``, it also writes a sheet there: some texts, each under the images that it finds.
    """

    def run(step: int, objective: nn.Module) -> dict[str, Measured]:
        embedded = embed_readable(model, images)
        pairs = embed_pairs(model, embedded)
        table = score_retrieval(pairs)
        found: dict[str, Measured] = {
            f"valid/{name}": value for name, value in table.items() if name not in ("images", "texts")
        }
        if folder is None:
            return found
        sheet = _sheet_of_finds(embedded, pairs, title=f"step {step:,}: the images that each text finds")
        save_png(folder / f"step-{step:08d}.png", sheet)
        return found | {"samples": sheet}

    return run


def _sheet_of_finds(images: EmbeddedImages, pairs: EmbeddedPairs, *, title: str) -> Image.Image:
    """A column for each of some texts, with its own image and the best ones that it finds."""
    source = images.source
    items = [item for item in map(int, images.items_I) if source.captions(item)]
    shown = items[:_SHOWN]
    best_BK = (pairs.first_ID[: len(shown)] @ pairs.images_ID.T).topk(min(_FOUND, len(items)), dim=1).indices.cpu()
    own = [Cell(image=source.image(item, _THUMBNAIL), caption=source.captions(item)[0]) for item in shown]
    rows = {"its image": own}
    for place in range(best_BK.shape[1]):
        found = [items[row] for row in best_BK[:, place].tolist()]
        rows[f"found {place + 1}."] = [Cell(image=source.image(item, _THUMBNAIL)) for item in found]
    return comparison(rows, title=title)
