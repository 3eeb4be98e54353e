"""Which items of a source are used for what: pairs and unpaired halves, classes, few-shot episodes.

Every split is a pure function of its arguments and a seed.

Shapes: N items of a source.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.rng import derive_seed

Rest = Literal["split", "images", "texts", "unused"]
"""What the items become that do not stay pairs."""
Items = TypeVar("Items", bound=Sized, covariant=True)


@dataclass(frozen=True, slots=True)
class Subset(Generic[Items]):
    """Some items of a source, or of a store of encoded data."""

    source: Items
    items: np.ndarray | range
    """Indices, int64. A range takes no memory, so all of 10^8 items are one."""


def at(items: np.ndarray | range, places: np.ndarray) -> np.ndarray:
    """The items at these ``places``, int64 [B]."""
    return items[places] if isinstance(items, np.ndarray) else items.start + items.step * places


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSplit:
    """What the items of a source of pairs become: sorted indices of a source. No index is in two of them."""

    pairs: np.ndarray | range
    """Items that keep image and captions together."""
    images: np.ndarray | range
    """Items of which only the image is used."""
    texts: np.ndarray | range
    """Items of which only the captions are used."""


def hold_back(source_len: int, max_pairs: int | None, seed: int, *, rest: Rest = "split") -> PairSplit:
    """Keep ``max_pairs`` items as pairs and hide the captions or the image of the others, as if they had none.

    The order of the items does not depend on ``max_pairs``: the pairs of a smaller number are among those of a larger
    one, so that a curve over numbers of pairs compares like with like.

    Args:
        source_len: Number of items of the source.
        max_pairs: Number of items that stay pairs; None keeps all. Raises UserError when it is not in 1..source_len.
        seed: Decides which items stay pairs.
        rest: What the others become. "split": one half unpaired images and the other half unpaired texts, so that no
            unpaired text describes an unpaired image. "images" or "texts": all of them the one or the other, where
            the other side comes from a source of its own. "unused": neither.
    """
    if max_pairs is not None and not 0 < max_pairs <= source_len:
        raise UserError(f"--data.max-pairs {max_pairs}: must be from 1 to {source_len}, the number of captioned images")
    if max_pairs is None:
        return PairSplit(pairs=range(source_len), images=range(0), texts=range(0))
    # One random number each and a stable sort: the same on every platform and version that has this bit generator.
    numbers = np.random.Generator(np.random.PCG64(derive_seed("hold_back", seed))).random(source_len)
    order = np.argsort(numbers, kind="stable")
    others = order[max_pairs:]
    images = {"split": (len(others) + 1) // 2, "images": len(others), "texts": 0, "unused": 0}[rest]
    texts = len(others) if rest in ("split", "texts") else images
    return PairSplit(
        pairs=np.sort(order[:max_pairs]), images=np.sort(others[:images]), texts=np.sort(others[images:texts])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A source whose items have classes."""

    source: Source
    classes: tuple[str, ...]
    """Names of the classes."""
    labels_N: np.ndarray
    """Class of each item as an index into ``classes``, int64."""

    @classmethod
    def of(cls, source: Source, classes: Sequence[str] | None = None) -> "Labelled":
        """Read all labels.

        ``classes`` gives the names in their order; by default they are the labels that occur, sorted. Raises UserError
        for an item without a label, and for a label that is not among ``classes``.
        """
        names = [source.label(item) for item in range(len(source))]
        if None in names:
            raise UserError(
                f"{source.name}: {names.count(None):,} of {len(names):,} items have no label, such as "
                f"{source.key(names.index(None))}; label them in a column or by folders of classes, or leave them out"
            )
        found = {name for name in names if name is not None}
        classes = tuple(sorted(found)) if classes is None else tuple(classes)
        if unknown := sorted(found - set(classes)):
            raise UserError(
                f"{source.name}: the label {unknown[0]!r} is none of the {len(classes)} classes "
                f"({', '.join(classes[:5])}{', ...' * (len(classes) > 5)}); leave it out, or learn from it too"
            )
        place = {name: number for number, name in enumerate(classes)}
        return cls(source=source, classes=classes, labels_N=np.array([place[str(name)] for name in names], np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """Sorted indices of the items to learn from and of those to select a model on, int64. No item is in both."""

    train: np.ndarray
    valid: np.ndarray


def draw_episode(labels_N: np.ndarray, shots: int, *, seed: int, classes: Sequence[str] | None = None) -> Episode:
    """Draw ``shots`` random items of each class to learn from and min(4, shots) others to select a model on.

    The items of fewer shots are among those of more, so that a curve over shots compares like with like.
    Raises UserError for a class with too few items, by its name among ``classes``.
    """
    train, valid = [], []
    held = min(4, shots)
    for items in _shuffled_classes(labels_N, seed):
        if len(items) < shots + held:
            raise UserError(
                f"{shots} shots and {held} to select on need {shots + held} images of each class; "
                f"{_class_of(items, labels_N, classes)} has {len(items)}"
            )
        train.append(items[:shots])
        valid.append(items[len(items) - held :])
    return Episode(train=np.sort(np.concatenate(train)), valid=np.sort(np.concatenate(valid)))


def hold_out(labels_N: np.ndarray, share: float, *, seed: int, classes: Sequence[str] | None = None) -> Episode:
    """Hold out ``share`` of the items of each class, at least one, to select a model on; learn from all others.

    Raises UserError for a share that is not between 0 and 1, and for a class of which no item is left to learn from,
    by its name among ``classes``.
    """
    if not 0 < share < 1:
        raise UserError(f"valid-share is {share}; it must be between 0 and 1")
    train, valid = [], []
    for items in _shuffled_classes(labels_N, seed):
        held = max(1, round(share * len(items)))
        if held == len(items):
            raise UserError(
                f"{_class_of(items, labels_N, classes)} has one image only: none would be left to learn from; "
                "add one or leave it out"
            )
        train.append(items[held:])
        valid.append(items[:held])
    return Episode(train=np.sort(np.concatenate(train)), valid=np.sort(np.concatenate(valid)))


def given_episodes(meta: Mapping[str, Any], keys: Sequence[str]) -> dict[tuple[int, int], Episode]:
    """The published few-shot splits of an index file: (shots, seed) -> episode.

    Args:
        meta: The index file. ``meta["fewshot"]`` maps ``shot_K-seed_S`` to {"train": [file, ...], "val": [file, ...]}.
        keys: Key of every item of the source. A file of ``meta`` is such a key with or without its suffix; a file that
            is not among them raises UserError.
    """
    place = {key: number for number, key in enumerate(keys)}

    def find(files: Sequence[str]) -> np.ndarray:
        try:
            return np.array([place[file] if file in place else place[_stem(file)] for file in files], np.int64)
        except KeyError as error:
            raise UserError(f"the few-shot indices name {error}, which is not among the images") from None

    episodes = {}
    for name, files in meta["fewshot"].items():
        shots, seed = (int(part.rpartition("_")[2]) for part in name.split("-"))
        episodes[shots, seed] = Episode(train=find(files["train"]), valid=find(files["val"]))
    return episodes


def _class_of(items: np.ndarray, labels_N: np.ndarray, classes: Sequence[str] | None) -> str:
    """What a message calls the class of some items."""
    number = int(labels_N[items[0]])
    return f"the class {classes[number]!r}" if classes else f"class {number}"


def _shuffled_classes(labels_N: np.ndarray, seed: int) -> list[np.ndarray]:
    """The items of each class in random order."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "episode")))
    return [generator.permutation(np.flatnonzero(labels_N == c)) for c in np.unique(labels_N)]


def _stem(file: str) -> str:
    return str(Path(file).with_suffix(""))
