"""Training supervised UML: a classifier of images that also learns from texts about their classes.

    UmlRun        the run: data, encoders, classifier, loss, training
    start_head    the classifier at its start
    BestWeights   which weights are kept: those of the best validation accuracy

Shapes: N images, D width of their features, C classes.
"""

import copy
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diptych.data.augment import ViewConfig
from diptych.data.check import Part, check_parts, content_digest
from diptych.data.class_texts import Shots, are_codes, texts_of
from diptych.data.pixels import SkippedItems, channels_first, image_batches, read_image
from diptych.data.sources import open_finite
from diptych.data.sources.columns import Columns
from diptych.data.splits import Episode, Labelled, draw_episode, hold_out
from diptych.data.streams import BatchSampler
from diptych.encoders import ImageEncoder, ScratchConfig, open_image_encoder, open_text_encoder, scratch_encoder
from diptych.encoders.image import ImagePooling
from diptych.encoders.text import TextPooling
from diptych.errors import UserError
from diptych.eval.baselines import HISTOGRAMS, ClassBaselines, Comparison, sampled
from diptych.nn.inference import eval_mode, pick_device
from diptych.report.html import closing_line, validation_scores, write_run_report
from diptych.report.sheet import contact_sheet, save_png
from diptych.report.terminal import print_comparison
from diptych.rng import derive_seed
from diptych.run_folder import CLASS_BASELINES, Kind, save_model, write_config, write_json
from diptych.train.checkpoint import BestWeights, Score
from diptych.train.config import FILES, OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first
from diptych.train.logging import Measured
from diptych.train.loop import Hook, TrainResult, train
from diptych.train.pace import Budget, RunPlan, StageCost
from diptych.uml.classifier import (
    SAME_FEATURES,
    ScoredLabelledImages,
    compare_classifier,
    histograms_of,
    score_classifier,
)
from diptych.uml.data import (
    IMAGE,
    TEXT,
    LabelledFeatures,
    LabelledImages,
    class_text_features,
    encoder_identity,
    labelled_image_features,
    read_features,
)
from diptych.uml.objective import Init, SharedHead, SharedHeadConfig, UmlConfig, UmlObjective

_TIMED = 16
"""Number of images whose features are timed."""
_FEATURES_SHARE = 0.6
"""Share of a budget that the features of images take at most."""
_SHOWN = 8
"""Number of images in the report."""


@dataclass(kw_only=True, slots=True)
class UmlData:
    """Sources of the labelled images and of the texts about their classes, and how the images are split."""

    images: str
    """Source of labelled images: a folder with a folder for each class, or any source with labels."""
    valid: str | None = None
    """Source of labelled images on which the best weights are selected; if not given, some of `images`."""
    valid_share: float = 0.1
    """Share of the images of each class that is held back to select the weights, if neither `valid` nor `shots` is
    given."""
    shots: int | None = None
    """Number of random images of each class to learn from, and min(4, shots) others to select on; if not given, all."""
    texts: str | None = None
    """Texts about the classes: a JSON file {class: [sentence, ...]} or a folder of CLASS.txt; if not given, the
    templates."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Templates of texts, with {} for the name of the class, which are used if no texts are given."""
    text_shots: Shots = "all"
    """Texts of each class to learn from: a number of random ones, `all`, or `mean`, the mean of all their features."""
    features: Path | None = None
    """Features of `images` that `encoder` gave elsewhere, a row for each image in the order of the source: a .npy file,
    or a .parquet file with a column `features`. If not given, they are computed."""
    cache: Path | None = None
    """Folder for the features of frozen encoders, which runs may share; if not given, one in the run folder."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns that cannot be guessed."""
    workers: int = 2
    """Number of threads that decode images."""
    cache_mb: int = 1024
    """Memory for decoded images of a tuned encoder, in MiB; if all of them take more, they are decoded every epoch."""
    max_skipped_share: float = 0.01
    """Largest share of unreadable images that is left out without stopping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Which images a run learns from and which it selects on."""

    labelled: Labelled
    train: np.ndarray
    """Items of ``labelled`` to learn from."""
    valid_labelled: Labelled
    valid: np.ndarray
    """Items of ``valid_labelled`` to select on."""


@dataclass(kw_only=True, slots=True)
class UmlRun:
    """Supervised UML, as `diptych fit uml-probe` and `diptych fit uml-finetune` train it."""

    kind: ClassVar[Kind] = "classifier"
    slow_field: ClassVar[str | None] = None

    data: UmlData
    """Images and texts to learn from."""
    encoder: str
    """Image encoder: a folder or hub name of transformers, an ITIT, dual or classifier run, or `scratch` for a new
    one."""
    text_encoder: str
    """Text encoder, always frozen: a folder or hub name of transformers, or a dual, ITIT or text encoder run."""
    pooling: ImagePooling = "auto"
    """Pooling of an image's tokens to one vector; auto is the encoder's own."""
    text_pooling: TextPooling = "auto"
    """Pooling of a text's tokens to one vector; auto is CLIP's shared embedding, else the mean; last suits decoders."""
    train_encoder: Literal["frozen", "tuned"] = "frozen"
    """Training of the image encoder: `frozen` learns the classifier from cached features, `tuned` trains both."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """Architecture of the new image encoder, if `encoder` is `scratch`."""
    view: ViewConfig = field(default_factory=ViewConfig)
    """Random views of the images for a tuned encoder; a frozen one is given every image once, as it is."""
    head: SharedHeadConfig = field(default_factory=SharedHeadConfig)
    """Architecture of the classifier; its widths and classes follow from the encoders and the data."""
    objective: UmlConfig = field(default_factory=UmlConfig)
    """Loss and start of the classifier."""
    patience: int = 10
    """Number of validations in a row without a better one after which training ends."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Settings of the optimizer."""

    def fit(self, out: Path, *, recipe: str, budget: Budget | None = None) -> TrainResult:
        """Train in the run folder ``out``, or go on there.

        A finished run leaves ``out/encoder``, ``out/head`` and ``out/classes.json``, which classify without any text.
        Raises UserError for fields or data that cannot be trained with.
        """
        self.check()
        join_processes(self.train.device)
        plan = RunPlan([StageCost(name=recipe, steps=self.train.steps)], budget=Budget.of_run(out, budget))
        labelled = Labelled.of(open_finite(self.data.images, self.data.columns))
        if len(labelled.classes) < 2:
            raise UserError(
                f"{self.data.images}: all images are of the class {labelled.classes[0]!r}; a classifier needs two"
            )
        summary = check_parts(
            [Part("labelled image", labelled.source, range(len(labelled.labels_N)))],
            max_skipped_share=self.data.max_skipped_share,
        )
        if is_main_process():
            print(f"{summary}; {len(labelled.classes)} classes", flush=True)
        encoder = self._open_encoder().to(pick_device(self.train.device))
        texts = self._texts(labelled.classes, cache=self.data.cache or out / "features")
        skipped, skipped_valid = (SkippedItems(max_skipped_share=self.data.max_skipped_share) for _ in range(2))
        share = self._affordable_share(labelled, encoder, plan.budget)
        parts = self._split(labelled, share)
        cache = self.data.cache or out / "features"
        images, valid = self._images(parts, encoder, cache=cache, skipped=skipped, skipped_valid=skipped_valid)
        comparison = self._baselines(parts, images, valid, out=out) if is_main_process() else None

        def make(run: UmlRun, encoder: ImageEncoder) -> tuple[UmlObjective, BatchSampler]:
            objective = run.build(encoder, images, texts, classes=len(labelled.classes))
            streams = {IMAGE: images.stream(), TEXT: texts.stream()}
            rows, seed = run.train.batch_size, run.train.seed
            return objective, BatchSampler(streams, multiples=objective.streams, batch_size=rows, seed=seed)

        # Trial steps change a tuned encoder. More steps than the recipe's are of no use, as patience ends the run.
        run, pace = plan.fit_stage(recipe, self, out, lambda run: make(run, copy.deepcopy(encoder)), most=1.0)
        write_config(out, recipe=recipe, run=run, data=summary)
        objective, batches = make(run, encoder)

        def report(state: str) -> None:
            write_run_report(out, state=state)

        best = BestWeights(out / "best", patience=self.patience)
        hook = Hook(every=run.train.eval_every, run=_validation(valid, best), stop_early=best.is_over)
        result = train(
            objective,
            batches,
            out=out,
            train=run.train,
            optim=run.optim,
            hooks=[hook],
            title=recipe,
            identity=self._identity(objective, encoder, images, texts) | {FILES: content_digest(labelled.source)},
            pace=pace,
            report=report,
        )
        if is_main_process():
            for line in skipped.report(out / "skipped.jsonl") + skipped_valid.report(out / "skipped_valid.jsonl"):
                print(line, file=sys.stderr)
        if result.finished and is_main_process():
            _finish(out, objective, encoder, labelled, best, comparison)
        return result

    def _baselines(
        self,
        parts: Parts,
        images: LabelledFeatures | LabelledImages,
        valid: LabelledFeatures | ScoredLabelledImages,
        *,
        out: Path,
    ) -> Comparison:
        """Baselines on the images to select on; fitted, printed ahead of any training, and kept in the run folder."""
        classes = len(parts.labelled.classes)
        known = {
            HISTOGRAMS: (
                histograms_of(parts.labelled, sampled(parts.train)),
                histograms_of(parts.valid_labelled, parts.valid),
            )
        }
        if isinstance(images, LabelledFeatures) and isinstance(valid, LabelledFeatures):
            known = {SAME_FEATURES: (images.tensors(), valid.tensors())} | known
        baselines = ClassBaselines.fit(known, classes=classes)
        baselines.save(out / CLASS_BASELINES)
        selected = "The l2 penalties were chosen on these images, as the weights of the run are."
        scored = {name: features for name, (_, features) in known.items()}
        source = self.data.valid or self.data.images
        comparison = compare_classifier(baselines, scored, source=source, notes=[selected])
        print_comparison(*comparison.table(), title=f"to beat on {source}", notes=[])
        return comparison

    @property
    def slow_from(self) -> int:
        """0: all steps take the same time."""
        return 0

    def check(self) -> None:
        """Raise UserError for combinations of fields that would fail late or train nothing."""
        if self.train_encoder == "frozen" and self.encoder == "scratch":
            raise UserError("a new encoder that stays frozen has learnt nothing: give --encoder, or fit uml-finetune")
        if self.train_encoder == "tuned" and self.head.features in ("centred", "standard"):
            wanted = self.head.features
            raise UserError(
                f"--head.features {wanted} needs features that stay as they are: take unit for a tuned encoder"
            )
        if self.train_encoder == "tuned" and self.data.features is not None:
            raise UserError("--data.features are of an encoder that stays as it is: leave them away to tune it")
        if self.objective.aux_weight < 0:
            raise UserError(f"--objective.aux-weight is {self.objective.aux_weight}; it must be 0 or more")

    def build(
        self, encoder: ImageEncoder, images: LabelledFeatures | LabelledImages, texts: LabelledFeatures, *, classes: int
    ) -> UmlObjective:
        """The classifier with its loss; its initial weights follow from ``train.seed``, the images and the texts."""
        widths = {IMAGE: encoder.width, TEXT: texts.vectors_ND.shape[1]}
        config = replace(self.head, widths=widths, anchor=TEXT, classes=classes)
        known = images.tensors()[0] if isinstance(images, LabelledFeatures) else None
        head = start_head(config, known, texts.tensors(), init=self.objective.init, seed=self.train.seed)
        if self.train_encoder == "tuned":
            return UmlObjective(head, self.objective, target=IMAGE, encoder=encoder, view=self.view)
        return UmlObjective(head, self.objective, target=IMAGE)

    def _texts(self, classes: tuple[str, ...], *, cache: Path) -> LabelledFeatures:
        if self.data.texts is None and are_codes(classes) and is_main_process():
            print(
                f"the labels are codes ({', '.join(classes[:3])}), and the templates put them into the texts as they "
                'are: give --data.texts FILE, a JSON object {"label": ["sentence", ...]}',
                file=sys.stderr,
            )
        texts = texts_of(self.data.texts, classes, templates=self.data.templates)
        encoder = open_text_encoder(self.text_encoder, pooling=self.text_pooling).to(pick_device(self.train.device))
        with main_process_first():
            return class_text_features(encoder, texts, shots=self.data.text_shots, cache=cache, seed=self.train.seed)

    def _open_encoder(self) -> ImageEncoder:
        if self.encoder == "scratch":
            return scratch_encoder(self.scratch, seed=self.train.seed)
        return open_image_encoder(self.encoder, pooling=self.pooling)

    def _images(
        self, parts: Parts, encoder: ImageEncoder, *, cache: Path, skipped: SkippedItems, skipped_valid: SkippedItems
    ) -> tuple[LabelledFeatures | LabelledImages, LabelledFeatures | ScoredLabelledImages]:
        """Images to learn from and images to select on."""
        data, size = self.data, encoder.image_size

        def features(part: Labelled, items: np.ndarray, skipped: SkippedItems) -> LabelledFeatures:
            if data.features is not None and part is parts.labelled:
                vectors_ND = read_features(data.features, rows=len(part.labels_N), width=encoder.width)[items]
                return LabelledFeatures(vectors_ND=np.asarray(vectors_ND, np.float32), labels_N=part.labels_N[items])
            with main_process_first():
                return labelled_image_features(encoder, part, items, cache=cache, skipped=skipped, workers=data.workers)

        labelled, valid = parts.labelled, parts.valid_labelled
        if self.train_encoder == "frozen":
            return features(labelled, parts.train, skipped), features(valid, parts.valid, skipped_valid)
        options: dict[str, Any] = {"size": size, "cache_mb": data.cache_mb}
        scored = ScoredLabelledImages(valid, parts.valid, skipped=skipped_valid, workers=data.workers, **options)
        return LabelledImages(labelled, parts.train, skipped=skipped, **options), scored

    def _split(self, labelled: Labelled, share: float) -> Parts:
        """Items to learn from and to select on: ``share`` of those of each class."""
        episode = self._episode(labelled)
        train, valid = self._some(labelled, episode.train, share), self._some(labelled, episode.valid, share)
        if self.data.valid is None:
            return Parts(labelled=labelled, train=train, valid_labelled=labelled, valid=valid)
        other = Labelled.of(open_finite(self.data.valid, self.data.columns), labelled.classes)
        every = np.arange(len(other.labels_N))
        return Parts(labelled=labelled, train=train, valid_labelled=other, valid=every)

    def _some(self, labelled: Labelled, items: np.ndarray, share: float) -> np.ndarray:
        """``share`` of ``items`` of each class, at random and at least one."""
        if share >= 1:
            return items
        generator = np.random.Generator(np.random.PCG64(derive_seed(self.train.seed, "budget")))
        labels = labelled.labels_N[items]
        kept = [generator.permutation(items[labels == label]) for label in np.unique(labels)]
        return np.sort(np.concatenate([each[: max(1, int(share * len(each)))] for each in kept]))

    def _affordable_share(self, labelled: Labelled, encoder: ImageEncoder, budget: Budget | None) -> float:
        """Share of the images whose features a budget has time for; 1 for an encoder that is trained."""
        if budget is None or self.train_encoder == "tuned" or self.data.features is not None:
            return 1.0

        def decide() -> float:
            skipped = SkippedItems(max_skipped_share=1.0)
            tried = np.linspace(0, len(labelled.source) - 1, min(_TIMED, len(labelled.source))).astype(int)
            began = time.monotonic()
            for pixels, _ in image_batches(labelled.source, tried, size=encoder.image_size, skipped=skipped):
                with eval_mode(encoder):
                    encoder(pixels.to(pick_device(self.train.device)))
            each = (time.monotonic() - began) / len(tried)
            return min(1.0, _FEATURES_SHARE * budget.left() / (each * len(labelled.source)))

        share = budget.decision("features", decide)
        if share < 1:
            print(f"features of {share:.0%} of the images fit into --minutes {budget.minutes:g}", flush=True)
        return share

    def _episode(self, labelled: Labelled) -> Episode:
        """Which images to learn from, and which to select on."""
        labels_N, classes, seed = labelled.labels_N, labelled.classes, self.train.seed
        if self.data.shots is not None:
            return draw_episode(labels_N, self.data.shots, seed=seed, classes=classes)
        if self.data.valid is None:
            return hold_out(labels_N, self.data.valid_share, seed=seed, classes=classes)
        return Episode(train=np.arange(len(labels_N)), valid=np.arange(0))

    def _identity(
        self,
        objective: UmlObjective,
        encoder: ImageEncoder,
        images: LabelledFeatures | LabelledImages,
        texts: LabelledFeatures,
    ) -> dict[str, Any]:
        """What the losses depend on besides the loop's own fields; a resumed run must have the same."""
        return {
            "head": asdict(objective.head.config),
            "objective": asdict(self.objective),
            "view": asdict(self.view),
            "encoder": encoder_identity(encoder),
            "text_encoder": self.text_encoder,
            "labels": {IMAGE: _digest(images.labels_N), TEXT: _digest(texts.labels_N)},
        }


def _digest(labels_N: np.ndarray) -> str:
    """A digest of all labels, 16 hexadecimal digits."""
    return hashlib.sha256(labels_N.astype("<i8").tobytes()).hexdigest()[:16]


def start_head(
    config: SharedHeadConfig, images_ND: Tensor | None, texts: tuple[Tensor, Tensor], *, init: Init, seed: int
) -> SharedHead:
    """A new classifier, whose random weights follow from ``seed`` alone.

    Its statistics are those of ``images_ND``, which is None for features that will change, and of the texts. With
    ``init`` "anchor" its weights are the mean features of the texts. ``texts``: features [T D] and labels [T].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = SharedHead(config)
    if images_ND is not None:
        head.fit_statistics(images_ND, IMAGE)
    head.fit_statistics(texts[0], TEXT)
    if init == "anchor":
        head.init_from_anchor(*texts)
    return head


def _validation(
    valid: LabelledFeatures | ScoredLabelledImages, best: BestWeights
) -> Callable[..., dict[str, Measured]]:
    """A hook's function: the scores on the images to select on, as of `diptych evaluate`, also offered to ``best``."""

    def run(step: int, objective: nn.Module) -> dict[str, Measured]:
        assert isinstance(objective, UmlObjective)
        device = objective.head.head.weight.device
        if isinstance(valid, ScoredLabelledImages):
            assert objective.encoder is not None
            vectors_ND, labels_N = valid.features(objective.encoder, device)
        else:
            vectors_ND, labels_N = valid.tensors(device)
        found = score_classifier(objective.head, vectors_ND, labels_N, modality=objective.target)
        best.offer(Score(step=step, value=found.accuracy, tie_break=-found.loss), objective)
        return {f"valid/{name}": value for name, value in found.table().items()}

    return run


def _finish(
    out: Path,
    objective: UmlObjective,
    encoder: ImageEncoder,
    labelled: Labelled,
    best: BestWeights,
    comparison: Comparison | None,
) -> None:
    """Save the selected weights so that they classify without the texts and without this data."""
    best.load_into(objective)
    save_model(objective.head, out / "head")
    save_model(encoder, out / "encoder")
    write_json(out / "classes.json", list(labelled.classes))
    assert best.score is not None
    save_png(out / "samples" / "guesses.png", _sheet_of_guesses(objective, encoder, labelled))
    assert comparison is not None
    comparison = replace(comparison, scores=validation_scores(out, best.score.step))
    comparison.write(out)
    write_run_report(out)
    title = f"{out} beside its baselines on {comparison.source}"
    print_comparison(*comparison.table(), title=title, notes=[*comparison.notes, comparison.verdict()])
    score = f"{best.score.value:.1%} of the validation images right after step {best.score.step:,}"
    print(closing_line(out, "classifier", score=score), flush=True)


def _sheet_of_guesses(objective: UmlObjective, encoder: ImageEncoder, labelled: Labelled) -> Image.Image:
    """Some images with their class and the most probable one."""
    chosen = np.linspace(0, len(labelled.source) - 1, min(_SHOWN, len(labelled.source))).astype(int)
    skipped = SkippedItems(max_skipped_share=1.0)
    pixels = {i: read_image(labelled.source, int(i), size=encoder.image_size, skipped=skipped) for i in chosen}
    shown = {item: image for item, image in pixels.items() if image is not None}
    with eval_mode(encoder), eval_mode(objective):
        device = objective.head.head.weight.device
        features_BD = encoder(channels_first(np.stack(list(shown.values()))).to(device))
        probability_BC = objective.head(features_BD, objective.target).softmax(1).cpu()
    guesses = [
        f"{labelled.classes[labelled.labels_N[item]]}: guessed {labelled.classes[int(row.argmax())]} {row.max():.0%}"
        for item, row in zip(shown, probability_BC, strict=True)
    ]
    return contact_sheet(list(shown.values()), captions=guesses, title="images of the training data, and guesses")
