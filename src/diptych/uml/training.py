"""Training supervised UML: a classifier of images that also learns from texts about their classes."""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.data.augment import ViewConfig
from diptych.data.class_texts import Shots, texts_of
from diptych.data.skipped import SkippedItems
from diptych.data.sources import open_finite
from diptych.data.sources.columns import Columns
from diptych.data.splits import Episode, Labelled, draw_episode, hold_out
from diptych.data.streams import BatchSampler
from diptych.encoders import ScratchConfig, open_image_encoder, open_text_encoder, scratch_encoder
from diptych.errors import UserError
from diptych.nn.inference import pick_device
from diptych.run_folder import save_model, write_config, write_json
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first
from diptych.train.loop import Hook, TrainResult, train
from diptych.uml.data import LabelledFeatures, PixelSide, frozen_side, text_side
from diptych.uml.features import made_of
from diptych.uml.head import SharedHead, SharedHeadConfig
from diptych.uml.objective import Init, UmlConfig, UmlObjective
from diptych.uml.selection import Best, Score

IMAGE, TEXT = "image", "text"


@dataclass(kw_only=True, slots=True)
class UmlData:
    images: str
    """Labelled images: a folder with a folder for each class, or any source with labels."""
    valid: str | None = None
    """Labelled images to select the best weights on. Not given: some of `images`."""
    valid_share: float = 0.1
    """Share of each class that is held back for that, where neither `valid` nor `shots` is given."""
    shots: int | None = None
    """Learn from so many random images of each class only, and select on min(4, shots) others."""
    texts: str | None = None
    """Texts about the classes: a JSON file {class: [sentence, ...]} or a folder of CLASS.txt. Not given: templates."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Texts made from the names of the classes, where none are given."""
    text_shots: Shots = "all"
    """Texts of each class to learn from: a number of random ones, all, or one that is the mean of all."""
    cache: Path | None = None
    """Folder for the features of frozen encoders, which runs may share. Not given: within the run folder."""
    columns: Columns = field(default_factory=Columns)
    """Names of columns that cannot be guessed."""
    workers: int = 2
    """Threads that decode images ahead of training."""
    cache_mb: int = 1024
    """Fine-tuning: decoded pictures stay in memory if all of them take no more than this."""
    max_skipped_share: float = 0.01
    """Share of unreadable images that is left out without stopping."""


@dataclass(kw_only=True, slots=True)
class UmlRun:
    """`diptych fit uml-probe` and `uml-finetune`."""

    data: UmlData
    """What it learns from."""
    encoder: str
    """Image encoder: a folder or hub name of transformers, an ITIT, dual or classifier run, or scratch: a new one."""
    text_encoder: str
    """Text encoder, always frozen: a folder or hub name of transformers, a dual, ITIT or text encoder run."""
    pooling: Literal["auto", "cls", "mean"] = "auto"
    """How an image's tokens become one vector; auto is the encoder's own way."""
    text_pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """The same for texts: auto is CLIP's shared embedding, else the mean; last suits decoders."""
    train_encoder: Literal["frozen", "tuned"] = "frozen"
    """frozen learns the classifier from cached features; tuned trains the image encoder along."""
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    """The new encoder, if it is one."""
    view: ViewConfig = field(default_factory=ViewConfig)
    """Random views of the pictures while the encoder is tuned; a frozen one sees each picture once, as it is."""
    head: SharedHeadConfig = field(default_factory=SharedHeadConfig)
    """The classifier. Its widths and classes follow from encoders and data."""
    objective: UmlConfig = field(default_factory=UmlConfig)
    """Its loss."""
    patience: int = 10
    """Validations in a row without a better one after which training ends."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""

    def fit(self, out: Path, *, recipe: str) -> TrainResult:
        """Leaves ``out/encoder``, ``out/head`` and ``out/classes.json``, which classify without any text."""
        self.check()
        join_processes(self.train.device)
        labelled = Labelled.of(open_finite(self.data.images, self.data.columns))
        encoder = self._open_encoder().to(pick_device(self.train.device))
        texts = self._texts(labelled.classes, cache=self.data.cache or out / "features")
        write_config(out, recipe=recipe, run=self)
        skipped = SkippedItems(max_skipped_share=self.data.max_skipped_share)
        images, valid = self._sides(labelled, encoder, cache=self.data.cache or out / "features", skipped=skipped)
        objective = self.build(encoder, images, texts, classes=len(labelled.classes))
        batches = BatchSampler(
            {IMAGE: images.stream(), TEXT: texts.stream()},
            multiples=objective.streams, batch_size=self.train.batch_size, seed=self.train.seed,
        )  # fmt: skip
        best = Best(out / "best", patience=self.patience)
        hook = Hook(every=self.train.eval_every, run=_validation(valid, best), over=best.is_over)
        result = train(
            objective, batches, out=out, train=self.train, optim=self.optim, hooks=[hook], title=recipe,
            identity=self._identity(objective, encoder, images, texts),
        )  # fmt: skip
        if len(skipped):
            skipped.write(out / "skipped.jsonl")
        if result.finished and is_main_process():
            _finish(out, objective, encoder, labelled.classes, best)
        return result

    def check(self) -> None:
        """Raise UserError for combinations of fields that would fail late or train nothing."""
        if self.train_encoder == "frozen" and self.encoder == "scratch":
            raise UserError("a new encoder that stays frozen has learnt nothing: give --encoder, or fit uml-finetune")
        if self.train_encoder == "tuned" and self.head.features in ("centred", "standard"):
            wanted = self.head.features
            raise UserError(
                f"--head.features {wanted} needs features that stay as they are: take unit for a tuned encoder"
            )
        if self.objective.aux_weight < 0:
            raise UserError(f"--objective.aux-weight is {self.objective.aux_weight}; it must be 0 or more")

    def build(
        self, encoder: Any, images: "LabelledFeatures | PixelSide", texts: LabelledFeatures, *, classes: int
    ) -> UmlObjective:
        """The classifier with its loss; its initial weights follow from ``train.seed`` and the texts."""
        config = replace(
            self.head, widths={IMAGE: encoder.width, TEXT: texts.vectors_ND.shape[1]}, anchor=TEXT, classes=classes
        )  # fmt: skip
        known = images.tensors()[0] if isinstance(images, LabelledFeatures) else None
        head = start_head(config, known, texts.tensors(), init=self.objective.init, seed=self.train.seed)
        learning = {"encoder": encoder, "view": self.view} if self.train_encoder == "tuned" else {}
        return UmlObjective(head, self.objective, target=IMAGE, **learning)

    def _texts(self, classes: tuple[str, ...], *, cache: Path) -> LabelledFeatures:
        texts = texts_of(self.data.texts, classes, templates=self.data.templates)
        encoder = open_text_encoder(self.text_encoder, pooling=self.text_pooling).to(pick_device(self.train.device))
        with main_process_first():
            return text_side(encoder, texts, shots=self.data.text_shots, cache=cache, seed=self.train.seed)

    def _open_encoder(self) -> Any:
        if self.encoder == "scratch":
            return scratch_encoder(self.scratch, seed=self.train.seed)
        return open_image_encoder(self.encoder, pooling=self.pooling)

    def _sides(self, labelled: Labelled, encoder: Any, *, cache: Path, skipped: SkippedItems) -> tuple[Any, Any]:
        """Images to learn from and images to select on."""
        data = self.data

        def side(part: Labelled, items: np.ndarray) -> LabelledFeatures | PixelSide:
            if self.train_encoder == "tuned":
                return PixelSide(part, items, size=encoder.image_size, skipped=skipped, cache_mb=data.cache_mb)
            with main_process_first():
                return frozen_side(encoder, part, items, cache=cache, skipped=skipped, workers=data.workers)

        episode = self._episode(labelled.labels_N)
        if data.valid is None:
            return side(labelled, episode.train), side(labelled, episode.valid)
        valid = Labelled.of(open_finite(data.valid, data.columns), labelled.classes)
        return side(labelled, episode.train), side(valid, np.arange(len(valid.labels_N)))

    def _episode(self, labels_N: np.ndarray) -> Episode:
        if self.data.shots is not None:
            return draw_episode(labels_N, self.data.shots, seed=self.train.seed)
        if self.data.valid is None:
            return hold_out(labels_N, self.data.valid_share, seed=self.train.seed)
        return Episode(train=np.arange(len(labels_N)), valid=np.arange(0))

    def _identity(self, objective: UmlObjective, encoder: Any, images: Any, texts: LabelledFeatures) -> dict[str, Any]:
        """What decides the losses besides the loop's own fields."""
        data = {IMAGE: images.labels_N.tolist(), TEXT: texts.labels_N.tolist()}
        return {
            "head": asdict(objective.head.config),
            "objective": asdict(self.objective),
            "view": asdict(self.view),
            "encoder": made_of(encoder),
            "text_encoder": self.text_encoder,
            "data": data,
        }


def start_head(
    config: SharedHeadConfig, images_ND: Tensor | None, texts: tuple[Tensor, Tensor], *, init: Init, seed: int
) -> SharedHead:
    """A new head: random weights follow from ``seed`` alone; the rest from the features that it is to learn from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = SharedHead(config)
    if images_ND is not None:
        head.fit_statistics(images_ND, IMAGE)
    head.fit_statistics(texts[0], TEXT)
    if init == "anchor":
        head.init_from_anchor(*texts)
    return head


def _validation(valid: "LabelledFeatures | PixelSide", best: Best):
    """Accuracy and loss on the images to select on, for ``metrics.jsonl`` and for :class:`Best`."""

    def run(step: int, objective: nn.Module) -> dict[str, float | int]:
        assert isinstance(objective, UmlObjective)
        device = objective.head.head.weight.device
        if isinstance(valid, PixelSide):
            vectors_ND, labels_N = valid.features(objective.encoder, device)
        else:
            vectors_ND, labels_N = valid.tensors(device)
        logits_NC = objective.head(vectors_ND, objective.target)
        accuracy = float((logits_NC.argmax(1) == labels_N).float().mean())
        loss = float(F.cross_entropy(logits_NC, labels_N))
        best.offer(Score(step=step, accuracy=accuracy, loss=loss), objective)
        return {"valid/accuracy": accuracy, "valid/loss": loss}

    return run


def _finish(out: Path, objective: UmlObjective, encoder: Any, classes: tuple[str, ...], best: Best) -> None:
    """The selected weights, saved so that they classify without texts and without this data."""
    best.load_into(objective)
    save_model(objective.head, out / "head")
    save_model(encoder, out / "encoder")
    write_json(out / "classes.json", list(classes))
    assert best.score is not None
    print(
        f"{out}: {best.score.accuracy:.1%} of the validation images right after step {best.score.step}",
        file=sys.stderr,
    )
