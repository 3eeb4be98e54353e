"""Which columns of a table hold the image, the captions and the label: as named, else by type and usual name."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diptych.data.sources.decode import is_image_path
from diptych.data.sources.text import (
    INNER,
    SEPARATORS,
    WRITTEN,
    begins_with_image,
    captions_of,
    count_words,
    is_conversation,
    is_json,
    is_missing,
    notes_on_texts,
    says_missing,
    written_out,
)
from diptych.errors import UserError

Role = Literal["image", "caption", "label"]
Table = Mapping[str, Sequence[Any]]

IMAGE_NAMES = frozenset(
    {"image", "images", "img", "picture", "photo", "jpg", "png", "file", "path"}
    | {"file_name", "filename", "filepath", "file_path", "image_path", "image_file", "image_name", "img_path"}
)
STEM_NAMES = (
    *("image_id", "img_id", "image", "image_name", "filename", "file_name", "filepath", "path", "img", "file"),
    *("photo", "picture", "image_path", "image_file", "img_path", "file_path"),
    *("id", "imgid", "imageid", "uid", "uuid", "key", "name", "stem", "sku"),
)
"""Columns that may name image files without their suffix, the likeliest first."""
CAPTION_NAMES = frozenset(
    {"caption", "text", "sentence", "description", "prompt", "raw", "txt", "alt", "alt_text", "alttext"}
    | {"captions", "texts", "sentences", "descriptions", "prompts", "conversations", "conversation", "messages"}
)
LABEL_NAMES = frozenset(
    {"label", "labels", "class", "classes", "cls", "category"}
    | {"class_name", "classname", "label_name", "label_text", "category_name"}
)
SPLIT_NAMES = frozenset({"split", "partition", "subset", "set"})
FOLDER_NAMES = frozenset({"folder", "dir", "directory", "subfolder", "subdir", "filepath", "image_dir"})
"""Columns that may hold the folder of an image whose name another column holds."""
_NUMBERED = re.compile(r"(caption|text|sentence|description|raw)s?[ _.-]?\d+", re.IGNORECASE)
_SPLIT = re.compile(
    r"(train|training|trainval|val|valid|validation|minival|restval|dev|eval|evaluation|test|testing|test[-_]?dev"
    r"|(public|private)test|hold[-_]?out|held[-_]?out|unlabell?ed)[-_]?(\d{1,4}|images|set|data|[ab])?",
    re.IGNORECASE,
)
_SPLIT_LIKE = re.compile(r"(is[_ ]?)?(train|training|test|testing|val|valid|validation)|k?[_ ]?folds?", re.IGNORECASE)
"""Names of columns that may divide the rows in a way that is not read."""
_LABEL_LIKE = re.compile(
    r"(^|[_ -]|(?<=[a-z])(?=[A-Z]))(labels?|class|categor(y|ies)|target|species|breed)(?![a-z])", re.I
)
_ABOUT = re.compile(
    r"(^|.*[_ .-])(ids?|idx|index|no|key|uuid|uid|urls?|uri|link|width|height|size|sha\d*|md5|hash|checksum"
    r"|error_message|exif|licen[cs]es?|mime_?type|format|bbox|tokens|tokenized)|(img|image|cocoid|sent)ids?|cocoid|url_\w+"
    r"|column \d+|unnamed: \d+|__index_level_\d+__|(original|tokens?)_\w+",
    re.IGNORECASE,
)
"""Names of columns that number items, or tell of their files. Nobody expects them to be read."""
_BASE64 = re.compile(r"data:image/|/9j/|iVBORw0KGgo|UklGR|R0lGOD")
"""How images begin that are written in base64."""
_ENTITY = re.compile(r"&#?\w+;")
_YES_NO = frozenset({"true", "false", "yes", "no", "y", "n", "t", "f"})
_SPLITS, _TOLD = 20, 8
"""Largest number of splits that a column without a usual name may divide a table in, and of unused columns named."""
_FRACTION = re.compile(r"\d*\.\d+(e-?\d+)?$")
_NO_CLASS = frozenset(
    {"unlabeled", "unlabelled", "unknown", "unclear", "unsure", "undefined", "ignore", "skip", "todo", "tbd"}
)
_OWN = 7
"""Largest number of items for which it is not strange that each has a class of its own."""
_WHOLE = re.compile(r"^(-?\d+)\.0$")


def is_split(name: str) -> bool:
    """Whether a folder or a key is called like a split, such as `train`, `Test`, `val2017` or `test_images`."""
    return _SPLIT.fullmatch(name) is not None


@dataclass(kw_only=True, slots=True, frozen=True)
class Columns:
    """Names of the columns (or fields) of a table. One that is not named is guessed; an empty name means none."""

    image: str | None = None
    """Name of the column of images: paths relative to the table, or the bytes of the images."""
    caption: str | None = None
    """Name of the column of captions or lists of captions; several names are separated by commas."""
    label: str | None = None
    """Name of the column of classes."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Found:
    """The columns that a source uses."""

    image: str | None
    captions: tuple[str, ...]
    label: str | None
    split: str | None
    folder: str | None
    """The column of the folder that the image lies in, if it is one of its own."""
    embedded: bool
    """True where the image column holds the images themselves, not paths."""
    notes: tuple[str, ...] = ()
    """What the owner of the table may not expect of the choice, a line each."""


def find_columns(table: Table, *, wanted: Columns, source: str) -> Found:
    """The columns to use of a table of images, texts or both.

    Args:
        table: Every column name with a few of its values that are not missing, as `is_missing` says.
        wanted: Names given by the user.
        source: What messages call the table.

    Raises UserError, which lists the columns, where a named column is missing, where several qualify, and where there
    is neither an image nor a caption column.
    """
    image = find_image(table, wanted.image, source)
    found = find_fields(table, wanted=wanted, source=source, image=image)
    if image is not None:
        return found
    if not found.captions:
        for name in table:
            _refuse_addresses(table, name, source)
            if _all(table[name], _is_album):
                raise UserError(f"{source}: column {name!r} holds lists of images; write a row for each image")
        raise UserError(
            f"{source}: no column of images or captions among {_listed(table)}; "
            "name one behind the source with ?image=NAME or ?caption=NAME"
        )
    strange = [
        f"no images: column {name!r} holds {str(values[0])[:60]!r}, {_why_no_path(values[0])}"
        for name, values in table.items()
        if wanted.image is None and name not in found.captions and _could_be_image(name, values)
    ]
    for name in found.captions:
        cells = [value for value in table[name] if isinstance(value, str)]
        if 2 * sum(begins_with_image(cell) is not None for cell in cells) > len(table[name]):
            raise UserError(
                f"{source}: column {name!r} holds paths and texts in one, such as {cells[0][:60]!r}; put commas or "
                "tabs between its columns"
            )
    return replace(found, notes=(*found.notes, *strange))


def find_fields(table: Table, *, wanted: Columns, source: str, image: str | None = None) -> Found:
    """The columns of captions, label and split, given the one of the image, if any. Raises as `find_columns`."""
    captions = _find_captions(table, wanted.caption, image, source)
    found = Found(
        image=image,
        captions=captions,
        label=_find_label(table, wanted.label, captions, source),
        split=_find_split(table, image),
        folder=None if image is None else next((n for n, cells in table.items() if _is_folder(n, cells, image)), None),
        embedded=image is not None and _embedded(image, table[image]),
    )
    absent, told = _notes_on_no_captions(table, found, wanted)
    flags = _flags(table, found) if wanted.label is None else []
    notes = [*_notes_on_guess(found, wanted, source), *absent]
    for name in captions:
        _refuse_text_files(table[name], name, source)
        notes += _notes_on_captions(table[name], name)
    if flags:
        notes.append(f"no labels: columns of marks such as {', '.join(flags[:3])} are not read; write a column label")
    notes += _notes_on_words(table, captions) + _notes_on_others(table, found, wanted, but_not={*told, *flags})
    return replace(found, notes=tuple(notes))


def _find_label(table: Table, wanted: str | None, captions: Sequence[str], source: str) -> str | None:
    if wanted is not None:
        return _named(table, wanted, "label", source) if wanted else None
    known = [name for name in table if usual(name, LABEL_NAMES) and name not in captions]
    words = [name for name in known if not all(str(value).strip("-0123456789.") == "" for value in table[name])]
    return _one(words if len(words) == 1 else known, "label", table, source)


def _find_split(table: Table, image: str | None) -> str | None:
    """The first column that is called like one of splits, else the first that holds nothing but a few splits."""
    called = (name for name in table if usual(name, SPLIT_NAMES))
    holding = (
        name
        for name, values in table.items()
        if name != image and _all(values, _is_split_cell) and 1 < len(set(values)) <= _SPLITS
    )
    return next(called, None) or next(holding, None)


def _notes_on_guess(found: Found, wanted: Columns, source: str) -> list[str]:
    """A note on captions of a column that is not called like one. Raises UserError where its name is a sentence."""
    if wanted.caption is not None or not found.captions or any(map(_is_caption_name, found.captions)):
        return []
    name = found.captions[0]
    if name.count(" ") > 1:
        raise UserError(
            f"{source}: the first line must name the columns, and {name!r} looks like data; add a first line"
        )
    return [f"captions are taken from {name!r}, the only column of sentences"]


def _notes_on_no_captions(table: Table, found: Found, wanted: Columns) -> tuple[list[str], list[str]]:
    """Notes on columns that may have been meant for captions where none are found, and the names of these columns."""
    if wanted.caption is not None or found.captions:
        return [], []
    notes = []
    named = [name for name in table if usual(name, CAPTION_NAMES) and name != found.label]
    for name in named:
        what = f"holds {str(table[name][0])[:60]!r}, which is no text" if table[name] else "is empty"
        notes.append(f"no captions: column {name!r} {what}")
    other = LABEL_NAMES | IMAGE_NAMES | SPLIT_NAMES | FOLDER_NAMES | CAPTION_NAMES
    texts = [name for name, values in table.items() if _could_be_captions(values) and not usual(name, other)]
    used = (found.image, found.label, found.split)
    texts = [name for name in texts if name not in used and not _LABEL_LIKE.search(name)]
    if not texts or (found.image is None and wanted.image != ""):
        return notes, named
    return [*notes, f"no captions: none of the columns {_listed(texts)} is called like captions"], [*named, *texts]


def _refuse_text_files(values: Sequence[Any], name: str, source: str) -> None:
    if _all(values, _is_text_file):
        raise UserError(
            f"{source}: column {name!r} holds paths of text files, such as {values[0]!r}, which are not read; "
            "put the captions into the table, or texts of the name of each image beside the images"
        )


def _notes_on_captions(values: Sequence[Any], name: str) -> list[str]:
    """What is strange about the cells of a column of captions."""
    notes = []
    if any(map(is_conversation, values)):
        notes.append(f"of each conversation in {name!r} the answer is the caption, if it has one answer alone")
    notes += notes_on_texts([text for value in values for text in captions_of(value)])
    written = [value for value in values if isinstance(value, str) and not WRITTEN.match(value)]
    cells = [_ENTITY.sub("", value).strip() for value in written]
    for mark in ("\n", "\\n", "<br>", *SEPARATORS):
        if len(cells) > 1 and 10 * sum(mark in cell for cell in cells) >= 9 * len(cells):
            return [*notes, f"{mark!r} in the cells of {name!r} parts no captions: a cell is one caption"]
    return notes


def _notes_on_words(table: Table, captions: Sequence[str]) -> list[str]:
    """A note where the captions of all lists are single words: the list may have been meant for one text."""
    lists = [value for name in captions for value in table[name] if len(captions_of(value)) > 1]
    if not lists or any(" " in text for value in lists for text in captions_of(value)):
        return []
    shown = str(lists[0])[:60]
    return [f"each word of lists such as {shown} is taken for a caption; join those that are one text"]


def _flags(table: Table, found: Found) -> list[str]:
    """Two columns or more that mark a class or an attribute each, in a table of images without labels."""
    if found.label is not None or found.image is None:
        return []
    used = (found.image, *found.captions, found.split)
    flags = [
        name for name, values in table.items() if name not in used and _all(values, _is_flag) and len(set(values)) > 1
    ]
    return flags if len(flags) > 1 else []


def _notes_on_others(table: Table, found: Found, wanted: Columns, *, but_not: set[str]) -> list[str]:
    """A note on the columns that are not used, first those that seem to hold what is looked for.

    Columns that nobody expects to be read are left out, and so are those that other notes name, ``but_not``.
    """
    used = (found.image, *found.captions, found.label, found.split, found.folder)
    rest = {name: values for name, values in table.items() if name not in used}
    left = [
        (name, "images") for name, values in rest.items() if found.image is not None and _holds_images(name, values)
    ]
    left += [(name, "splits") for name in rest if found.split is None and _SPLIT_LIKE.fullmatch(name.strip())]
    if found.label is None and wanted.label is None:
        left += [(name, "labels") for name, values in rest.items() if values and _LABEL_LIKE.search(name)]
    if found.captions and wanted.caption is None:
        left += [(name, "sentences") for name, values in rest.items() if _holds_sentences(values)]
    told = {name: f"{name} ({what})" for name, what in left}
    for name, values in rest.items():
        by_wish = wanted.caption == "" and usual(name, CAPTION_NAMES)
        told_elsewhere = name in but_not or (found.image is None and _could_be_image(name, values))
        if name not in told and not by_wish and not told_elsewhere and not _is_about(name, values):
            told[name] = name
    if not told:
        return []
    more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
    return ["columns not used: " + ", ".join([*told.values()][:_TOLD]) + more]


def _is_about(name: str, values: Sequence[Any]) -> bool:
    """Whether a column numbers items or tells of their files, or says the same of all of them."""
    if _ABOUT.fullmatch(_snake(name)) or (len(values) != 1 and len(set(map(str, values))) < 2):
        return True
    return name == "status" and "success" in values  # as img2dataset writes; the failed rows are told elsewhere


def _snake(name: str) -> str:
    """`ImageID` as `Image_ID`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())


def _could_be_image(name: str, values: Sequence[Any]) -> bool:
    return bool(usual(name, IMAGE_NAMES | {"image_id", "img_id"}) and values) or _all(values, _names_images)


def _why_no_path(value: Any) -> str:
    """Why a cell that could be an image is none."""
    if _is_album(value):
        return "which is a list of images; write a row for each image"
    if isinstance(value, str) and _BASE64.match(value):
        return "an image written as text; save it as a file and write its path, or put its bytes into parquet"
    return "which is no path of an image file"


def _names_images(value: Any) -> bool:
    """Whether a cell holds an address, or a list with the path of an image."""
    return is_address(value) or _is_album(value)


def _is_album(value: Any) -> bool:
    """Whether a cell holds a list of images or of their paths."""
    return isinstance(value, list | tuple) and any(is_image_path(item) or is_embedded(item) for item in value)


def _is_split_cell(value: Any) -> bool:
    return isinstance(value, str) and is_split(value.strip())


def _holds_images(name: str, values: Sequence[Any]) -> bool:
    return _embedded(name, values) or _all(values, is_image_path)


def _holds_sentences(values: Sequence[Any]) -> bool:
    """Whether one in four values has texts of three words."""
    texts = [captions_of(value) for value in values if _is_text(value)]
    return 4 * sum(any(count_words(text) > 2 for text in each) for each in texts) >= max(1, len(values))


def _is_text_file(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower().endswith(".txt") and len(value.split()) == 1


def _is_flag(value: Any) -> bool:
    """Whether a cell marks one of several classes or attributes, as 0 and 1 or as -1 and 1 do."""
    return str(value).strip() in ("0", "1", "-1", "0.0", "1.0", "True", "False")


def is_unlabelled(value: Any) -> bool:
    """Whether a label is -1, by which many libraries mark what has none."""
    return not isinstance(value, bool) and str(value).strip() in ("-1", "-1.0")


def label_of(value: Any) -> str | None:
    """The label in a cell; whole floats, which libraries make of integers beside empty cells, as integers.

    Lists and records are no labels, written out or not, and -1 is none.
    """
    if is_unlabelled(value) or is_missing(value) or says_missing(value) or isinstance(value, list | tuple | Mapping):
        return None
    if isinstance(value, str) and (is_json(value) or written_out(value) is not None):
        return None
    return _WHOLE.sub(r"\1", str(value).strip()) or None


def notes_on_labels(labels: Sequence[str]) -> list[str]:
    """What is strange about the labels of all items: several in one, such as `cat|dog` or `cat dog` where there is
    `cat` too, two spellings of one, fractions, and as many as there are items."""
    known = set(labels)
    notes = []
    parts = {label: {part.strip() for part in re.split(r"[|;,]", label)} for label in known}
    often = Counter(part for each in parts.values() for part in each)
    joined = sorted(label for label, each in parts.items() if len(each) > 1 and any(often[part] > 1 for part in each))
    words = {label: set(label.split()) for label in known if " " in label}
    joined += sorted(label for label, each in words.items() if each <= known)
    if len(set().union(*words.values())) < len(words):  # `haze primary`, `clear primary`, `clear water` ...
        joined += sorted(words)
    if joined:
        notes.append(f"labels such as {joined[0]!r} are classes of their own: an image has one label")
    spellings: dict[str, list[str]] = {}
    for label in sorted(known):
        plain = " ".join(label.casefold().split())
        spellings.setdefault(plain.lstrip("0") if plain.isdecimal() else plain, []).append(label)
    if several := [" and ".join(map(repr, each)) for each in spellings.values() if len(each) > 1]:
        more = f" and {len(several) - 3:,} more" if len(several) > 3 else ""
        notes.append(f"classes that differ in spelling alone: {', '.join(several[:3])}{more}")
    if unnamed := sorted(label for label in known if label.casefold() in _NO_CLASS):
        notes.append(f"{unnamed[0]!r} is taken for a class")
    if len(labels) > _OWN and len(known) == 1:
        notes.append(f"all {len(labels):,} labels are {labels[0]!r}")
    if fractions := sorted(filter(_FRACTION.search, known)):
        notes.append(f"numbers such as {fractions[0]} are taken for classes, each a class of its own")
    elif len(labels) == len(known) > _OWN:
        notes.append(f"each of {len(known):,} labels, such as {labels[0]!r}, is that of one image")
    return notes


def is_embedded(value: Any) -> bool:
    """Image bytes, or the {bytes, path} record of `datasets`."""
    if isinstance(value, Mapping):
        return "bytes" in value
    return isinstance(value, bytes | bytearray) and not _is_utf8(value)


def _is_utf8(value: bytes | bytearray) -> bool:
    """Whether bytes are text. No format of images is, from its first bytes on."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def find_image(table: Table, wanted: str | None, source: str) -> str | None:
    """The column of images: the named one, else one of bytes, else one of paths. Raises UserError."""
    if wanted == "":
        return None
    if wanted is not None:
        _refuse_addresses(table, _named(table, wanted, "image", source), source)
        return wanted
    pixels = [name for name, values in table.items() if _embedded(name, values)]
    paths = [name for name, values in table.items() if _holds(name, IMAGE_NAMES, values, _is_path_cell)]
    tiers = (
        [name for name in pixels if usual(name, IMAGE_NAMES)],
        pixels,
        [name for name in paths if usual(name, IMAGE_NAMES)],
        paths,
    )
    for tier in tiers:
        if tier:
            return _one(tier, "image", table, source)
    return None


def _is_path_cell(value: Any) -> bool:
    return is_image_path(value[0] if isinstance(value, list) and len(value) == 1 else value)


def _refuse_addresses(table: Table, name: str | None, source: str) -> None:
    if name is not None and _all(table[name], is_address):
        raise UserError(
            f"{source}: column {name!r} holds web addresses, which are not fetched; download the images first "
            "(e.g. with img2dataset) and give their paths"
        )


def _find_captions(table: Table, wanted: str | None, image: str | None, source: str) -> tuple[str, ...]:
    if wanted == "":
        return ()
    if wanted is not None:
        names = (wanted,) if wanted in table else tuple(part.strip() for part in wanted.split(","))
        return tuple(str(_named(table, name, "caption", source)) for name in names)
    texts = [name for name, values in table.items() if name != image and _holds_texts(name, values)]
    known = [name for name in texts if usual(name, CAPTION_NAMES)]
    numbered = [name for name in texts if _NUMBERED.fullmatch(name)]
    if numbered and len(known) < 2:
        return (*known, *numbered)
    other = CAPTION_NAMES | IMAGE_NAMES | LABEL_NAMES | SPLIT_NAMES
    prose = [name for name in texts if not usual(name, other) and _has_words(table[name])]
    prose = [name for name in prose if not ((like := _LABEL_LIKE.search(name)) and like.end() == len(name.strip()))]
    found = _one(known or prose, "caption", table, source)
    return (found,) if found is not None else ()


def _has_words(values: Sequence[Any]) -> bool:
    return any(count_words(text) > 1 for value in values for text in captions_of(value))


def _holds_texts(name: str, values: Sequence[Any]) -> bool:
    """Whether all values are texts, or some are and the name says so, unless half are something else by their form.

    Where all say yes or no, they are none.
    """
    if _all(values, lambda value: str(value).strip().lower() in _YES_NO):
        return False
    if _all(values, _is_text):
        return True
    paths = sum(is_image_path(value) or is_address(value) for value in values)
    return usual(name, CAPTION_NAMES) and any(map(_is_text, values)) and 2 * paths <= len(values)


def _is_caption_name(name: str) -> bool:
    return usual(name, CAPTION_NAMES) or _NUMBERED.fullmatch(name) is not None


def _could_be_captions(values: Sequence[Any]) -> bool:
    """Whether some value is a text or holds texts, whatever its form."""
    return any(
        isinstance(value, list | Mapping)
        or (isinstance(value, str) and _is_text(value) and any(map(str.isalpha, value)))
        for value in values
    )


def _is_folder(name: str, values: Sequence[Any], image: str) -> bool:
    if name == image or not usual(name, FOLDER_NAMES):
        return False
    return _all(values, lambda value: isinstance(value, str) and not is_image_path(value))


def _named(table: Table, name: str | None, role: Role, source: str) -> str | None:
    if name is not None and name not in table:
        raise UserError(f"{source}: no column {name!r} among {_listed(table)}; check {role}={name}")
    return name


def _one(names: list[str], role: Role, table: Table, source: str) -> str | None:
    if len(names) > 1:
        raise UserError(
            f"{source}: {', '.join(names)} may each be the {role} column (columns: {_listed(table)}); "
            f"choose one behind the source with ?{role}=NAME"
        )
    return names[0] if names else None


def _listed(table: Iterable[Any]) -> str:
    names = [str(name) for name in table]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def usual(name: str, names: frozenset[str]) -> bool:
    """Whether ``name`` is one of ``names``, whatever its case, with blanks or hyphens for underscores."""
    return plain_name(name) in names


def plain_name(name: str) -> str:
    """The name of a column in small letters, with underscores for blanks and hyphens."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _all(values: Sequence[Any], test: Callable[[Any], bool]) -> bool:
    return bool(values) and all(map(test, values))


def _holds(name: str, names: frozenset[str], values: Sequence[Any], test: Callable[[Any], bool]) -> bool:
    """Whether a column is of a kind: all its values, or at least half of them where its name says so too."""
    return _all(values, test) or (usual(name, names) and 2 * sum(map(test, values)) >= max(1, len(values)))


def _embedded(name: str, values: Sequence[Any]) -> bool:
    if usual(name, IMAGE_NAMES) and _all(values, lambda value: isinstance(value, bytes | bytearray)):
        return True  # even if the bytes are no image
    return _all(values, is_embedded)


def is_address(value: Any) -> bool:
    """Whether a cell holds an address of the web."""
    return isinstance(value, str) and value.strip().lower().startswith(("http://", "https://"))


def _is_text(value: Any) -> bool:
    if isinstance(value, bytes):
        return _is_utf8(value)
    if isinstance(value, str):
        return not is_image_path(value) and not is_address(value)
    if isinstance(value, Mapping):
        return any(_is_text(value.get(name)) for name in INNER)
    if not isinstance(value, list | tuple):
        return False
    if is_conversation(value):
        return bool(captions_of(value))
    present = [item for item in value if not is_missing(item)]
    return bool(present) and all(map(_is_text, present))
