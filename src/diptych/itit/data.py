"""The data of an ITIT run: which items of the sources give pairs, unpaired images and unpaired texts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.data.check import VALIDATION, Part, check_parts
from diptych.data.sources import Source, open_finite, require_pairs
from diptych.data.sources.columns import Columns
from diptych.data.splits import Rest, Subset, hold_back
from diptych.data.store import DataTokenizers, Store, encode, origin
from diptych.errors import UserError


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
    """The items that give pairs, those that give only their image and those that give only their texts.

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
    """Encode a subset into the store ``out``, unless that has been done; encoded data is used where it lies.

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
