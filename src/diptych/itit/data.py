"""From the sources a user names to what each stage learns from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diptych.data.encode import DataTokenizers, encode, origin
from diptych.data.sources import Source, open_finite, require_pairs
from diptych.data.sources.columns import Columns
from diptych.data.splits import Rest, Subset, hold_back
from diptych.data.store import Store
from diptych.errors import UserError


@dataclass(kw_only=True, slots=True)
class DataConfig:
    pairs: str
    """Captioned images: folder, table, tars, hub:owner/name, scenes:, or a folder made by `diptych encode`."""
    images: str | None = None
    """Bare images. Not given: what `max-pairs` holds back, else the images of the pairs."""
    texts: str | None = None
    """Loose texts. Not given: what `max-pairs` holds back, else the captions of the pairs."""
    valid: str | None = None
    """Captioned images for the samples during training. Not given: some of the pairs."""
    max_pairs: int | None = None
    """Keep the captions of this many images only. The other images serve as bare images, the other captions as loose
    texts; if neither `images` nor `texts` is given, one half as the one and the other half as the other."""
    split_seed: int = 0
    """Which ones keep their captions."""
    columns: Columns = field(default_factory=Columns)
    """Names of columns that cannot be guessed."""
    workers: int = 2
    """Threads that decode images."""
    max_skipped_share: float = 0.01
    """Share of unreadable images that is left out without stopping."""
    feature_cache_mb: int = 2048
    """Keep the text encoder's features on disk while they take less; beyond it they are computed in each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSplit:
    """Which items give pairs, which only their image, which only their text."""

    pairs: Subset
    images: Subset
    texts: Subset

    def raw_images(self) -> list[Subset[Source]]:
        """All pictures there are, each once, to train a tokenizer on."""
        return _raw((self.images, self.pairs) if self.images is not self.pairs else (self.pairs,), "images")

    def raw_texts(self) -> Iterator[str]:
        """All texts there are, to train a text encoder on."""
        for part in _raw((self.texts, self.pairs) if self.texts is not self.pairs else (self.pairs,), "texts"):
            for item in part.items:
                yield from part.source.captions(int(item))


def open_parts(data: DataConfig) -> DataSplit:
    """Open the sources and hold captions back. Raises UserError before anything is computed."""
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
        images=_unpaired(data, "images", Subset(pairs, split.images), kept),
        texts=_unpaired(data, "texts", Subset(pairs, split.texts), kept),
    )


def _unpaired(data: DataConfig, name: str, held_back: Subset, pairs: Subset) -> Subset:
    """Bare images or texts: a source of their own, or what was held back, or the same side of the pairs."""
    spec = getattr(data, name)
    if spec is None:
        return held_back if len(held_back.items) else pairs
    source = _open(spec, data)
    if not (source.has_images if name == "images" else source.has_captions):
        raise UserError(f"{spec}: it is given as --data.{name} but has no {'images' if name == 'images' else 'texts'}")
    return Subset(source, np.arange(len(source)))


def _open(spec: str, data: DataConfig) -> Source | Store:
    return Store.open(Path(spec)) if Store.is_one(spec) else open_finite(spec, data.columns)


def _raw(parts: tuple[Subset, ...], what: str) -> list[Subset[Source]]:
    raw = [part for part in parts if not isinstance(part.source, Store) and len(part.items)]
    if not raw:
        raise UserError(f"encoded data has no {what} to train on: give --tokenizer and --text-encoder, as it was made")
    return raw


def encode_part(
    part: Subset, out: Path, tokenizers: DataTokenizers, *, data: DataConfig, advance=lambda done, total: None
) -> Subset:
    """Encode what a stream needs of a source; data that is encoded already is used where it lies."""
    if isinstance(part.source, Store):
        made_by = part.source.manifest["made_by"]["tokenizers"]
        if made_by.rpartition("-")[0] != tokenizers.fingerprint.rpartition("-")[0]:
            raise UserError(f"{part.source.folder}: encoded with another tokenizer or text encoder: encode it again")
        return part
    if Store.is_one(out):
        store = Store.open(out)
        made_by, wanted = store.manifest["made_by"], origin(part.source, tokenizers, part.items)
        if made_by == wanted:
            return Subset(store, np.arange(len(store)))
        if made_by["tokenizers"] == wanted["tokenizers"]:
            raise UserError(
                f"{out}: encoded from other items ({made_by['source']} then, {part.source.name} now): "
                "give the same data to continue, or train into another folder"
            )
    store = encode(
        part.source, out, tokenizers, indices=part.items, workers=data.workers,
        max_skipped_share=data.max_skipped_share, advance=advance,
    )  # fmt: skip
    return Subset(store, np.arange(len(store)))
