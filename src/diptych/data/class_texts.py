"""Texts about classes: from templates, from a JSON file of descriptions, or from a folder with a text file per class.
Also here: the names of classes whose labels are codes.

A text has the label of the class it is about. It belongs to no image in particular.

Shapes: T texts.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from diptych.data.sources.text import clean, is_json, read_text
from diptych.errors import UserError
from diptych.rng import derive_seed

_CODE = re.compile(r"(class|label|category|cls|id|[a-z])?[\W_]*\d[\d\W_]*", re.IGNORECASE)

_NUMBERED = re.compile(r"\d+[ .,;:-]+(?=\D)")
_CODED = re.compile(r"([^\s,;:]+)(?:\s*[,;:]\s*|\s+)(.*)")
"""A label, or its code, and a name behind it."""

Shots = int | Literal["all", "mean"]
"""Texts of a class to learn from: a number of random ones, all, or the mean of the features of all."""


def from_templates(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The texts of each class: every template with the class's name in place of its {}.

    Underscores in names become spaces, and numbers in front of all names, as in `001.Black_footed_Albatross`, are left
    out. Raises UserError without templates, and for a template without {}.
    """
    if not templates:
        raise UserError('no template for texts about the classes is given: give one, e.g. "a photo of a {}."')
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the template {template!r} has no {{}} where the name of the class should stand")
    names = [_spoken(name) for name in classes]
    if all(map(_NUMBERED.match, names)):
        names = [_NUMBERED.sub("", name) for name in names]
    return [[template.replace("{}", name) for template in templates] for name in names]


def read_class_texts(path: str | Path, classes: Sequence[str]) -> list[list[str]]:
    """The texts of each class from a JSON file {class: [sentence, ...]} or a folder of CLASS.txt with a text a line.

    Names are compared without regard to case, hyphens and underscores. Raises UserError for a class without texts,
    for texts of an unknown class, and for files that hold none.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a JSON file of descriptions or a folder with a text per class")
    return _in_order(_read_folder(path) if path.is_dir() else _read_json(path), classes, where=path)


def are_codes(labels: Iterable[str]) -> bool:
    """Whether all labels are numbers or codes such as n01440764 or class_7, which say nothing about their class."""
    return all(_CODE.fullmatch(label.strip()) for label in labels)


@dataclass(frozen=True, slots=True)
class ClassNames:
    """Different names, and the place among them of each label."""

    names: tuple[str, ...]
    place: dict[str, int]


def read_names(path: Path) -> list[str]:
    """The clean lines of a file with the name of a class on each line. Raises UserError when it holds none, and for
    JSON."""
    content = read_text(path)
    lines = [text for line in content.split("\n") if (text := clean(line))]
    if is_json(content):
        raise UserError(f"{path}: holds JSON: write one class name a line")
    if not lines:
        raise UserError(f"{path}: is empty: write one class name a line")
    return lines


def name_classes(path: Path, labels: Sequence[str]) -> ClassNames:
    """The names of classes from a file with a class a line, and which of them each of ``labels`` means.

    A line is the name of a label itself, or a label, a space (or a comma, a colon) and a name. Else labels that are
    numbers count the lines from 0, and other codes stand, sorted, for the lines in their order if there are as many.
    Lines of the same name are one class: no text tells them apart. Raises UserError where a label has no line.
    """
    lines = read_names(path)
    plain = {_plain(line): line for line in lines}
    coded = {parts[1]: parts[2] for line in lines if (parts := _CODED.fullmatch(line))}
    if all(_plain(label) in plain for label in labels):
        found = {label: plain[_plain(label)] for label in labels}
    elif all(coded.get(label) for label in labels):
        found, lines = {label: coded[label] for label in labels}, list(coded.values())
    elif all(label.strip().isdecimal() and int(label) < len(lines) for label in labels):
        found = {label: lines[int(label)] for label in labels}
    elif are_codes(labels) and not any(label.strip().isdecimal() for label in labels) and len(labels) == len(lines):
        found = dict(zip(sorted(labels), lines, strict=True))
    else:
        unknown = next((label for label in labels if _plain(label) not in plain), labels[0])
        raise UserError(
            f"{path}: names {len(lines)} classes, and none of its lines is for the label {unknown!r}: write a name a "
            "line, in the order of labels that count from 0, or the label, a space and its name"
        )
    names = tuple(dict.fromkeys(_spoken(line) for line in lines))
    place = {name: number for number, name in enumerate(names)}
    return ClassNames(names, {label: place[_spoken(name)] for label, name in found.items()})


def texts_of(spec: str | None, classes: Sequence[str], *, templates: Sequence[str]) -> list[list[str]]:
    """The texts of each class: `read_class_texts` of the path ``spec``, or `from_templates` where it is None."""
    return from_templates(classes, templates) if spec is None else read_class_texts(spec, classes)


def choose_texts(labels_T: np.ndarray, shots: int, *, seed: int) -> np.ndarray:
    """Sorted indices of ``shots`` random texts of every class, or of all its texts where a class has fewer.

    Raises UserError for less than one shot.
    """
    if shots < 1:
        raise UserError(f"{shots} texts of a class leave nothing to learn from: give 1 or more, all or mean")
    chosen = []
    for label in np.unique(labels_T):
        generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "class texts", int(label))))
        chosen.append(generator.permutation(np.flatnonzero(labels_T == label))[:shots])
    return np.sort(np.concatenate(chosen))


def permuted(classes: int, *, seed: int) -> np.ndarray:
    """Another class for each class, no two the same, for the control experiment with texts about other classes.

    Raises UserError for fewer than two classes.
    """
    if classes < 2:
        raise UserError("one class alone cannot get the texts of another: there must be two classes or more")
    order = np.random.Generator(np.random.PCG64(derive_seed(seed, "permuted classes"))).permutation(classes)
    other = np.empty(classes, np.int64)
    other[order] = np.roll(order, 1)  # one ring through all classes
    return other


def _read_json(path: Path) -> dict[str, list[str]]:
    wanted = '{"class": ["sentence", ...]}, or a folder with a file CLASS.txt for each class'
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({error}): give a file with {wanted}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a JSON object: give {wanted}")
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


def _in_order(found: Mapping[str, Sequence[str]], classes: Sequence[str], *, where: Path) -> list[list[str]]:
    """The clean texts of ``found`` in the order of ``classes``. Raises as `read_class_texts`."""
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
