"""What belongs to an image, by the names of files: one rule for folders and for the members of tars.

A side-car is a text (`.txt`, `.text`, `.caption`), a `.json` or a class (`.cls`, `.class`). It belongs to the image

1. of its own name up to the last dot: `a.txt` to `a.jpg`, `20.05.txt` to `20.05.jpg`;
2. whose whole name it carries: `a.jpg.txt` to `a.jpg`;
3. of its own name up to the first dot, as in WebDataset, if what follows is a word that several names have:
   `a.outputs.txt` to `a.input.jpg` where there are `b.outputs.txt` and `b.input.jpg`, but never `IMG.2020.02.txt` to
   `IMG.2020.01.jpg`.

Suffixes in capitals are the same, and so are the two ways in which Unicode writes an accent. What belongs to no image
is not used and is named in the notes of the source. What could belong to several images is refused. The mask of an
image (`a_mask.png` or `a.mask.png` beside `a.jpg`, `masks/a.png` beside `images/a.jpg`) is no image of its own, nor is
a copy in another size (`a-150x150.jpg` beside `a.jpg`, `thumbs/a.jpg` beside `images/a.jpg`) without side-cars.
"""

import json
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.sources.columns import (
    CAPTION_NAMES,
    Columns,
    Found,
    captions_of,
    find_fields,
    is_missing,
    label_of,
    notes_on_labels,
    usual,
    written_captions,
)
from diptych.data.sources.decode import SUFFIXES, ImageLimits, decode
from diptych.data.sources.paths import with_slashes
from diptych.data.sources.rows import TABLE_SUFFIXES
from diptych.data.sources.table import (
    counted,
    sample_columns,
    select_split,
    some,
    split_notes,
    unlabelled_notes,
    unsplit_notes,
)
from diptych.data.sources.text import clean, decode_text, notes_on_lines, notes_on_texts, says_missing
from diptych.errors import UserError

IMAGE, TEXT, JSON, CLASS = range(4)
"""The kinds of files that a sample may have, one of each."""
TEXT_SUFFIXES = (".txt", ".text", ".caption")
_KINDS = {**dict.fromkeys(TEXT_SUFFIXES, TEXT), ".json": JSON, ".cls": CLASS, ".class": CLASS}
_SHOWN = {TEXT: "txt", JSON: "json", CLASS: "cls"}
_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "#recycle"})
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_BOXES = re.compile(r"(\s*\d+(\s+-?[\d.]+){4,}\s*)+")
"""Lines of a class and a box, as detectors have them."""
_MASK_END = re.compile(
    r"[ ._-]+(masks?|masklabel|condlabel|seg|segmentation|segmap|segmask|trimap|matte|gt|depth|normals?|canny|edges"
    r"|lineart|(?:open)?pose|labelids|instanceids)([ ._-]?\d+)?$",
    re.IGNORECASE,
)
"""What the name of a mask has behind the name of its image."""
_MASKS = re.compile(
    r"mask|label|labels(tr|ts)|(train|val|test)annot|"
    r"(.*[ _-])?(masks|labels|annotations?|trimaps|mattes|segmentations?|segmentation(class(aug)?|object)"
    r"|ground[ _-]?truth|gt(fine|coarse)?|depths?)",
    re.IGNORECASE,
)
"""Folders of masks."""
_MASKS_OF = re.compile(r"(?<=[^/])[ _-]?(masks|labels|annot(ations?)?)$", re.IGNORECASE)
"""What the name of a folder of masks has behind that of the folder of their images, as in `train_masks`."""
_LABEL_END = re.compile(r"[ ._-](l|labels?)$", re.IGNORECASE)
"""What the name of a mask may have at its end too, in a folder of masks."""
_COPY_END = re.compile(
    r"([ ._-](\d+x\d+|scaled|resized|small|medium|large|preview|thumb(nail)?)|@\d+(\.\d+)?x)$", re.IGNORECASE
)
"""What the name of a copy in another size has behind the name of its image, as WordPress and others write it."""
_COPIES = re.compile(r"(.*[ _-])?(thumb(nail)?s?|previews?|resized?|compressed|small|\d+px|\d+x\d+)", re.IGNORECASE)
"""Folders of smaller copies."""
_LOSSLESS = frozenset({".png", ".gif", ".bmp", ".tif", ".tiff"})
_SAMPLE = 64
"""Number of samples whose texts and json are read when a source is opened."""
_MANY = 100_000
"""Largest number of .json files that are read in search of captions when a source is opened."""


@dataclass(slots=True)
class Groups:
    """Samples as numbers of names, and the names that belong to none."""

    keys: list[str] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    """For each sample the image, the text, the json and the class; -1 where there is none."""
    lone: list[int] = field(default_factory=list)
    """Side-cars whose image is missing."""
    second: list[int] = field(default_factory=list)
    """Side-cars whose image has another one of their kind."""
    unused: list[int] = field(default_factory=list)
    """Files of other kinds."""
    masks: list[int] = field(default_factory=list)
    """Images that are masks of others, or copies of them in another size."""
    texts_named: bool = False
    """Whether the user named the texts by their extension, and not a field of the json."""


def group(names: Sequence[str], columns: Columns, *, source: str) -> Groups:
    """The images among ``names``, each with its side-cars.

    ``columns.image`` may name the extension of the images, such as `left.png`, and ``columns.caption`` the one of the
    texts. Raises UserError for a side-car that could belong to several images.
    """
    found = Groups()
    # Names that no file ends in are those of columns or fields, for tables or json.
    extension, texts = (
        ending if ending and any(name.lower().endswith(ending) for name in names) else ""
        for ending in (_extension(columns.image), _text_extension(columns))
    )
    found.texts_named = bool(texts)
    images: list[int] = []
    sidecars: list[tuple[int, int]] = []
    for number, name in enumerate(names):
        base = os.path.basename(name)
        if is_hidden(name):
            continue
        kind = _kind(base.lower(), extension, texts)
        if kind == IMAGE:
            images.append(number)
        elif kind is None:
            found.unused.append(number)
        else:
            sidecars.append((number, kind))

    if not extension:
        having = {os.path.splitext(_normal(names[number]))[0] for number, _ in sidecars}
        masks = {images[place] for place in _find_masks([_normal(names[number]) for number in images], having)}
        found.masks = sorted(masks)
        images = [number for number in images if number not in masks]
    by_stem, by_name, by_key = (defaultdict(list) for _ in range(3))
    for sample, number in enumerate(images):
        name = _normal(names[number])
        by_stem[name[: -len(extension)] if extension else os.path.splitext(name)[0]].append(sample)
        by_name[name].append(sample)
        by_key[_first_dot(name)].append(sample)
        found.slots.append([number, -1, -1, -1])
    found.keys = _keys([_normal(names[number]) for number in images], by_stem, by_key)

    refused: list[str] = []

    def give(number: int, kind: int, owners: list[int]) -> None:
        if len(owners) > 1:
            shown = " and ".join(os.path.basename(names[images[owner]]) for owner in owners[:2])
            refused.append(f"{names[number]}: belongs to {len(owners)} images, such as {shown}")
        elif found.slots[owners[0]][kind] < 0:
            found.slots[owners[0]][kind] = number
        else:
            found.second.append(number)

    # All of a rule before any of the next one: `a.jpg.txt` and `a.old.txt` must not take the place of `a.txt`.
    left: list[tuple[int, int]] = []
    stems = {number: os.path.splitext(_normal(names[number]))[0] for number, _ in sidecars}
    for number, kind in sorted(sidecars, key=lambda each: stems[each[0]] not in by_stem):
        stem = stems[number]
        if owners := by_stem.get(stem) or by_name.get(stem):
            give(number, kind, owners)
        else:
            left.append((number, kind))
    keys_of = defaultdict(set)
    for number in (*images, *(number for number, _ in left)):
        keys_of[_after_key(names[number])].add(_first_dot(_normal(names[number])))
    few = len({_first_dot(_normal(names[number])) for number in images}) < 2

    def is_extension(number: int) -> bool:
        rest = _after_key(names[number])
        return not rest or (_WORD.fullmatch(rest) is not None and (few or len(keys_of[rest]) > 1))

    # Of `a.tags.txt` and `a.caption.txt` the second is the text.
    for number, kind in sorted(left, key=lambda each: not usual(_after_key(names[each[0]]), CAPTION_NAMES)):
        owners = by_key.get(_first_dot(_normal(names[number])))
        if owners and is_extension(number) and all(is_extension(images[owner]) for owner in owners):
            give(number, kind, owners)
        else:
            found.lone.append(number)
    if refused:
        more = f", and {len(refused) - 1} more files likewise" if len(refused) > 1 else ""
        raise UserError(
            f"{source}: {refused[0]}{more}; rename one, or choose the images with ?image=EXTENSION behind the source"
        )
    return found


def _find_masks(names: Sequence[str], having: set[str]) -> list[int]:
    """Which of these images are masks of others or copies of them in another size, by their names or those of their
    folders. What is among the names ``having`` side-cars is no copy."""
    stems = [os.path.splitext(name)[0] for name in names]
    known = set(stems)
    masks = {
        place
        for place, stem in enumerate(stems)
        for end in (_MASK_END, _COPY_END)
        if (mask := end.search(stem)) and stem[: mask.start()] in known and (end is _MASK_END or stem not in having)
    }
    folders: dict[str, list[tuple[int, str]]] = defaultdict(list)
    others: dict[str, set[str]] = defaultdict(set)
    for place, stem in enumerate(stems):
        parts = stem.split("/")
        at = max(
            (i for i, part in enumerate(parts[:-1]) if _MASKS.fullmatch(part) or _COPIES.fullmatch(part)), default=None
        )
        if at is not None:
            tail = _LABEL_END.sub("", _MASK_END.sub("", "/".join(parts[at + 1 :])))
            folders["/".join(parts[: at + 1])].append((place, _without(tail, parts[at])))
    if folders:
        inside = {place for members in folders.values() for place, _ in members}
        for place, stem in enumerate(stems):
            parts = stem.split("/") if place not in inside else []
            for i in range(len(parts)):
                tail = "/".join(parts[i:]).removesuffix("_0000")  # the first channel, as nnU-Net numbers them
                others[_without(tail, parts[i - 1]) if i else tail].add("/".join(parts[:i]))
    used = {os.path.dirname(stem) for stem in stems}
    for folder, members in folders.items():
        beside, of = os.path.dirname(folder), _MASKS_OF.sub("", folder)

        def is_of_one(tail: str, beside: str = beside, of: str = of) -> bool:
            if of in others[tail]:
                return True
            near = [each for each in others[tail] if not beside or each == beside or each.startswith(beside + "/")]
            return len(near or others[tail]) == 1

        lossless = all(os.path.splitext(names[place])[1].lower() in _LOSSLESS for place, _ in members)
        small = _COPIES.fullmatch(os.path.basename(folder)) and not any(stems[place] in having for place, _ in members)
        partners = [place for place, tail in members if is_of_one(tail)]
        # A folder with a few partners by chance may be a class, such as photographs of masks, and so may one beside
        # `no_mask`.
        base = os.path.basename(folder)
        if any(os.path.join(beside, each + base) in used for each in ("no", "no_", "no-", "no ", "without_")):
            continue
        if (lossless or small) and 10 * len(partners) >= 9 * len(members):
            masks.update(partners)
    return sorted(masks)


def _without(tail: str, folder: str) -> str:
    """A name without that of its folder and what follows, as `a_gtFine_labelIds` in the folder gtFine."""
    stem, found, _ = tail.rpartition("_" + folder)
    return stem if found else tail


def group_texts(names: Sequence[str], lone: Sequence[int]) -> Groups:
    """Samples without images, from side-cars: for sources that hold texts alone."""
    found = Groups()
    kinds = [(number, _KINDS[os.path.splitext(names[number].lower())[1]]) for number in lone]
    per_key = Counter((_first_dot(_normal(names[number])), kind) for number, kind in kinds)
    at: dict[str, int] = {}
    for number, kind in kinds:
        name = _normal(names[number])
        key = _first_dot(name)
        if per_key[key, kind] > 1:
            key = os.path.splitext(name)[0]
        sample = at.setdefault(key, len(found.keys))
        if sample == len(found.keys):
            found.keys.append(key)
            found.slots.append([-1] * 4)
        if found.slots[sample][kind] < 0:
            found.slots[sample][kind] = number
        else:
            found.second.append(number)
    return found


def _extension(name: str | None) -> str:
    return "." + name.lower().lstrip(".") if name else ""


def _kind(base: str, image_extension: str, text_extension: str) -> int | None:
    suffix = os.path.splitext(base)[1]
    if image_extension:
        if base.endswith(image_extension):
            return IMAGE
    elif suffix in SUFFIXES:
        return IMAGE
    kind = _KINDS.get(suffix)
    return None if kind == TEXT and not base.endswith(text_extension) else kind


def _text_extension(columns: Columns) -> str:
    """The extension of texts that the user named, such as `.outputs.txt`; empty where it can only be a field."""
    extension = _extension(columns.caption)
    return extension if extension.endswith(TEXT_SUFFIXES) else ""


def _normal(name: str) -> str:
    return with_slashes(name if name.isascii() else unicodedata.normalize("NFC", name))


def _first_dot(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _after_key(name: str) -> str:
    """What is between the first dot and the last, such as `input` of `a.input.jpg`."""
    return os.path.splitext(os.path.basename(name).partition(".")[2])[0] if name.count(".") > 1 else ""


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it is in, is hidden or made by a system for itself."""
    return any((part.startswith(".") and part != "..") or part.lower() in _SYSTEM for part in name.split("/"))


def _keys(names: list[str], by_stem: dict[str, list[int]], by_key: dict[str, list[int]]) -> list[str]:
    """The shortest name of each image that no other image has."""
    keys = []
    for name in names:
        stem, key = os.path.splitext(name)[0], _first_dot(name)
        keys.append(key if len(by_key[key]) == 1 else stem if len(by_stem.get(stem, ())) == 1 else name)
    return keys


def unused_notes(
    lone: Sequence[str], second: Sequence[str], unused: Sequence[str], masks: Sequence[str], *, packed: bool
) -> list[str]:
    """What the owner of a source should know of the files that are not used, by their part in `Groups`.

    ``packed`` files lie inside tars.
    """
    texts = [name for name in lone if os.path.splitext(name)[1].lower() != ".json"]
    others = [*(name for name in lone if os.path.splitext(name)[1].lower() == ".json"), *unused]
    notes = []
    if masks:
        shown = some(sorted(masks), len(masks))
        notes.append(f"{counted(len(masks), 'image')} not used, as masks or copies of others: {shown}")
    if texts:
        notes.append(f"{counted(len(texts), 'text')} without an image of that name not used: {some(texts, len(texts))}")
    if second:
        shown = some(second, len(second))
        notes.append(f"{counted(len(second), 'file')} not used, as another of the kind belongs to the image: {shown}")
    if others:
        table = any(os.path.splitext(name)[1].lower() in TABLE_SUFFIXES for name in others)
        hint = f"; a table of captions is a source of its own{', once it is unpacked' * packed}" if table else ""
        notes.append(f"{counted(len(others), 'other file')} not used: {some(others, len(others))}{hint}")
    return notes


class SampleSource(ABC):
    """Images with side-cars. Where they lie, in a folder or in tars, is what the two subclasses know."""

    def __init__(
        self,
        keys: list[str],
        slots: np.ndarray,
        *,
        name: str,
        labels: list[str | None],
        splits: Sequence[str | None],
        columns: Columns,
        split: str | None,
        limits: ImageLimits,
        notes: list[str],
        texts_named: bool,
    ):
        """``slots`` [N, 4] are as in `Groups`; ``labels`` and ``splits`` are what the folders of the samples say."""
        self.name, self.notes = name, notes
        self._limits, self._keys, self._slots, self._labels = limits, keys, slots, labels
        self.notes += notes_on_labels([label for label in labels if label is not None])
        self._drop_boxes()
        self._by_text = columns.caption is None or texts_named
        self._found = self._fields(columns)
        if columns.caption == "" or (self._found and not self._by_text):  # a field that is named, or none at all
            self._slots[:, TEXT] = -1
        elif not self._found:
            self._by_text = True  # the name is that of a column of another source
        self.has_images = self._any(IMAGE)
        self.has_captions = self._any(TEXT) or bool(self._found and self._found.captions)
        self._take_split(split, splits)
        self.notes += self._notes_on_side_cars() + self._notes_on_names()

    def _notes_on_names(self) -> list[str]:
        """A note on images without side-cars that are called like others, which have some: they may be copies."""
        having = np.any(self._slots[:, TEXT:] >= 0, axis=1)
        if having.all() or not having.any():
            return []
        stems = [os.path.splitext(os.path.basename(key))[0] for key in self._keys]
        known = {stem for stem, has_some in zip(stems, having, strict=True) if has_some}
        found = [self._keys[i] for i in np.flatnonzero(~having) if stems[i] in known]
        return (
            [f"{counted(len(found), 'image')} without a text called like one that has it: {some(found, len(found))}"]
            if found
            else []
        )

    @abstractmethod
    def block(self, i: int) -> tuple[int, bytes]:
        """As `HasBlocks.block`."""

    @abstractmethod
    def _read(self, member: int) -> bytes:
        """The content of a file by its number in the groups."""

    def _any(self, kind: int) -> bool:
        return bool(np.any(self._slots[:, kind] >= 0))

    def _drop_boxes(self) -> None:
        """Take no texts for captions that hold boxes, as those of detectors do."""
        having = np.flatnonzero(self._slots[:, TEXT] >= 0)
        some_items = having[:: max(1, len(having) // 16)]
        contents = [self._read(int(self._slots[i, TEXT])) for i in some_items]
        written = [content.decode("utf-8", "replace") for content in contents if content.strip()]
        if written and all(map(_BOXES.fullmatch, written)):
            self._slots[:, TEXT] = -1
            self.notes.append(f"{counted(len(having), 'text')} with boxes not used: they hold no captions")

    def _fields(self, columns: Columns) -> Found | None:
        """The json fields that hold captions, label and split; captions only of samples that have no text."""
        having = np.flatnonzero(self._slots[:, JSON] >= 0)
        if not len(having):
            return None
        wanted = columns
        textless = having[self._slots[having, TEXT] < 0]
        if self._by_text:
            wanted = replace(columns, caption=None if len(textless) else "")
            having = textless if len(textless) else having
        spread = [self._json(int(i)) for i in having[:: max(1, len(having) // _SAMPLE)]]
        source = f"{self.name} (fields of its .json members)"
        found = find_fields(sample_columns(spread), wanted=wanted, source=source)
        if wanted.caption is None and not found.captions and len(having) > len(spread):
            every = [self._json(int(i)) for i in having[:: max(1, len(having) // _MANY)]]
            found = find_fields(sample_columns(every), wanted=wanted, source=source)
        self.notes += found.notes
        if not (found.captions or found.label or found.split) and not (columns.caption == columns.label == ""):
            names = sorted({name for fields in spread for name in fields})
            if textless.size:
                self.notes.append(f".json without captions and labels: their fields are {some(names, len(names))}")
        return found

    def _notes_on_side_cars(self) -> list[str]:
        """What a sample of the side-cars says that is not used: other captions in the json, nan for a caption, -1."""
        having = np.flatnonzero((self._slots[:, TEXT:] >= 0).any(1))
        chosen = [int(i) for i in having[:: max(1, len(having) // _SAMPLE)]]
        both, other, nulls, blank = 0, [], 0, 0
        no_labels: list[Any] = []
        two_labels: list[str] = []
        folders = set(self._labels)
        texts: list[str] = []
        lines: list[list[str]] = []
        for i in chosen:
            try:
                fields, text = self._json(i), self._text(i)
                label: Any = self._class(i)
            except UserError:  # it is raised where the item is used
                continue
            nulls += sum(map(says_missing, text.split("\n")))
            written = written_captions(text)
            lines.append([line for line in map(clean, text.split("\n")) if line] if written is None else written)
            texts += lines[-1]
            blank += bool(self._slots[i, TEXT] >= 0) and not text.strip()
            if self._found:
                nulls += sum(says_missing(fields.get(name)) for name in self._found.captions)
                label = label or fields.get(self._found.label or "", "")
            if not is_missing(label) and label_of(label) is None:
                no_labels.append(label)
            elif not is_missing(label) and label_of(label) != self._labels[i] and label_of(label) in folders:
                two_labels.append(f"{self._keys[i]} ({label_of(label)}, {self._labels[i]})")
            said = {name: captions_of(value) for name, value in fields.items() if usual(name, CAPTION_NAMES)}
            if self._by_text and text.strip() and any(said.values()):
                both += 1
                captions = set(self.captions(i))
                if not any(captions & set(values) for values in said.values()):
                    other.append(next(name for name, values in said.items() if values))
        of = f"of {len(chosen):,} that were looked at"
        notes = [f"{counted(blank, 'text')} {of} {'is' if blank == 1 else 'are'} empty"] if blank else []
        if other:
            notes.append(
                f"{len(other):,} of {both:,} .json that were looked at have other captions than the text beside them, "
                f"which is used; choose with ?caption={other[0]}"
            )
        if nulls:
            notes.append(f"{counted(nulls, 'caption')} such as nan or null {of} taken for missing")
        notes += notes_on_texts(texts) + notes_on_lines(lines)
        notes += [f"{note} ({of})" for note in unlabelled_notes(no_labels)]
        if two_labels:
            shown = some(two_labels, len(two_labels))
            notes.append(
                f"{counted(len(two_labels), 'image')} {of} with two labels, the first of its own file: {shown}"
            )
        return notes

    def _take_split(self, split: str | None, folders: Sequence[str | None]) -> None:
        field = self._found.split if self._found else None
        if split is None:
            some_items = range(0, len(self), max(1, len(self) // 64))
            self.notes += split_notes([self._json(i).get(field) for i in some_items] if field else folders)
            self.notes += [] if field else unsplit_notes(folders)
            return
        values = [self._json(i).get(field) for i in range(len(self))] if field else folders
        chosen = select_split(values, split, source=self.name)
        self.notes += unsplit_notes(values, split)
        self._keys = [self._keys[i] for i in chosen]
        self._labels = [self._labels[i] for i in chosen]
        self._slots = self._slots[chosen]

    def _json(self, i: int) -> dict[str, Any]:
        member = int(self._slots[i, JSON])
        if member < 0:
            return {}
        place = self._place(i, JSON)
        try:
            fields = json.loads(decode_text(self._read(member), name=place))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place} is not JSON ({error})") from None
        if isinstance(fields, str | list):
            fields = {"captions": fields}
        if not isinstance(fields, dict):
            raise UserError(f"{place} is not a JSON object {{...}}")
        return fields

    def _text(self, i: int) -> str:
        """The content of the text; empty where there is none."""
        member = int(self._slots[i, TEXT])
        return decode_text(self._read(member), name=self._place(i, TEXT)) if member >= 0 else ""

    def _class(self, i: int) -> str:
        """The content of the class; empty where there is none."""
        member = int(self._slots[i, CLASS])
        return clean(decode_text(self._read(member), name=self._place(i, CLASS))) if member >= 0 else ""

    def _place(self, i: int, kind: int) -> str:
        """What messages call a side-car."""
        return f"{self.name}: {self._keys[i]}.{_SHOWN[kind]}"

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> list[str]:
        """A caption per line of the text; else what the fields of the json say.

        A text of several lines that the json repeats as one caption, as img2dataset writes both, is one caption.
        """
        if self._slots[i, TEXT] >= 0:
            content = self._text(i)
            if (written := written_captions(content)) is not None:
                return written
            lines = [text for line in content.split("\n") if (text := clean(line)) and not says_missing(text)]
            if len(lines) > 1 and self._slots[i, JSON] >= 0:
                whole = clean(content)
                if whole in [text for value in self._json(i).values() for text in captions_of(value)]:
                    return [whole]
            if lines:
                return lines
        fields = self._json(i)
        names = [name for name in (self._found.captions if self._found else ()) if not is_missing(fields.get(name))]
        if not names and self._by_text:  # a json unlike the others, or one beside an empty text
            names = [name for name in fields if usual(name, CAPTION_NAMES)][:1]
        return [text for name in names for text in captions_of(fields[name])]

    def file(self, i: int) -> Path | bytes:
        return self._read(int(self._slots[i, IMAGE]))

    def image(self, i: int, size: int) -> np.ndarray:
        if not self.has_images:
            raise UserError(f"{self.name}: holds no images")
        return decode(self.file(i), size, name=f"{self.name}: {self._keys[i]}", limits=self._limits)

    def label(self, i: int) -> str | None:
        """The content of `key.cls`, else the json field of the label, else the folder of the image."""
        if self._slots[i, CLASS] >= 0:
            return label_of(self._class(i))
        if self._found and self._found.label:
            label = label_of(self._json(i).get(self._found.label))
            if label is not None:
                return label
        return self._labels[i]
