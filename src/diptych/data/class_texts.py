"""Texts about classes: from templates, from a JSON of descriptions, or from a folder with a text file for each class.

Which text belongs to which image is not known and not asked for; a text has the label of the class it is about.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from diptych.data.sources.text import clean, read_text
from diptych.errors import UserError
from diptych.rng import derive_seed

Shots = int | Literal["all", "mean"]
"""Texts of a class to learn from: so many random ones, all, or one that is the mean of all their features."""


def from_templates(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """For each class each template with the class's name in it; underscores in names become spaces."""
    if not templates:
        raise UserError('no template for texts about the classes is given: give one, e.g. "a photo of a {}."')
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template {template!r} has no {{}} where the name of the class should stand")
    return [[template.replace("{}", _spoken(name)) for template in templates] for name in classes]


def read_class_texts(path: str | Path, classes: Sequence[str]) -> list[list[str]]:
    """The texts of each class from a JSON file {class: [sentence, ...]} or a folder of CLASS.txt, a text a line.

    Names are compared without regard to case and to underscores. Raises UserError for a class without texts, for texts
    of an unknown class, and for files that hold none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a JSON file of descriptions or a folder with a text per class")
    return _sorted_in(_read_folder(path) if path.is_dir() else _read_json(path), classes, where=path)


def texts_of(spec: str | None, classes: Sequence[str], *, templates: Sequence[str]) -> list[list[str]]:
    """:func:`read_class_texts` where a file or folder is given, else :func:`from_templates`."""
    return from_templates(classes, templates) if spec is None else read_class_texts(spec, classes)


def choose_texts(labels_T: np.ndarray, shots: int, *, seed: int) -> np.ndarray:
    """Indices of ``shots`` random texts of every class, ascending; of all of them where a class has fewer."""
    if shots < 1:
        raise UserError(f"{shots} texts of a class leave nothing to learn from: give 1 or more, all or mean")
    chosen = []
    for label in np.unique(labels_T):
        generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "class texts", int(label))))
        chosen.append(generator.permutation(np.flatnonzero(labels_T == label))[:shots])
    return np.sort(np.concatenate(chosen))


def permuted(classes: int, *, seed: int) -> np.ndarray:
    """Another class for each class, no two the same: what texts are about in the control with unrelated texts."""
    if classes < 2:
        raise UserError("one class alone cannot get the texts of another: there must be two classes or more")
    order = np.random.Generator(np.random.PCG64(derive_seed(seed, "permuted classes"))).permutation(classes)
    other = np.empty(classes, np.int64)
    other[order] = np.roll(order, 1)  # one ring through all classes
    return other


def _read_json(path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f'{path}: is not a JSON object {{"class": ["sentence", ...]}}')
    texts = {}
    for name, sentences in found.items():
        sentences = [sentences] if isinstance(sentences, str) else sentences
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise UserError(f"{path}: what stands under {name!r} is not a list of sentences")
        texts[name] = sentences
    return texts


def _read_folder(path: Path) -> dict[str, list[str]]:
    files = sorted(path.glob("*.txt"))
    if not files:
        raise UserError(f"{path}: holds no .txt files; it should have one for each class, CLASS.txt")
    return {file.stem: read_text(file).split("\n") for file in files}


def _sorted_in(found: Mapping[str, Sequence[str]], classes: Sequence[str], *, where: Path) -> list[list[str]]:
    """``found`` in the order of ``classes``."""
    place = {_plain(name): number for number, name in enumerate(classes)}
    texts: list[list[str]] = [[] for _ in classes]
    for name, sentences in found.items():
        if _plain(name) not in place:
            near = difflib.get_close_matches(_plain(name), place, n=1)
            hint = f"; is it {classes[place[near[0]]]!r}?" if near else ""
            raise UserError(f"{where}: texts about {name!r}, which is no class of the images{hint}")
        kept = [text for sentence in sentences if (text := clean(sentence))]
        if not kept:
            raise UserError(f"{where}: no text about {name!r}: write at least one")
        texts[place[_plain(name)]] += kept
    for name, kept in zip(classes, texts, strict=True):
        if not kept:
            raise UserError(f"{where}: no text about the class {name!r}: add some, or leave its images out")
    return texts


def _spoken(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _plain(name: str) -> str:
    return _spoken(name.replace("-", " ")).casefold()
