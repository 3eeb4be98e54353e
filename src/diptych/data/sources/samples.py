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

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from diptych.data.sources.columns import (
    CAPTION_NAMES,
    Columns,
    usual,
)
from diptych.data.sources.decode import SUFFIXES
from diptych.data.sources.paths import with_slashes
from diptych.data.sources.rows import TABLE_SUFFIXES
from diptych.data.sources.table import (
    counted,
    some,
)
from diptych.errors import UserError

IMAGE, TEXT, JSON, CLASS = range(4)
"""The kinds of files that a sample may have, one of each."""
TEXT_SUFFIXES = (".txt", ".text", ".caption")
_KINDS = {**dict.fromkeys(TEXT_SUFFIXES, TEXT), ".json": JSON, ".cls": CLASS, ".class": CLASS}
_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "#recycle"})
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
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
    # Names that no file ends in are those of columns or fields, for tables or json.
    extension, texts = (
        ending if ending and any(name.lower().endswith(ending) for name in names) else ""
        for ending in (_extension(columns.image), _text_extension(columns))
    )
    grouping = _Grouping(names, Groups(texts_named=bool(texts)))
    sidecars = grouping.sort_by_kind(extension, texts)
    if not extension:
        grouping.leave_out_masks(sidecars)
    grouping.index_images(extension)
    # All of a rule before any of the next one: `a.jpg.txt` and `a.old.txt` must not take the place of `a.txt`.
    grouping.give_by_first_dot(grouping.give_by_name(sidecars))
    if refused := grouping.refused:
        more = f", and {len(refused) - 1} more files likewise" if len(refused) > 1 else ""
        raise UserError(
            f"{source}: {refused[0]}{more}; rename one, or choose the images with ?image=EXTENSION behind the source"
        )
    return grouping.found


class _Grouping:
    """The steps of `group`. Files are numbers in ``names``, and a side-car is such a number with its kind."""

    def __init__(self, names: Sequence[str], found: Groups) -> None:
        self.names, self.found = names, found
        self.refused: list[str] = []
        """Side-cars that could belong to several images, in words for a message."""
        self._normal = [_normal(name) for name in names]
        self._images: list[int] = []

    def sort_by_kind(self, extension: str, texts: str) -> list[tuple[int, int]]:
        """Find the images and the files of no use; return the side-cars."""
        sidecars = []
        for number, name in enumerate(self.names):
            if is_hidden(name):
                continue
            kind = _kind(os.path.basename(name).lower(), extension, texts)
            if kind == IMAGE:
                self._images.append(number)
            elif kind is None:
                self.found.unused.append(number)
            else:
                sidecars.append((number, kind))
        return sidecars

    def leave_out_masks(self, sidecars: Sequence[tuple[int, int]]) -> None:
        having = {self._stem(number) for number, _ in sidecars}
        masks = {self._images[place] for place in _find_masks([self._normal[i] for i in self._images], having)}
        self.found.masks = sorted(masks)
        self._images = [number for number in self._images if number not in masks]

    def index_images(self, extension: str) -> None:
        """Make a sample of each image, and note the samples by the names that their side-cars may have."""
        self._by_stem, self._by_name, self._by_key = (defaultdict(list) for _ in range(3))
        for sample, number in enumerate(self._images):
            name = self._normal[number]
            self._by_stem[name[: -len(extension)] if extension else self._stem(number)].append(sample)
            self._by_name[name].append(sample)
            self._by_key[_first_dot(name)].append(sample)
            self.found.slots.append([number, -1, -1, -1])
        self.found.keys = _keys([self._normal[number] for number in self._images], self._by_stem, self._by_key)

    def give_by_name(self, sidecars: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Rules 1 and 2: give each side-car to the image of its own name; return those without such an image."""
        left = []
        for number, kind in sorted(sidecars, key=lambda each: self._stem(each[0]) not in self._by_stem):
            stem = self._stem(number)
            if owners := self._by_stem.get(stem) or self._by_name.get(stem):
                self._give(number, kind, owners)
            else:
                left.append((number, kind))
        return left

    def give_by_first_dot(self, sidecars: Sequence[tuple[int, int]]) -> None:
        """Rule 3: give each side-car to the image of its name up to the first dot; the others are lone."""
        keys_of = defaultdict(set)
        for number in (*self._images, *(number for number, _ in sidecars)):
            keys_of[_after_key(self.names[number])].add(_first_dot(self._normal[number]))
        few = len({_first_dot(self._normal[number]) for number in self._images}) < 2

        def is_extension(number: int) -> bool:
            rest = _after_key(self.names[number])
            return not rest or (_WORD.fullmatch(rest) is not None and (few or len(keys_of[rest]) > 1))

        # Of `a.tags.txt` and `a.caption.txt` the second is the text.
        for number, kind in sorted(
            sidecars, key=lambda each: not usual(_after_key(self.names[each[0]]), CAPTION_NAMES)
        ):
            owners = self._by_key.get(_first_dot(self._normal[number]))
            if owners and is_extension(number) and all(is_extension(self._images[owner]) for owner in owners):
                self._give(number, kind, owners)
            else:
                self.found.lone.append(number)

    def _give(self, number: int, kind: int, owners: list[int]) -> None:
        slots = self.found.slots[owners[0]]
        if len(owners) > 1:
            shown = " and ".join(os.path.basename(self.names[self._images[owner]]) for owner in owners[:2])
            self.refused.append(f"{self.names[number]}: belongs to {len(owners)} images, such as {shown}")
        elif slots[kind] < 0:
            slots[kind] = number
        else:
            self.found.second.append(number)

    def _stem(self, number: int) -> str:
        """The name of a file up to the last dot."""
        return os.path.splitext(self._normal[number])[0]


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
    folders = _mask_folders(stems)
    if not folders:
        return sorted(masks)
    others = _folders_of_others(stems, {place for members in folders.values() for place, _ in members})
    used = {os.path.dirname(stem) for stem in stems}
    for folder, members in folders.items():
        beside, base = os.path.split(folder)
        # One beside `no_mask` is a class.
        if any(os.path.join(beside, each + base) in used for each in ("no", "no_", "no-", "no ", "without_")):
            continue
        lossless = all(os.path.splitext(names[place])[1].lower() in _LOSSLESS for place, _ in members)
        small = _COPIES.fullmatch(base) and not any(stems[place] in having for place, _ in members)
        partners = [place for place, tail in members if _is_of_one(folder, others[tail])]
        # A folder with a few partners by chance may be a class, such as photographs of masks.
        if (lossless or small) and 10 * len(partners) >= 9 * len(members):
            masks.update(partners)
    return sorted(masks)


def _mask_folders(stems: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
    """The folders that are called like those of masks or copies, with the images in them: their places in ``stems``,
    and their names below the folder without what only masks have."""
    folders: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for place, stem in enumerate(stems):
        parts = stem.split("/")
        called = [i for i, part in enumerate(parts[:-1]) if _MASKS.fullmatch(part) or _COPIES.fullmatch(part)]
        if called:
            at = called[-1]
            tail = _LABEL_END.sub("", _MASK_END.sub("", "/".join(parts[at + 1 :])))
            folders["/".join(parts[: at + 1])].append((place, _without(tail, parts[at])))
    return folders


def _folders_of_others(stems: Sequence[str], inside: set[int]) -> dict[str, set[str]]:
    """The folders of the images that do not lie ``inside`` those of masks, by every name that they have below one."""
    others: dict[str, set[str]] = defaultdict(set)
    for place, stem in enumerate(stems):
        parts = stem.split("/") if place not in inside else []
        for i in range(len(parts)):
            tail = "/".join(parts[i:]).removesuffix("_0000")  # the first channel, as nnU-Net numbers them
            others[_without(tail, parts[i - 1]) if i else tail].add("/".join(parts[:i]))
    return others


def _is_of_one(folder: str, owners: set[str]) -> bool:
    """Whether a file in a folder of masks belongs to one image, given the folders that have an image of its name."""
    if _MASKS_OF.sub("", folder) in owners:
        return True
    beside = os.path.dirname(folder)
    near = [each for each in owners if not beside or each == beside or each.startswith(beside + "/")]
    return len(near or owners) == 1


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
