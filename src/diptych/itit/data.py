"""The data of an ITIT run: which items become pairs, unpaired images and unpaired texts, how they are encoded, and what
the network is built from.

Shapes: M tokens of texts, F width of the frozen text features, X captioned images with a caption each, G width of the
image features, T width of the teacher's features, U unpaired texts, B rows, L text tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych.data.batch import PairExamples, TextExamples
from diptych.data.check import VALIDATION, Part, check_parts, note_on_lengths
from diptych.data.pixels import channels_first
from diptych.data.sources import Source, open_finite, open_source, require_pairs
from diptych.data.sources.columns import Columns
from diptych.data.splits import Rest, Subset, hold_back
from diptych.data.store import DataTokenizers, Store, encode, origin
from diptych.encoders.image import ImageEncoder, open_image_encoder, resize_pixels
from diptych.errors import UserError
from diptych.eval.baselines import sampled
from diptych.io import weights_digest
from diptych.itit.model import mean_of_text
from diptych.nn.inference import pick_device
from diptych.rng import derive_seed
from diptych.run_folder import read_config
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import PAD, TextTokenizer
from diptych.train.pace import RunPlan

ENCODING = "encoding"
"""Name of the encoding in the plan of a run."""
TEACHER = Path("stages") / "teacher"
"""Folder, in a run folder, of the vision model that is the teacher."""
_CAPTIONS_FITTED = 5
"""Number of captions of an image that decide which image features belong to a text."""
_LEAST_ENCODED = 256
"""Smallest number of items of each kind that are encoded, whatever the budget."""
_TRIED = 48
"""Number of items whose encoding is timed."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The sources of an ITIT run, and how they are split and encoded."""

    pairs: str
    """Captioned images: folder, table, tars, hub:owner/name, scenes:, or a folder made by `diptych encode`."""
    images: str | None = None
    """Unpaired images. Default: what `max-pairs` holds back, else the images of the pairs."""
    texts: str | None = None
    """Unpaired texts. Default: what `max-pairs` holds back, else the captions of the pairs."""
    valid: str | None = None
    """Captioned images for the samples and scores during training. Default: some of the pairs, without scores."""
    valid_images: int = 128
    """Number of images that are scored during training: the first ones of `valid`, as by `diptych evaluate --limit`."""
    max_pairs: int | None = None
    """Number of images that keep their captions. The other images become unpaired images, the other captions unpaired
    texts; if neither `images` nor `texts` is given, one half becomes the former and the other half the latter."""
    split_seed: int = 0
    """Seed of the choice of images that keep their captions."""
    columns: Columns = field(default_factory=Columns)
    """Names of columns that cannot be guessed."""
    workers: int = 2
    """Number of threads that decode images."""
    max_skipped_share: float = 0.01
    """Largest share of unreadable images that is skipped; the run stops at more."""
    feature_cache_mb: int = 2048
    """Largest size in MiB of the text encoder's features on disk. Larger features are computed in each step instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSplit:
    """The items that are pairs, those of which only the image is used, and those of which only the texts are used.

    ``images`` or ``texts`` is the same object as ``pairs`` where the pairs serve as unpaired data too.
    """

    pairs: Subset
    images: Subset
    texts: Subset

    def check(self, valid: Source | None, *, max_skipped_share: float) -> str:
        """As `check_parts`, with the images for validation."""
        parts = [Part("pair", self.pairs.source, self.pairs.items)]
        if self.images is not self.pairs:
            parts.append(Part("unpaired image", self.images.source, self.images.items))
        if self.texts is not self.pairs:
            parts.append(Part("unpaired text", self.texts.source, self.texts.items))
        if valid is not None:
            parts.append(Part(VALIDATION, valid, range(len(valid))))
        return check_parts(parts, max_skipped_share=max_skipped_share)

    def raw_images(self) -> list[Subset[Source]]:
        """All images, each once, to train an image tokenizer on. Raises UserError if all are encoded already."""
        return _raw((self.images, self.pairs) if self.images is not self.pairs else (self.pairs,), "images")

    def raw_texts(self) -> Iterator[str]:
        """All texts, to train a text encoder on. Raises UserError if all are encoded already."""
        for subset in _raw((self.texts, self.pairs) if self.texts is not self.pairs else (self.pairs,), "texts"):
            for item in subset.items:
                yield from subset.source.captions(int(item))


def open_data(data: DataConfig) -> DataSplit:
    """Open the sources and hold captions back.

    Raises UserError for a source that is missing or lacks what it is given for.
    """
    pairs = _open(data.pairs, data)
    require_pairs(pairs, data.pairs)
    rests: dict[tuple[bool, bool], Rest] = {
        (False, False): "split",
        (False, True): "images",
        (True, False): "texts",
        (True, True): "unused",
    }
    rest = rests[data.images is not None, data.texts is not None]
    split = hold_back(len(pairs), data.max_pairs, data.split_seed, rest=rest)
    kept = Subset(pairs, split.pairs)
    return DataSplit(
        pairs=kept,
        images=_unpaired("images", data.images, data, held_back=Subset(pairs, split.images), pairs=kept),
        texts=_unpaired("texts", data.texts, data, held_back=Subset(pairs, split.texts), pairs=kept),
    )


def open_valid(data: DataConfig) -> Source | None:
    """The captioned images for validation, if any are given. Raises UserError as `open_data`."""
    if data.valid is None:
        return None
    if Store.is_one(data.valid):
        raise UserError(f"{data.valid}: validation needs pixels, which encoded data has not: give the source itself")
    valid = open_finite(data.valid, data.columns)
    require_pairs(valid, data.valid)
    return valid


def _unpaired(
    side: Literal["images", "texts"], spec: str | None, data: DataConfig, *, held_back: Subset, pairs: Subset
) -> Subset:
    """Unpaired images or texts: a source of their own, else what was held back, else the same side of the pairs."""
    if spec is None:
        return held_back if len(held_back.items) else pairs
    source = _open(spec, data)
    if not (source.has_images if side == "images" else source.has_captions):
        raise UserError(f"{spec}: it is given as --data.{side} but has no {side}")
    return Subset(source, range(len(source)))


def _open(spec: str, data: DataConfig) -> Source | Store:
    return Store.open(Path(spec)) if Store.is_one(spec) else open_finite(spec, data.columns)


def _raw(subsets: tuple[Subset, ...], side: Literal["images", "texts"]) -> list[Subset[Source]]:
    raw = [each for each in subsets if not isinstance(each.source, Store) and len(each.items)]
    if not raw:
        raise UserError(f"encoded data has no {side} to train on: give --tokenizer and --text-encoder, as it was made")
    return raw


def encode_subset(
    subset: Subset,
    out: Path,
    tokenizers: DataTokenizers,
    *,
    data: DataConfig,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Subset:
    """Encode a subset into the store ``out``, unless it is there already. A subset of a store is returned as it is.

    ``advance`` is called with the number of encoded items and that of all items. Raises UserError for data that other
    tokenizers encoded, and for a store ``out`` of other items.
    """
    if isinstance(subset.source, Store):
        made_by = subset.source.manifest["made_by"]["tokenizers"]
        if made_by.rpartition("-")[0] != tokenizers.fingerprint.rpartition("-")[0]:
            raise UserError(f"{subset.source.folder}: encoded with another tokenizer or text encoder: encode it again")
        return subset
    if Store.is_one(out):
        store = Store.open(out)
        made_by, wanted = store.manifest["made_by"], origin(subset.source, tokenizers, subset.items)
        differing = [name for name, value in made_by.items() if value != wanted[name]]  # old stores know fewer names
        if not differing:
            return Subset(store, range(len(store)))
        if differing == ["content"]:
            raise UserError(
                f"{out}: encoded from {subset.source.name} before its captions or images were changed: "
                "give the same data to continue, or train into another folder"
            )
        if "tokenizers" not in differing:
            raise UserError(
                f"{out}: encoded from other items ({made_by['source']} then, {subset.source.name} now): "
                "give the same data to continue, or train into another folder"
            )
    store = encode(
        subset.source,
        out,
        tokenizers,
        indices=subset.items,
        workers=data.workers,
        max_skipped_share=data.max_skipped_share,
        advance=advance,
    )
    return Subset(store, range(len(store)))


def store_of(subset: Subset) -> Store:
    """The store that an encoded subset lies in."""
    assert isinstance(subset.source, Store)
    return subset.source


@dataclass(frozen=True)
class TrainingInputs:
    """The frozen tokenizer and text encoder of a run, and its data encoded with both."""

    tokenizer: ImageTokenizer
    text_encoder: TextEncoder
    encoded: DataSplit
    image_encoder: ImageEncoder | None = None
    data_summary: str = ""
    """The summary of the data by `check_parts`."""

    def text_features(self, *, texts: int) -> Float[Tensor, "M F"]:
        """Frozen features of the tokens of the first ``texts`` texts, padding left out."""
        stream = store_of(self.encoded.texts).texts(self.encoded.texts.items)
        rows = np.arange(min(texts, stream.size))
        examples = stream.take(rows, np.zeros_like(rows))
        return self._features(examples)[examples.valid_BL].float()

    def image_and_text_features(self, *, images: int) -> tuple[Float[Tensor, "X G"], Float[Tensor, "X F"]]:
        """Features of the first ``images`` captioned images, and the means of those of up to five captions of each.

        The captions of an image lie side by side; an image with fewer captions has some of them twice.
        """
        stream = store_of(self.encoded.pairs).pairs(self.encoded.pairs.items, seed=0)
        rows = np.arange(min(images, stream.size))
        taken = [stream.take(rows, np.full_like(rows, epoch)) for epoch in range(_CAPTIONS_FITTED)]
        of_texts = [mean_of_text(self._features(pairs), pairs.valid_BL) for pairs in taken]
        features_XG = taken[0].image_features_BG
        assert features_XG is not None
        return features_XG.repeat_interleave(len(taken), 0), torch.stack(of_texts, dim=1).flatten(0, 1)

    @cached_property
    def captions_and_features(self) -> tuple[list[list[str]], Float[np.ndarray, "X G"]]:
        """The captions of captioned images, at most 3,000 of them, and the features of their images."""
        store = store_of(self.encoded.pairs)
        pairs, captions = np.asarray(self.encoded.pairs.items), store.captions
        items = sampled(pairs[captions.counts[pairs] > 0])
        ids = [store.arrays["ids"][captions.rows(np.array([item]))] for item in items]
        texts = [self.text_encoder.detokenize(torch.from_numpy(ids_BL.astype(np.int64))) for ids_BL in ids]
        return texts, store.arrays["image_features"][items]

    @cached_property
    def texts_and_features(self) -> tuple[list[str], Float[Tensor, "U F"]]:
        """The unpaired texts, at most 3,000 of them, and the means of their features."""
        stream = store_of(self.encoded.texts).texts(self.encoded.texts.items)
        rows = sampled(np.arange(stream.size))
        examples = stream.take(rows, np.zeros_like(rows))
        texts = self.text_encoder.detokenize(examples.ids_BL)
        return texts, mean_of_text(self._features(examples), examples.valid_BL)

    def teacher_features(self, *, images: int) -> Float[Tensor, "X T"]:
        """The teacher's features of the first ``images`` captioned images."""
        stream = store_of(self.encoded.pairs).images(self.encoded.pairs.items)
        rows = np.arange(min(images, stream.size))
        features_XT = stream.take(rows, np.zeros_like(rows)).teacher_features_BT
        assert features_XT is not None
        return features_XT

    def _features(self, examples: PairExamples | TextExamples) -> Float[Tensor, "B L F"]:
        """The cached features of the frozen text encoder, on the CPU; without a cache they are computed."""
        if examples.features_BLF is not None:
            return examples.features_BLF
        device = self.text_encoder.embedding.weight.device
        rows = [examples[start : start + 64].to(device) for start in range(0, len(examples), 64)]
        return torch.cat([self.text_encoder.features(each.ids_BL, each.valid_BL).cpu() for each in rows])


def note_on_cut_texts(texts: Sequence[str], text_tokenizer: TextTokenizer, *, length: int) -> str:
    """:func:`note_on_lengths` of texts of which a network reads ``length`` tokens; texts that just fit are not cut."""
    valid_BL = text_tokenizer.tokenize(texts, length=length + 1)[1]  # a text that just fits leaves the last one empty
    return note_on_lengths(valid_BL.sum(1).numpy() - 1, length)


def within_budget(data: DataSplit, tokenizers: DataTokenizers, plan: RunPlan, *, seed: int) -> DataSplit:
    """``data``, or as much of it as can be encoded within the budget of ``plan``; pairs come first.

    Which items are left out is random and follows from ``seed``.
    """
    if plan.budget is None:
        return data
    subsets = {"pairs": data.pairs}
    subsets |= {"images": data.images} if data.images is not data.pairs else {}
    subsets |= {"texts": data.texts} if data.texts is not data.pairs else {}
    raw = {name: subset for name, subset in subsets.items() if not isinstance(subset.source, Store)}

    def decide() -> dict[str, int]:
        left, counts = plan.seconds_for(ENCODING), {}
        for names in ([name for name in raw if name == "pairs"], [name for name in raw if name != "pairs"]):
            seconds = sum(_seconds_to_encode(raw[name], tokenizers, name) for name in names)
            share = min(1.0, left / max(seconds, 1e-9))
            left = max(0.0, left - seconds)
            for name in names:
                whole = len(raw[name].items)
                counts[name] = min(whole, max(_LEAST_ENCODED, int(share * whole)))
        return counts

    counts = plan.budget.decision(ENCODING, decide)
    for name, subset in raw.items():
        if counts[name] < len(subset.items):
            generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "budget")))
            some = np.sort(generator.choice(subset.items, counts[name], replace=False))
            subsets[name] = Subset(subset.source, some)
            few = f"{len(some):,} of {len(subset.items):,}"
            print(f"3/3 encoding {name}: {few} fit into the budget of {plan.budget.minutes:g} minutes", flush=True)
    pairs = subsets["pairs"]
    return DataSplit(pairs=pairs, images=subsets.get("images", pairs), texts=subsets.get("texts", pairs))


def _seconds_to_encode(subset: Subset, tokenizers: DataTokenizers, name: str) -> float:
    """Estimated from some of the items; ``name`` says whether they are pairs, images or texts."""
    source, items = subset.source, subset.items[:: max(1, len(subset.items) // _TRIED)][:_TRIED]
    began = time.monotonic()
    if name != "texts" and tokenizers.tokenize_images is not None:
        pixels_B3SS = channels_first(np.stack([source.image(int(item), tokenizers.image_size) for item in items]))
        tokenizers.tokenize_images(pixels_B3SS)
        if tokenizers.image_features is not None:
            tokenizers.image_features(pixels_B3SS)
        if tokenizers.teacher_features is not None:
            pixels = np.stack([source.image(int(item), tokenizers.teacher_size) for item in items])
            tokenizers.teacher_features(channels_first(pixels))
    if name != "images" and tokenizers.tokenize_texts is not None:
        ids_BL = tokenizers.tokenize_texts([text for item in items for text in source.captions(int(item))])
        if tokenizers.text_features is not None:
            tokenizers.text_features(ids_BL)
    return (time.monotonic() - began) / max(1, len(items)) * len(subset.items)


def count_captions(subset: Subset) -> int:
    """Estimate from up to 256 items; 0 for data that is encoded already, with or without features."""
    if isinstance(subset.source, Store):
        return 0
    source, sample = subset.source, subset.items[:: max(1, len(subset.items) // 256)]
    mean = sum(len(source.captions(int(item))) for item in sample) / max(1, len(sample))
    return int(mean * len(subset.items))


# What encodes the data


def image_encoder_of(run: Path) -> ImageEncoder | None:
    """The pretrained image encoder in a run folder; None where the run has none."""
    folder = run / "image_encoder"
    return open_image_encoder(folder) if folder.is_dir() else None


def teacher_of(run: Path) -> ImageEncoder | None:
    """The teacher in a run folder, which only training needs; None where the run has none."""
    folder = run / TEACHER
    return open_image_encoder(folder) if folder.is_dir() else None


def read_size(tokenizer: ImageTokenizer, image_encoder: ImageEncoder | None) -> int:
    """Side in pixels of images from which both the tokens and the features can be computed."""
    return max(tokenizer.image_size, 0 if image_encoder is None else image_encoder.image_size)


def image_encoders(
    tokenizer: ImageTokenizer, image_encoder: ImageEncoder | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
    """Functions from uint8 pixels [B 3 S S] of any size to image tokens [B N], and to image features [B G] if any."""
    device = tokenizer.codebook.device

    def tokens(pixels_B3SS: Tensor) -> Tensor:
        return tokenizer.encode(resize_pixels(pixels_B3SS.to(device), tokenizer.image_size))

    @torch.no_grad()
    def features(pixels_B3SS: Tensor) -> Tensor:
        assert image_encoder is not None
        return image_encoder(pixels_B3SS.to(device)).float()

    return tokens, features if image_encoder is not None else None


def data_tokenizers(
    tokenizer: ImageTokenizer,
    text_encoder: TextEncoder,
    *,
    length: int,
    features: bool = False,
    image_encoder: ImageEncoder | None = None,
    teacher: ImageEncoder | None = None,
) -> DataTokenizers:
    """Both tokenizers in the form that the encoding of data takes. Texts are cut to ``length`` tokens.

    With ``features`` the features of the text encoder are stored too, with ``image_encoder`` and ``teacher`` theirs.
    """
    device = text_encoder.embedding.weight.device

    def to_features(ids_BL: Tensor) -> Tensor:
        pieces = [text_encoder.features(piece, piece != PAD) for piece in ids_BL.to(device).split(256)]
        return torch.cat(pieces)

    tokenize_images, image_features = image_encoders(tokenizer, image_encoder)
    _, teacher_features = image_encoders(tokenizer, teacher)
    return DataTokenizers(
        image_size=read_size(tokenizer, image_encoder),
        tokenize_images=tokenize_images,
        image_features=image_features,
        teacher_size=0 if teacher is None else teacher.image_size,
        teacher_features=teacher_features,
        tokenize_texts=lambda texts: text_encoder.tokenize(texts, length=length)[0],
        text_features=to_features if features else None,
        fingerprint="-".join(
            [
                weights_digest(tokenizer),
                weights_digest(text_encoder),
                text_encoder.feature_kind,
                str(length),
                *([] if image_encoder is None else [weights_digest(image_encoder)]),
                *([] if teacher is None else [f"teacher:{weights_digest(teacher)}"]),
                str(features),
            ]
        ),
    )


def run_data_tokenizers(run: Path, *, features: bool) -> DataTokenizers:
    """The data tokenizers of a run, finished or not. Raises UserError for a folder that is no ITIT run."""
    for part in ("tokenizer", "text_encoder"):
        if not (run / part).is_dir():
            raise UserError(f"{run}: has no {part}/: give a run of an itit recipe")
    device = pick_device("auto")
    tokenizer = ImageTokenizer.from_pretrained(run / "tokenizer").to(device)
    text_encoder = TextEncoder.from_pretrained(run / "text_encoder").to(device)
    model = read_config(run)["run"]["model"]
    text_encoder.feature_kind = model["text_input"]
    image_encoder, teacher = image_encoder_of(run), teacher_of(run)
    return data_tokenizers(
        tokenizer,
        text_encoder,
        length=model["max_text_len"],
        features=features,
        image_encoder=image_encoder if image_encoder is None else image_encoder.to(device),
        teacher=teacher if teacher is None else teacher.to(device),
    )


def open_to_encode(spec: str, run: Path, *, features: bool) -> tuple[Source, DataTokenizers]:
    """A source, and what a run encodes of it. Raises UserError as :func:`run_data_tokenizers` and `open_source`."""
    source = open_source(spec)
    both = run_data_tokenizers(run, features=features)
    return source, replace(
        both,
        tokenize_images=both.tokenize_images if source.has_images else None,
        tokenize_texts=both.tokenize_texts if source.has_captions else None,
    )
