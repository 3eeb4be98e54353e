"""Few pairs and many halves: hides the captions of most items of a captioned source, to learn as if they had none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diptych.data.sources import Source
from diptych.errors import UserError
from diptych.rng import derive_seed

Rest = Literal["split", "images", "texts", "unused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Sorted indices of a source, int64. No index is in two of them."""

    pairs: np.ndarray
    """Examples that keep image and captions together."""
    images: np.ndarray
    """Examples of which only the image is used."""
    texts: np.ndarray
    """Examples of which only the captions are used."""


def hold_back(source_len: int, max_pairs: int | None, seed: int, *, rest: Rest = "split") -> Split:
    """``max_pairs`` items stay pairs (all of them when None); ``rest`` says what the others become.

    "split": half of them bare images, the other half bare texts, so that no bare text describes a bare image;
    "images" or "texts": all of them, for when the other side comes from a source of its own; "unused": neither.

    A pure function of its arguments. The order does not depend on ``max_pairs``: the pairs of a smaller number are
    among those of a larger one, so a curve over numbers of pairs compares like with like. Raises UserError.
    """
    if max_pairs is not None and not 0 < max_pairs <= source_len:
        raise UserError(f"--data.max-pairs {max_pairs}: must be from 1 to {source_len}, the number of captioned images")
    count = source_len if max_pairs is None else max_pairs
    # One random number each and a stable sort: the same on every platform and version that has this bit generator.
    rng = np.random.Generator(np.random.PCG64(derive_seed("hold_back", seed))).random(source_len)
    order = np.argsort(rng, kind="stable")
    others = order[count:]
    images = {"split": (len(others) + 1) // 2, "images": len(others), "texts": 0, "unused": 0}[rest]
    texts = len(others) if rest in ("split", "texts") else images
    return Split(pairs=np.sort(order[:count]), images=np.sort(others[:images]), texts=np.sort(others[images:texts]))


# JOINED data.labelled
#| Images with classes, and which of them to learn from where labels are few.


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A source whose items have classes."""

    source: Source
    classes: tuple[str, ...]
    labels_N: np.ndarray
    """Class of each item, as a place in ``classes``, int64."""

    @classmethod
    def of(cls, source: Source, classes: Sequence[str] | None = None) -> "Labelled":
        """Reads all labels. ``classes`` fixes names and order; else they are those that occur, sorted."""
        names = [source.label(item) for item in range(len(source))]
        if None in names:
            key = source.key(names.index(None))
            raise UserError(f"{source.name}: {key} has no label; sort the images into a folder for each class")
        found = {name for name in names if name is not None}
        classes = tuple(sorted(found)) if classes is None else tuple(classes)
        if unknown := sorted(found - set(classes)):
            raise UserError(f"{source.name}: the label {unknown[0]!r} is none of the {len(classes)} classes")
        place = {name: number for number, name in enumerate(classes)}
        return cls(source=source, classes=classes, labels_N=np.array([place[str(name)] for name in names], np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """Examples to learn from and items to select a model on, int64; none is in both."""

    train: np.ndarray
    valid: np.ndarray


def draw_episode(labels_N: np.ndarray, shots: int, *, seed: int) -> Episode:
    """``shots`` random items of each class to learn from, min(4, shots) others to select on.

    The items of fewer shots are among those of more, so that a curve over shots compares like with like.
    Raises UserError for a class with too few items.
    """
    train, valid = [], []
    held = min(4, shots)
    for items in _shuffled_classes(labels_N, seed):
        if len(items) < shots + held:
            raise UserError(
                f"{shots} shots and {held} to select on need {shots + held} images of each class; one has {len(items)}"
            )
        train.append(items[:shots])
        valid.append(items[len(items) - held :])
    return Episode(train=np.sort(np.concatenate(train)), valid=np.sort(np.concatenate(valid)))


def hold_out(labels_N: np.ndarray, share: float, *, seed: int) -> Episode:
    """All items to learn from but ``share`` of each class, at least one, to select on."""
    if not 0 < share < 1:
        raise UserError(f"valid-share is {share}; it must be between 0 and 1")
    train, valid = [], []
    for items in _shuffled_classes(labels_N, seed):
        held = max(1, round(share * len(items)))
        if held == len(items):
            raise UserError("a class has one image only: none would be left to learn from; add one or leave it out")
        train.append(items[held:])
        valid.append(items[:held])
    return Episode(train=np.sort(np.concatenate(train)), valid=np.sort(np.concatenate(valid)))


def given_episodes(meta: Mapping[str, Any], keys: Sequence[str]) -> dict[tuple[int, int], Episode]:
    """The index files of published few-shot splits: (shots, seed) to its episode.

    ``meta["fewshot"]`` holds ``shot_K-seed_S`` to {"train": [file, ...], "val": [...]}; a file is a key of the source
    with or without its suffix.
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


def _shuffled_classes(labels_N: np.ndarray, seed: int) -> list[np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "episode")))
    return [generator.permutation(np.flatnonzero(labels_N == c)) for c in np.unique(labels_N)]


def _stem(file: str) -> str:
    return str(Path(file).with_suffix(""))
