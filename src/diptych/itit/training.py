"""Training of ITIT: the stages of a run, from its sources to a folder that captions and generates images."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from diptych.data.pixels import SkippedItems, read_captioned
from diptych.data.sources import open_source
from diptych.data.store import DataTokenizers, Store
from diptych.data.streams import BatchSampler
from diptych.encoders import ImageEncoder, open_image_encoder
from diptych.errors import UserError
from diptych.eval.baselines import Baseline, Comparison, NearCaptions
from diptych.io import load_network
from diptych.itit.data import (
    ENCODING,
    TEACHER,
    DataConfig,
    DataSplit,
    Subset,
    TrainingInputs,
    count_captions,
    data_tokenizers,
    encode_subset,
    note_on_cut_texts,
    open_data,
    open_valid,
    store_of,
    within_budget,
)
from diptych.itit.evaluation import ALONE, PAIRS_ONLY, ScoredImages, compare
from diptych.itit.generation import GenerationConfig
from diptych.itit.model import ITIT, SIZES, ItitConfig
from diptych.itit.objective import AlignmentHead, ItitObjective, ItitObjectiveConfig
from diptych.itit.pipeline import NEAR_CAPTIONS, Diptych
from diptych.itit.validation import SHOWN, Samples
from diptych.nn.inference import computes_bf16, pick_device
from diptych.report.html import closing_line, outcome, validation_scores, write_run_report
from diptych.report.terminal import meaning_of, print_comparison
from diptych.run_folder import Kind, check_finished, kind_of, part_of, read_config, save_model, write_config
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.training import TEXT_ENCODER, TOKENIZER, TextEncoderStage, TokenizerStage
from diptych.train.checkpoint import BestWeights, Score
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first, wait_for_everyone
from diptych.train.logging import Measured
from diptych.train.loop import Hook, TrainResult, train
from diptych.train.pace import FEW_STEPS, Budget, Pace, RunPlan, StageCost

NETWORK = "ITIT"
"""Name of the last stage in the plan of a run."""
_PATCHES_COST, _TEXT_ENCODER_COST, _PAIRS_COST, _CYCLES_COST, _ENCODING_SHARE = 0.4, 0.7, 1.4, 5.0, 0.04
"""Cost of a step of a tokenizer without a network, of the text encoder, of ITIT before the cycles start and with them,
where one of a VQGAN costs 1; and of the encoding of all data, as a share of all training."""
_TRIED_ROWS = 8
"""Number of pairs of the steps that are timed to choose the network."""
_SIZE_FIELDS = (
    *("width", "depth", "heads", "image_decoder_depth", "mlp_ratio"),
    *("text_decoder_width", "text_decoder_depth", "text_decoder_heads"),
)
"""Fields of the network that say how large it is."""
_VALID_PER_MINUTE, _LEAST_VALID = 16, 16
"""Number of validation images for each minute of a budget, and at least."""
_MOST_PAIRS_ONLY = 8.0
"""Largest number of steps on pairs alone for each step of the run: they cost less than those with cycles."""
_LOOKED_AT = 2000
"""Number of texts whose length is looked at, spread over all."""
_WHITENED = 2000
"""Number of texts whose features decide the whitening."""
_IMAGES_FITTED = 3000
"""Number of captioned images that decide which image features belong to a text."""


@dataclass(kw_only=True, slots=True)
class ItitRun:
    """`diptych fit itit-*`: a network that captions images and generates images from texts."""

    kind: ClassVar[Kind] = "itit"
    slow_field: ClassVar[str | None] = "cycle_start_step"

    data: DataConfig
    """Sources of the pairs, the unpaired images and the unpaired texts, and how they are split."""
    tokenizer: str | None = None
    """Image tokenizer: a diffusers VQModel folder, an earlier run or a hub name. Default: one is trained first."""
    text_encoder: str | None = None
    """Text encoder: any of transformers, by folder, hub name, package or earlier run. Default: one is trained first."""
    image_encoder: str | None = None
    """Image encoder: a folder, hub name or package such as `package:efficientnet-lite0`. Captions are read from
    its features in the place of image tokens. Default: none, as in the paper."""
    teacher: str | None = None
    """Vision model, by folder, hub name or package such as `package:efficientnet-lite0`, with whose features those of
    the encoder are aligned while it trains, for all images, at the weight `objective.weights.teacher` (REPA). The
    trained network does not need it. Default: none, as in the paper."""
    init: str | None = None
    """Finished ITIT run whose weights the network begins with. Tokenizer, encoders and sizes are that run's too."""
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
    select: str = "cider"
    """Validation score by which the best weights are chosen, if `data.valid` is given: one of the names after `valid/`
    in metrics.jsonl, which each validation also prints."""
    compare: Literal["nothing", "pairs-only"] = "nothing"
    """Control to train after the run: `pairs-only` is the same network without unpaired data, trained for the same time
    (on top of a budget's) in the folder `pairs_only` of the run. It needs `data.valid`."""
    baseline_encoder: str | None = None
    """Pretrained image encoder, by folder, hub name or package, whose features also find the nearest images for the
    baselines that the run is compared with. Default: `image_encoder`; without one, histograms alone."""
    patience: int = 5
    """Number of validations in a row without a better one after which training ends, if `data.valid` is given."""

    def fit(self, out: Path, *, recipe: str, budget: Budget | None = None) -> TrainResult:
        """Run all stages; a stage that an earlier call has begun is resumed, and one that it has finished is skipped.

        ``budget`` sets the steps of each stage so that all of them end in its time. Leaves a run folder that needs
        nothing outside it. Raises UserError for settings or data that cannot be used.
        """
        run = self if self.init is None else self.with_parts_of(Path(self.init))
        run.check()
        run._check_run_folder(out)

        def report(state: str) -> None:
            write_run_report(out, state=state)

        plan = RunPlan(run.costs(), budget=Budget.of_run(out, budget), report=report)
        if plan.budget is not None:
            run = run._with_fewer_valid_images(plan.budget.minutes)
        comparison = run._baselines()
        if not all((out / part).is_dir() for part in run._frozen_parts()):
            # A repeat of a run that is killed below finds here which tokenizers were made.
            write_config(out, recipe=recipe, run=run)
        inputs = run.prepare(out, plan)
        run = run._with_affordable_network(lambda run: run.ready(inputs), plan)
        seconds = run._evaluation_seconds(inputs, out) if plan.budget is not None else 0.0
        run, pace = plan.fit_stage(NETWORK, run, out, lambda run: run.ready(inputs), evaluation_seconds=seconds)
        if plan.budget is not None and run.train.steps < FEW_STEPS:
            run = run.hurried()
        write_config(out, recipe=recipe, run=run, data=inputs.data_summary)
        trained = run._train_with_validation(inputs, out, pace=pace, report=report)
        result = trained.result
        if result.finished and comparison is not None:
            alone = run._train_pairs_only(inputs, out, seconds=result.seconds, images=trained.samples.images)
            comparison = replace(comparison, baselines=comparison.baselines + alone, scores=trained.scores(out))
        if result.finished and is_main_process():
            run._report_result(out, trained, comparison)
        return result

    def _train_with_validation(
        self,
        inputs: TrainingInputs,
        out: Path,
        *,
        pace: Pace,
        images: ScoredImages | None = None,
        title: str = NETWORK,
        report: Callable[[str], object] | None = None,
    ) -> "_Trained":
        """Train the network in ``out`` with samples and, on `--data.valid`, scores that select the weights.

        ``images`` are those of `--data.valid`, if they have been read before.
        """
        objective = self.build(inputs)
        samples = Samples(self.diptych(objective, inputs), inputs.encoded, self.data, out / "samples", images=images)
        best = BestWeights(out / "best", patience=self.patience) if self.data.valid else None
        hook = Hook(
            every=self.train.eval_every,
            run=partial(self._validate, samples, best),
            stop_early=best.is_over if best is not None else None,
        )
        result = self.train_on(inputs, objective, out, hooks=[hook], title=title, pace=pace, best=best, report=report)
        return _Trained(result=result, objective=objective, samples=samples, best=best)

    def _report_result(self, out: Path, trained: "_Trained", comparison: Comparison | None) -> None:
        """Write the report of a finished run and its comparison; print both in short."""
        objective, best = trained.objective, trained.best
        if comparison is not None:
            comparison.write(out)
        with trained.result.eval_mode(objective):
            write_run_report(out, samples=trained.samples.sections())
        if comparison is not None:
            title = f"{out} beside its baselines on {comparison.source}"
            print_comparison(*comparison.table(), title=title, notes=[*comparison.notes, comparison.verdict()])
        step = best.score.step if best is not None and best.score is not None else None
        score = outcome(out, step=step, select=self.select, source=self.data.valid)
        print(closing_line(out, self.kind, score=score), flush=True)

    def _validate(
        self, samples: Samples, best: BestWeights | None, step: int, objective: nn.Module
    ) -> dict[str, Measured]:
        """A hook's function: samples, and scores that are offered to ``best``."""
        found = samples.run(step, objective)
        if best is not None:
            value = found.get(f"valid/{self.select}")
            if not isinstance(value, float | int):
                names = ", ".join(name.removeprefix("valid/") for name in found if name.startswith("valid/"))
                raise UserError(f"--select {self.select}: no score of that name; there are {names}")
            sign = -1 if meaning_of(self.select).better == "lower" else 1
            best.offer(Score(step=step, value=sign * value), objective)
        return found

    def with_parts_of(self, run: Path) -> "ItitRun":
        """This run with the tokenizer, the encoders and the sizes of a finished one; dropout stays its own.

        Raises UserError where ``run`` is no finished ITIT run.
        """
        check_finished(run, "itit")
        sizes = load_network(ITIT, run / "model").config
        image_encoder = run / "image_encoder"
        return replace(
            self,
            tokenizer=str(run / "tokenizer"),
            text_encoder=str(run / "text_encoder"),
            image_encoder=str(image_encoder) if image_encoder.is_dir() else None,
            model=replace(sizes, dropout=self.model.dropout),
        )

    def check(self) -> None:
        """Raise UserError for combinations of fields that no stage would notice early."""
        start, steps = self.objective.cycle_start_step, self.train.steps
        if self._has_cycles and start >= steps:
            raise UserError(
                f"--objective.cycle-start-step {start} is not before --train.steps {steps}, "
                "so unpaired data would never be used: lower it, or switch --objective.texts and .images off"
            )

        if self.teacher is not None and not self.objective.weights.teacher:
            raise UserError("--teacher teaches nothing: --objective.weights.teacher is 0; raise it, or leave both away")
        if self.compare == "pairs-only" and not (self._has_cycles and self.data.valid):
            lacks = "--data.valid to compare on" if self._has_cycles else "unpaired data, so it is that control"
            raise UserError(f"--compare pairs-only: the run has no {lacks}")

    def _baselines(self) -> Comparison | None:
        """What the run is compared with on `--data.valid`, printed ahead of any training; None without it."""
        if self.data.valid is None or not is_main_process():
            return None
        source = open_source(self.data.valid, columns=self.data.columns)
        skipped = SkippedItems(max_skipped_share=self.data.max_skipped_share)
        items, _ = read_captioned(source, limit=self.data.valid_images, size=1, skipped=skipped)
        comparison = compare(
            self.data, source, items, encoder=self.baseline_encoder or self.image_encoder, select=self.select
        )
        print_comparison(*comparison.table(), title=f"to beat on {source.name}", notes=comparison.notes)
        return comparison

    def pairs_only(self) -> "ItitRun":
        """The same run without unpaired data."""
        weights = replace(self.objective.weights, t2t=0.0, unpaired_i2i=0.0)
        objective = replace(self.objective, texts="off", images="off", weights=weights)
        train = replace(self.train, epochs=None)  # the steps are there, and a control trains for a time
        return replace(self, objective=objective, compare="nothing", train=train)

    def _frozen_parts(self) -> tuple[str, ...]:
        """Folders of what is frozen in a run."""
        return ("tokenizer", "text_encoder", *(["image_encoder"] if self.image_encoder else []))

    def _train_pairs_only(
        self, inputs: TrainingInputs, out: Path, *, seconds: float, images: ScoredImages | None
    ) -> list[Baseline]:
        """The network trained on the pairs alone for ``seconds``, as a row of the comparison; none if not asked for."""
        if self.compare == "nothing":
            return []
        folder = out / PAIRS_ONLY
        budget = Budget.of_run(folder, None) or Budget.of_run(folder, Budget.for_stage(seconds))
        run, pace = RunPlan([replace(self.pairs_only().costs()[-1], name=ALONE)], budget=budget).fit_stage(
            ALONE, self.pairs_only(), folder, lambda run: run.ready(inputs), most=_MOST_PAIRS_ONLY
        )
        write_config(folder, recipe="itit pairs only", run=run)
        for part in self._frozen_parts():
            shutil.copytree(out / part, folder / part, dirs_exist_ok=True)
        trained = run._train_with_validation(inputs, folder, pace=pace, images=images, title=ALONE)
        return [Baseline(name=ALONE, scores=trained.scores(folder), kind="without unpaired data")]

    def _with_fewer_valid_images(self, minutes: float) -> "ItitRun":
        """This run with as many validation images as a budget of ``minutes`` has time to score."""
        fits = max(_LEAST_VALID, int(_VALID_PER_MINUTE * minutes))
        if self.data.valid is None or fits >= self.data.valid_images:
            return self
        print(f"validation: {fits:,} of {self.data.valid_images:,} images fit into the budget", flush=True)
        return replace(self, data=replace(self.data, valid_images=fits))

    def _with_affordable_network(
        self, make: Callable[["ItitRun"], tuple[ItitObjective, BatchSampler]], plan: RunPlan
    ) -> "ItitRun":
        """This run, or with a network as small as that of `itit-tiny` where hardly any steps of its own would fit.

        ``make`` gives the objective and the batches of a run.
        """
        tiny = {name: getattr(SIZES["tiny"], name) for name in _SIZE_FIELDS}
        if self.init is not None or self.model.width <= tiny["width"]:
            return self
        instead = "a network as small as that of itit-tiny is trained"
        if not plan.too_short(NETWORK, self.pairs_only(), make, rows=_TRIED_ROWS, instead=instead):
            return self
        return replace(self, model=replace(self.model, **tiny))

    def _evaluation_seconds(self, inputs: TrainingInputs, out: Path) -> float:
        """The seconds of an evaluation, estimated by one with few images."""
        few = min(SHOWN, self.data.valid_images)
        data = replace(self.data, valid_images=few)
        objective = self.build(inputs)
        samples = Samples(self.diptych(objective, inputs), inputs.encoded, data, out / "samples")
        began = time.monotonic()
        samples.run(0, objective)
        seconds = time.monotonic() - began
        # Beside the images that are scored there are those that are shown.
        return seconds if self.data.valid is None else seconds * (SHOWN + self.data.valid_images) / (SHOWN + few)

    def hurried(self) -> "ItitRun":
        """This run with the settings of `itit-tiny`, with which a network learns most in a few hundred steps.

        They are initial weights by fan-in, embeddings that learn faster, and twice the learning rate. After 150 steps
        of itit-small on 600 pairs captions consist of words instead of a single `a` (docs/log.md).
        """
        scale = max(4.0, self.objective.embedding_lr_scale)
        return replace(
            self,
            model=replace(self.model, init="fan_in"),
            objective=replace(self.objective, embedding_lr_scale=scale),
            optim=replace(self.optim, lr=max(self.optim.lr, 2e-3)),
        )

    def costs(self) -> list[StageCost]:
        """The cost of each stage relative to the others. A stage whose network is given costs nothing.

        Measured with itit-small on one core with AVX2 (docs/log.md).
        """
        stages = [
            StageCost(
                name=TOKENIZER,
                steps=self.tokenizer_stage.train.steps if self.tokenizer is None else 0,
                step_cost=1.0 if self.tokenizer_stage.model.widths else _PATCHES_COST,
            ),
            StageCost(
                name=TEXT_ENCODER,
                steps=self.text_encoder_stage.train.steps if self.text_encoder is None else 0,
                step_cost=_TEXT_ENCODER_COST,
            ),
        ]
        network = StageCost(
            name=NETWORK,
            steps=self.train.steps,
            step_cost=_PAIRS_COST,
            slow_from=self.slow_from,
            slow_cost=_CYCLES_COST if self._has_cycles else None,
        )
        training = sum(stage.all for stage in (*stages, network))
        return [*stages, StageCost(name=ENCODING, steps=1, step_cost=_ENCODING_SHARE * training), network]

    @property
    def slow_from(self) -> int:
        """First step with cycles."""
        return self.objective.cycle_start_step if self._has_cycles else 0

    @property
    def _has_cycles(self) -> bool:
        """Whether the network learns from unpaired data in cycles."""
        return (self.objective.texts, self.objective.images) != ("off", "off")

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
        changed = [
            part
            for part, stage in (("tokenizer", "tokenizer_stage"), ("text_encoder", "text_encoder_stage"))
            if (out / part).is_dir() and (before[part], before[stage]["model"]) != (now[part], now[stage]["model"])
        ]
        changed += [part for part in ("image_encoder", "teacher") if before.get(part) != now[part]]
        if changed:
            raise UserError(f"{out}: begun with another {changed[0]}: give the same one, or train into another folder")

    # The stages before the network's training

    def prepare(self, out: Path, plan: RunPlan | None = None) -> TrainingInputs:
        """Open the data, get the tokenizer and the text encoder, and encode the data with both, all in ``out``."""
        join_processes(self.train.device)
        plan = plan or RunPlan(self.costs())
        data = open_data(self.data)
        data_summary = data.check(open_valid(self.data), max_skipped_share=self.data.max_skipped_share)
        if is_main_process():
            print(data_summary, flush=True)
        # Parts that are given are opened first, so that their faults are reported before anything is trained.
        image_encoder = _copied_encoder(self.image_encoder, out / "image_encoder")
        teacher = _copied_encoder(self.teacher, out / TEACHER)
        given = None if self.text_encoder is None else self._text_encoder(data, out, plan)
        tokenizer = self._tokenizer(data, out, plan)
        text_encoder = given or self._text_encoder(data, out, plan)
        encoded = self._encode(data, tokenizer, text_encoder, image_encoder, teacher, out, plan)
        if computes_bf16(torch.device(pick_device(self.train.device)), self.train.precision):
            text_encoder.to(torch.bfloat16)  # after the encoding: what is stored does not depend on the precision
        return TrainingInputs(tokenizer, text_encoder, encoded, image_encoder, data_summary)

    def _tokenizer(self, data: DataSplit, out: Path, plan: RunPlan) -> ImageTokenizer:
        """The image tokenizer in ``out``; if there is none yet, the given one is copied there or one is trained."""
        if _is_missing(out / "tokenizer"):
            if self.tokenizer is not None:
                made = ImageTokenizer.from_pretrained(part_of(self.tokenizer, "tokenizer"))
            else:
                folder, share = out / "stages" / "tokenizer", self.data.max_skipped_share
                images = data.raw_images()
                made = self.tokenizer_stage.fit(
                    images, folder, title="1/3 tokenizer", max_skipped_share=share, plan=plan
                )
            _save_once(made, out / "tokenizer")
        return ImageTokenizer.from_pretrained(out / "tokenizer")

    def _text_encoder(self, data: DataSplit, out: Path, plan: RunPlan) -> TextEncoder:
        """The text encoder in ``out``; if there is none yet, the given one is copied there or one is trained."""
        if _is_missing(out / "text_encoder"):
            if self.text_encoder is not None:
                made = TextEncoder.from_pretrained(part_of(self.text_encoder, "text_encoder"), texts=data.raw_texts())
            else:
                folder = out / "stages" / "text_encoder"
                made = self.text_encoder_stage.fit(data.raw_texts(), folder, title="2/3 text encoder", plan=plan)
            _save_once(made, out / "text_encoder")
        text_encoder = TextEncoder.from_pretrained(out / "text_encoder")
        text_encoder.feature_kind = self.model.text_input
        longest, length = text_encoder.longest, self.model.max_text_len
        if longest is not None and length > longest:
            raise UserError(f"--model.max-text-len {length}: the text encoder reads {longest} tokens of a text at most")
        return text_encoder

    def _encode(
        self,
        data: DataSplit,
        tokenizer: ImageTokenizer,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder | None,
        teacher: ImageEncoder | None,
        out: Path,
        plan: RunPlan,
    ) -> DataSplit:
        """Image tokens, text ids and image features of all data, and the text features if they are small enough."""
        device, length = pick_device(self.train.device), self.model.max_text_len
        tokenizer, text_encoder = tokenizer.to(device), text_encoder.to(device)
        image_encoder = image_encoder if image_encoder is None else image_encoder.to(device)
        teacher = teacher if teacher is None else teacher.to(device)
        captions = count_captions(data.texts) + (0 if data.texts is data.pairs else count_captions(data.pairs))
        features_mb = captions * length * text_encoder.width * 2 / 2**20
        cached = features_mb <= self.data.feature_cache_mb
        make = partial(data_tokenizers, tokenizer, text_encoder, length=length)
        both = make(image_encoder=image_encoder, teacher=teacher)
        with_features = make(features=cached, image_encoder=image_encoder, teacher=teacher)
        data = within_budget(data, with_features, plan, seed=self.data.split_seed)

        plan.show(ENCODING)

        def encode(subset: Subset, name: str, tokenizers: DataTokenizers) -> Subset:
            advance = _progress(name, shown=plan.bar is None)
            with main_process_first():
                folder = out / "encoded" / name
                return encode_subset(subset, folder, tokenizers, data=self.data, advance=advance)

        pairs = images = texts = encode(data.pairs, "pairs", with_features)
        if data.images is not data.pairs:
            images = encode(data.images, "images", replace(both, tokenize_texts=None))
        if data.texts is not data.pairs:
            of_texts = replace(with_features, tokenize_images=None, image_features=None, teacher_features=None)
            texts = encode(data.texts, "texts", of_texts)
        if is_main_process():
            for subset in (data.pairs,) if data.texts is data.pairs else (data.pairs, data.texts):
                self._warn_of_long_texts(subset, text_encoder)
        return DataSplit(pairs=pairs, images=images, texts=texts)

    def _warn_of_long_texts(self, subset: Subset, text_encoder: TextEncoder) -> None:
        """Say how many texts are cut off, of data that is not encoded yet."""
        if isinstance(subset.source, Store):
            return
        some = subset.items[:: max(1, len(subset.items) // _LOOKED_AT)]
        texts = [text for item in some for text in subset.source.captions(int(item))]
        if note := note_on_cut_texts(texts, text_encoder, length=self.model.max_text_len):
            print(f"{note}; raise --model.max-text-len", file=sys.stderr, flush=True)

    # The network and its training

    def ready(self, inputs: TrainingInputs) -> tuple[ItitObjective, BatchSampler]:
        """The network with its objective, and the batches that it learns from."""
        objective = self.build(inputs)
        return objective, self.batches(inputs, objective)

    def batches(self, inputs: TrainingInputs, objective: ItitObjective) -> BatchSampler:
        """The batches of the encoded data."""
        seed, data = self.train.seed, inputs.encoded
        return BatchSampler(
            {
                "pairs": store_of(data.pairs).pairs(data.pairs.items, seed=seed),
                "images": store_of(data.images).images(data.images.items),
                "texts": store_of(data.texts).texts(data.texts.items),
            },
            multiples=objective.streams,
            batch_size=self.train.batch_size,
            seed=seed,
        )

    def build(self, inputs: TrainingInputs) -> ItitObjective:
        """The network with its objective; its initial weights are those of ``init``, or follow from ``train.seed`` and,
        if they are whitened, the text features."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            model = self.model.build(inputs.tokenizer, inputs.text_encoder, inputs.image_encoder)
            if self.init is not None:
                model.load_state_dict(load_network(ITIT, Path(self.init) / "model").state_dict())
            else:
                if model.image_features is not None:
                    model.image_features.fit(*inputs.image_and_text_features(images=_IMAGES_FITTED))
                if model.config.whiten_text:
                    model.fit_whitening(inputs.text_features(texts=_WHITENED))
            head = None
            if self.teacher is not None:
                head = AlignmentHead(inputs.teacher_features(images=_IMAGES_FITTED), width=model.config.width)
            return ItitObjective(model, inputs.text_encoder, self.objective, teacher_head=head)

    def _near_captions(self, model: ITIT, inputs: TrainingInputs) -> NearCaptions | None:
        """The captions of the consensus by which others are ranked; None where there is no consensus to compute.

        Unpaired texts are among them if the run learns from them.
        """
        reader = model.image_features
        if reader is None or not self.generation.text.consensus:
            return None
        captions, features_TG = inputs.captions_and_features
        if self.objective.texts == "off" or inputs.encoded.texts is inputs.encoded.pairs:
            return NearCaptions(captions, features_TG)
        texts, means_UF = inputs.texts_and_features
        expected_UG = reader.expected(means_UF.to(reader.mean_G.device)).cpu().numpy()
        return NearCaptions(captions, features_TG, texts=texts, expected_UF=expected_UG)

    def diptych(self, objective: ItitObjective, inputs: TrainingInputs) -> Diptych:
        """The network in training as a pipeline, which captions and generates with its present weights."""
        return Diptych(
            inputs.tokenizer,
            inputs.text_encoder,
            objective.model,
            image_encoder=inputs.image_encoder,
            near_captions=self._near_captions(objective.model, inputs),
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
        pace: Pace | None = None,
        best: BestWeights | None = None,
        report: Callable[[str], object] | None = None,
    ) -> TrainResult:
        """Train on the encoded data, and save the network in ``out/model``: with the weights of ``best``, if any."""
        data = inputs.encoded
        subsets = {"pairs": data.pairs, "images": data.images, "texts": data.texts}
        identity = {
            "model": asdict(objective.model.config),
            "objective": asdict(self.objective),
            "data": {
                name: {"count": len(each.items), **store_of(each).manifest["made_by"]} for name, each in subsets.items()
            },
        }
        result = train(
            objective,
            self.batches(inputs, objective),
            out=out,
            train=self.train,
            optim=self.optim,
            hooks=hooks,
            title=title,
            identity=identity,
            pace=pace,
            report=report,
        ).with_best(best, objective)
        with result.eval_mode(objective):
            if is_main_process():
                if near := self._near_captions(objective.model, inputs):
                    save_model(near, out / NEAR_CAPTIONS)
                save_model(objective.model, out / "model")
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """A network after its training, with its samples and best weights."""

    result: TrainResult
    objective: ItitObjective
    samples: Samples
    best: BestWeights | None
    """The selected weights; None without `--data.valid`."""

    def scores(self, out: Path) -> dict[str, float]:
        """The validation scores of the selected weights, from the run folder."""
        assert self.best is not None
        assert self.best.score is not None
        return validation_scores(out, self.best.score.step)


def _is_missing(folder: Path) -> bool:
    """Whether no process has made ``folder`` yet. All processes return the same: each waits until all have looked."""
    missing = not folder.is_dir()
    wait_for_everyone()
    return missing


def _save_once(made: ImageTokenizer | TextEncoder | ImageEncoder, folder: Path) -> None:
    """Save in the main process; the others wait, because every process reads the saved files."""
    if is_main_process():
        save_model(made, folder)
    wait_for_everyone()


def _copied_encoder(name: str | None, folder: Path) -> ImageEncoder | None:
    """The image encoder in ``folder``, where the one of this name is copied first; None if none is given."""
    if name is None:
        return None
    if _is_missing(folder):
        _save_once(open_image_encoder(name), folder)
    return open_image_encoder(folder)


def _progress(name: str, *, shown: bool) -> Callable[[int, int], None]:
    """Prints, if it is to be ``shown``, one line that counts in a terminal; elsewhere only its end."""

    def advance(done: int, total: int) -> None:
        if not shown:
            return
        if done == total or sys.stdout.isatty():
            print(f"\r3/3 encoding {name}: {done:,} of {total:,}", end="\n" if done == total else "", flush=True)

    return advance
