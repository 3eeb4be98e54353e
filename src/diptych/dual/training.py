"""Training dual encoders: ITO and what it is compared with, over the same batches.

Shapes: I images, T texts, D width.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from diptych.data.pixels import channels_first
from diptych.data.skipped import SkippedItems
from diptych.data.sources import Source, open_finite, open_source
from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import UnreadableImage
from diptych.data.streams import BatchSampler
from diptych.dual.data import CaptionIds, pair_stream
from diptych.dual.metrics import retrieval
from diptych.dual.model import DualEncoder, DualEncoderConfig, train_clip_tokenizer
from diptych.dual.objectives.clip import ClipConfig, ClipObjective
from diptych.dual.objectives.ito import ItoConfig, ItoObjective
from diptych.dual.objectives.slip import SlipConfig, SlipObjective
from diptych.errors import UserError
from diptych.run_folder import part_of, save_model, write_config
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.distributed import is_main_process, join_processes, main_process_first
from diptych.train.loop import Hook, TrainResult, train
from diptych.train.objective import Objective

_SAVES_MEMORY = ("chunk", "lean")
"""Fields of objectives that change no gradient, so that a run may go on with others."""


@dataclass(kw_only=True, slots=True)
class PairsData:
    pairs: str
    """Captioned images: folder, table, tars, hub:owner/name or scenes:."""
    valid: str | None = None
    """Captioned images that retrieval is measured on while training."""
    valid_images: int = 1000
    """How many of them, the first ones."""
    columns: Columns = field(default_factory=Columns)
    """Names of columns that cannot be guessed."""
    decode_size: int | None = None
    """Pictures are decoded to this side, and views cropped from that. Not given: half as large again as a view."""
    cache_mb: int = 1024
    """Decoded pictures stay in memory if all of them take no more than this."""
    max_skipped_share: float = 0.01
    """Share of unreadable images that is left out without stopping."""


@dataclass(kw_only=True, slots=True)
class DualRun:
    """A dual encoder trained on pairs; a subclass for each family of recipes says by which objective."""

    data: PairsData
    """What it learns from."""
    start: str | None = None
    """A CLIP to continue from: a folder, an earlier run or a hub name. Not given: random weights."""
    tokenizer: str | None = None
    """Text tokenizer in CLIP's format, a folder or a hub name. Not given: one is trained on the captions."""
    model: DualEncoderConfig = field(default_factory=DualEncoderConfig)
    """The two towers, unless `start` is given."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""

    def fit(self, out: Path, *, recipe: str) -> TrainResult:
        """Leaves ``out/model``, a plain CLIP folder, and the validation retrieval in ``metrics.jsonl``."""
        join_processes(self.train.device)
        source = open_finite(self.data.pairs, self.data.columns)
        if not (source.has_images and source.has_captions):
            lacks = "captions" if source.has_images else "images"
            raise UserError(f"{self.data.pairs}: pairs need images and captions, and it has no {lacks}")
        model = self._model(source, out)
        hooks = [Hook(every=self.train.eval_every, run=_validation(self.data, model))] if self.data.valid else []
        write_config(out, recipe=recipe, run=self)
        objective = self._objective(model)
        skipped = SkippedItems(max_skipped_share=self.data.max_skipped_share)
        batches = self._batches(source, model, skipped)
        fields = asdict(self.objective)  # type: ignore[attr-defined]
        identity = {
            "model": model.clip.config.to_diff_dict(),
            "objective": {name: value for name, value in fields.items() if name not in _SAVES_MEMORY},
            "data": [source.name, batches.streams["pairs"].size, self.data.decode_size],
        }
        result = train(
            objective,
            batches,
            out=out,
            train=self.train,
            optim=self.optim,
            hooks=hooks,
            title=recipe,
            identity=identity,
        )
        if len(skipped):
            skipped.write(out / "skipped.jsonl")
        with result.eval_mode(objective):
            if is_main_process():
                model.clamp_scale()
                save_model(model, out / "model")
        return result

    def _model(self, source: Source, out: Path) -> DualEncoder:
        if self.start is not None:
            return DualEncoder.from_pretrained(part_of(self.start, "model"))
        return DualEncoder.from_config(self.model, self._tokenizer(source, out), seed=self.train.seed)

    def _tokenizer(self, source: Source, out: Path) -> PreTrainedTokenizerBase:
        """The given one, else that of the run folder, made by the first process where it is not there."""
        folder = out / "tokenizer"
        with main_process_first():
            if self.tokenizer is None and not folder.is_dir():
                texts = (text for item in range(len(source)) for text in source.captions(item))
                made = train_clip_tokenizer(texts, vocab_size=self.model.vocab_size, length=self.model.max_text_len)
                made.save_pretrained(folder)
        name = part_of(self.tokenizer, "tokenizer") if self.tokenizer is not None else str(folder)
        return transformers.AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir())

    def _objective(self, model: DualEncoder) -> Objective:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)  # for the parts that are dropped after training
            match self.objective:  # type: ignore[attr-defined]
                case ItoConfig() as config:
                    return ItoObjective(model, config)
                case SlipConfig() as config:
                    return SlipObjective(model, config)
                case config:
                    return ClipObjective(model, config)

    def _batches(self, source: Source, model: DualEncoder, skipped: SkippedItems) -> BatchSampler:
        captions = CaptionIds.read(source, np.arange(len(source)), model.ids)
        stream = pair_stream(
            source, captions, size=self.data.decode_size or model.image_size * 3 // 2,
            per_image=self.objective.captions,  # type: ignore[attr-defined]
            pad=model.tokenizer.pad_token_id, skipped=skipped, cache_mb=self.data.cache_mb, seed=self.train.seed,
        )  # fmt: skip
        return BatchSampler(
            {"pairs": stream}, multiples={"pairs": 1}, batch_size=self.train.batch_size, seed=self.train.seed
        )


@dataclass(kw_only=True, slots=True)
class ClipRun(DualRun):
    """`diptych fit clip-*` and `siglip-*`."""

    objective: ClipConfig = field(default_factory=ClipConfig)
    """Its loss and views."""


@dataclass(kw_only=True, slots=True)
class ItoRun(DualRun):
    """`diptych fit ito-*`."""

    objective: ItoConfig = field(default_factory=ItoConfig)
    """Its losses and views."""


@dataclass(kw_only=True, slots=True)
class SlipRun(DualRun):
    """`diptych fit slip-*`."""

    objective: SlipConfig = field(default_factory=SlipConfig)
    """Its losses and views."""


def _validation(data: PairsData, model: DualEncoder) -> Callable[[int, nn.Module], dict[str, float | int]]:
    """Retrieval among some captioned images, all their captions, for ``metrics.jsonl``."""
    assert data.valid is not None
    source = open_source(data.valid, columns=data.columns)
    pictures: list[np.ndarray] = []
    texts: list[str] = []
    image_of: list[int] = []
    for item in range(len(source)):
        if len(pictures) == data.valid_images:
            break
        try:
            captions, picture = source.captions(item), source.image(item, model.image_size)
        except UnreadableImage:
            continue
        texts += captions
        image_of += [len(pictures)] * len(captions)
        pictures.append(picture)
    if not texts:
        raise UserError(f"{data.valid}: has no captioned image to measure retrieval on")
    pixels_I3HW, image_of_T = channels_first(np.stack(pictures)), torch.tensor(image_of)

    def run(step: int, objective: nn.Module) -> dict[str, float | int]:
        images_ID, texts_TD = model.embed_images(pixels_I3HW), model.embed_texts(texts)
        table = retrieval(images_ID, texts_TD, image_of_T=image_of_T.to(images_ID.device)).table()
        return {f"valid/{name}": value for name, value in table.items() if name not in ("images", "texts")}

    return run
