"""Images with classes, and which of them to learn from where labels are few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.batch import derive_seed
from diptych.data.sources import Source
from diptych.errors import UserError


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
    """Items to learn from and items to select a model on, int64; none is in both."""

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
