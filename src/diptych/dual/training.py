"""Training dual encoders: ITO and the methods that it is compared with, on the same batches."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diptych.data.pixels import SkippedItems
from diptych.data.sources import Source, open_finite, require_pairs
from diptych.data.streams import BatchSampler
from diptych.dual.data import CaptionIds, PairsData, ValidPairs, pair_stream, read_valid_pairs
from diptych.dual.metrics import retrieval
from diptych.dual.model import DualEncoder, DualEncoderConfig, train_clip_tokenizer
from diptych.dual.objectives.base import PairsConfig
from diptych.dual.objectives.clip import ClipConfig
from diptych.dual.objectives.ito import ItoConfig
from diptych.dual.objectives.slip import SlipConfig
from diptych.nn.inference import pick_device
from diptych.report.run_report import closing_line, outcome, write_run_report
from diptych.report.sheet import Cell, comparison, save_png
from diptych.run_folder import Kind, part_of, save_model, write_config
from diptych.train.best import BestWeights, Score
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first
from diptych.train.logging import Measured
from diptych.train.loop import Hook, TrainResult, train
from diptych.train.objective import Objective
from diptych.train.pace import Budget, RunPlan, StageCost

_SHOWN, _FOUND = 6, 3
"""Number of texts on the sheet of samples, and of images that are shown for each."""
_TIMED = 16
"""Number of images whose validation is timed."""
_VALID_SHARE = 0.04
"""Share of a budget that one validation takes at most."""


@dataclass(kw_only=True, slots=True)
class DualRun:
    """A dual encoder trained on pairs. Each family of recipes has a subclass, which sets the kind of objective."""

    kind: ClassVar[Kind] = "dual"

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

        Raises UserError for data without images or captions, and for settings that cannot be meant.
        """
        join_processes(self.train.device)
        source = open_finite(self.data.pairs, self.data.columns)
        require_pairs(source, self.data.pairs)

        def report(state: str) -> None:
            write_run_report(out, state=state)

        best = BestWeights(out / "best", patience=self.patience) if self.data.valid else None
        plan = RunPlan([StageCost(name=recipe, steps=self.train.steps)], budget=Budget.of_run(out, budget))
        skipped = SkippedItems(max_skipped_share=self.data.max_skipped_share)
        captions = CaptionIds.read(source, np.arange(len(source)), self._model(source, out).ids)

        def make(run: DualRun) -> tuple[Objective, BatchSampler]:
            model = run._model(source, out)
            model.tune_for_training()
            objective = run._objective(model)
            return objective, run._batches(source, captions, model, objective, skipped)

        affordable, seconds = self._affordable_evaluation(source, out, plan)
        run, pace = plan.fit_stage(recipe, affordable, out, make, evaluation_seconds=seconds)
        model = run._model(source, out)
        model.tune_for_training()
        hooks = run._hooks(model, out, best)
        write_config(out, recipe=recipe, run=run)
        objective = run._objective(model)
        batches = run._batches(source, captions, model, objective, skipped)
        identity = {
            "model": model.clip.config.to_diff_dict(),
            "objective": self.objective.identity(),
            "data": {
                "pairs": source.name,
                "captioned_images": batches.streams["pairs"].size,
                "decode_size": self.data.decode_size,
            },
        }
        result = train(
            objective,
            batches,
            out=out,
            train=run.train,
            optim=run.optim,
            hooks=hooks,
            title=recipe,
            identity=identity,
            pace=pace,
            report=report,
        )
        if len(skipped):
            skipped.write(out / "skipped.jsonl")
        if best is not None and best.score is not None:
            best.load_into(objective)
        with result.eval_mode(objective) if best is None else nullcontext():
            if is_main_process():
                model.clamp_scale()
                save_model(model, out / "model")
        if result.finished and is_main_process():
            write_run_report(out)
            print(
                closing_line(
                    out,
                    self.kind,
                    score=outcome(
                        out,
                        step=best.score.step if best and best.score else None,
                        select="mean_r1",
                        source=self.data.valid,
                    ),
                ),
                flush=True,
            )
        return result

    @property
    def slow_from(self) -> int:
        """0: all steps take the same time."""
        return 0

    def _model(self, source: Source, out: Path) -> DualEncoder:
        if self.start is not None:
            return DualEncoder.from_pretrained(part_of(self.start, "model"))
        return DualEncoder.from_config(self.model, self._tokenizer(source, out), seed=self.train.seed)

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

    def _affordable_evaluation(self, source: Source, out: Path, plan: RunPlan) -> tuple["DualRun", float]:
        """The run with so many images to validate on as a budget has time for, and the seconds that these take."""
        if plan.budget is None or self.data.valid is None:
            return self, 0.0
        model = self._model(source, out).to(pick_device(self.train.device))
        few = replace(self.data, valid_images=min(_TIMED, self.data.valid_images))
        run = measure_retrieval(model, read_valid_pairs(self.data.valid, few, size=model.image_size))
        began = time.monotonic()
        run(0, model)
        each = (time.monotonic() - began) / few.valid_images
        fits = int(_VALID_SHARE * 60 * plan.budget.minutes / each)
        images = plan.budget.decision("valid_images", lambda: max(_TIMED, min(fits, self.data.valid_images)))
        if images < self.data.valid_images:
            print(f"validation: {images:,} of {self.data.valid_images:,} images fit into the budget", flush=True)
        return replace(self, data=replace(self.data, valid_images=images)), each * images

    def _hooks(self, model: DualEncoder, out: Path, best: BestWeights | None) -> list[Hook]:
        if self.data.valid is None or best is None:
            return []
        pairs = read_valid_pairs(self.data.valid, self.data, size=model.image_size)
        measure = measure_retrieval(model, pairs, folder=out / "samples")

        def run(step: int, objective: nn.Module) -> dict[str, Measured]:
            found = measure(step, objective)
            value = found["valid/mean_r1"]
            assert isinstance(value, float | int)
            best.offer(Score(step=step, value=value), objective)
            return found

        return [Hook(every=self.train.eval_every, run=run, over=best.is_over)]

    def _objective(self, model: DualEncoder) -> Objective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)  # for weights outside the model, which are dropped after training
            return self.objective.build(model)

    def _batches(
        self, source: Source, captions: CaptionIds, model: DualEncoder, objective: Objective, skipped: SkippedItems
    ) -> BatchSampler:
        stream = pair_stream(
            source,
            captions,
            size=self.data.decode_size or model.image_size * 3 // 2,
            per_image=self.objective.captions,
            pad=model.tokenizer.pad_token_id,
            skipped=skipped,
            cache_mb=self.data.cache_mb,
            seed=self.train.seed,
        )
        return BatchSampler(
            {"pairs": stream}, multiples=objective.streams, batch_size=self.train.batch_size, seed=self.train.seed
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
    model: DualEncoder, pairs: ValidPairs, *, folder: Path | None = None
) -> Callable[[int, nn.Module], dict[str, Measured]]:
    """A hook that measures retrieval among ``pairs``, for ``metrics.jsonl``.

    With ``folder``, it also writes a sheet there: some texts, each under the images that it finds.
    """

    def run(step: int, objective: nn.Module) -> dict[str, Measured]:
        images_ID, texts_TD = model.embed_images(pairs.pixels_I3SS), model.embed_texts(pairs.texts)
        table = retrieval(images_ID, texts_TD, image_of_T=pairs.image_of_T.to(images_ID.device)).table()
        found: dict[str, Measured] = {
            f"valid/{name}": value for name, value in table.items() if name not in ("images", "texts")
        }
        if folder is None:
            return found
        sheet = _sheet_of_finds(pairs, images_ID, texts_TD, title=f"step {step:,}: the images that each text finds")
        save_png(folder / f"step-{step:08d}.png", sheet)
        return found | {"samples": sheet}

    return run


def _sheet_of_finds(pairs: ValidPairs, images_ID: Tensor, texts_TD: Tensor, *, title: str) -> Image.Image:
    """A column for each of some texts, with its own image and the best ones that it finds."""
    firsts = [int((pairs.image_of_T == image).nonzero()[0]) for image in pairs.image_of_T.unique()[:_SHOWN]]
    best_TK = (texts_TD[firsts] @ images_ID.T).topk(min(_FOUND, len(images_ID)), dim=1).indices.cpu()
    pixels = pairs.pixels_I3SS.permute(0, 2, 3, 1).numpy()
    rows = {"its image": [Cell(image=pixels[pairs.image_of_T[text]], caption=pairs.texts[text]) for text in firsts]}
    for place in range(best_TK.shape[1]):
        rows[f"found {place + 1}."] = [Cell(image=pixels[image]) for image in best_TK[:, place].tolist()]
    return comparison(rows, title=title)
