"""What a source holds, before anything is trained on it: `diptych check`, and the first line of every `fit`.

Also the digest of a source, by which a resumed run notices that captions or images were edited meanwhile.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from diptych.data.sources.columns import Columns, is_address, notes_on_labels
from diptych.data.sources.decode import UnreadableImage, header, is_image_path
from diptych.data.sources.open import (
    HasBlocks,
    HasFiles,
    HasNotes,
    HasSides,
    KeptSource,
    Source,
    find_files,
    open_finite,
    remote_files,
)
from diptych.data.sources.remote import is_remote
from diptych.data.sources.table import TableSource, counted, on_one_line, some
from diptych.data.sources.text import count_words
from diptych.errors import UserError
from diptych.run_folder import read_config

_SAMPLE, _COMPARED = 32, 5000
"""Number of images of a part that are opened before a run begins, and that are compared with one another."""
VALIDATION = "validation image"
"""What a `Part` is called that is learned from in no way."""
SIDE = 32
"""Side in pixels to which images are decoded here: JPEGs are decoded at an eighth, which is quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheck:
    """What was found in a source."""

    name: str
    items: int
    captions: Sequence[int]
    """Number of captions of each item."""
    shared_captions: int
    """Number of captions that belong to several items."""
    repeated_captions: int
    """Number of captions that their item has already."""
    named_captions: int
    """Number of captions that are an address or the name of a file, as shops and cameras write them."""
    lengths: Sequence[int]
    """Number of words of each caption, as `count_words` has it."""
    labels: Counter[str]
    """Number of items of each class."""
    opened: int
    """Number of images that were opened, spread over the source; 0 where it has none."""
    unreadable: Sequence[str]
    """What is wrong with those of them that cannot be read."""
    sizes: Sequence[tuple[int, int]]
    """Width and height in pixels of those that can, as stored."""
    several_frames: Sequence[str]
    """Keys of those that hold several frames or pages, of which the first is used."""
    twins: Sequence[tuple[str, str]]
    """Keys of images that are the same file as another one before them, of all or, in parquet, of those opened."""
    notes: Sequence[str]
    samples: Sequence[tuple[str, str]]
    """Key and first caption of a few items."""

    def lines(self) -> list[str]:
        """The findings as lines for the terminal."""
        captioned = sum(count > 0 for count in self.captions)
        total = sum(self.captions)
        rows = [("items", f"{self.items:,}")]
        if total:
            each = _range([count for count in self.captions if count])
            rows.append(("captions", f"{total:,} of {counted(captioned, 'item')}, {each} each"))
            rows.append(("words", f"{_range(self.lengths)} of a caption, {np.median(self.lengths):.0f} in the middle"))
            if captioned < self.items:
                rows.append(("", f"{counted(self.items - captioned, 'item')} without a caption"))
            if self.shared_captions:
                rows.append(("", f"{counted(self.shared_captions, 'caption')} in the same words at several items"))
            if self.repeated_captions:
                rows.append(("", f"{counted(self.repeated_captions, 'caption')} that their item has already"))
            if self.named_captions:
                rows.append(("", f"{counted(self.named_captions, 'caption')} that name a file or an address"))
        else:
            rows.append(("captions", "none"))
        if self.opened:
            rows.append(("images", f"{self.opened:,} opened, {len(self.unreadable):,} of them unreadable"))
            if self.sizes:
                widths, heights = zip(*self.sizes, strict=True)
                middle = f"{np.median(widths):.0f} x {np.median(heights):.0f} in the middle"
                rows.append(("pixels", f"{_range(widths)} wide, {_range(heights)} high, {middle}"))
            if self.several_frames:
                shown = some(self.several_frames, len(self.several_frames))
                rows.append(
                    ("frames", f"{counted(len(self.several_frames), 'image')} used by the first alone: {shown}")
                )
            if self.twins:
                pairs = [f"{a} = {b}" for a, b in self.twins]
                rows.append(("twins", f"{counted(len(pairs), 'image')} the same as another: {some(pairs, len(pairs))}"))
        else:
            rows.append(("images", "none"))
        if self.labels:
            classes = [f"{label} {count:,}" for label, count in self.labels.most_common()]
            rows.append(("labels", f"{counted(len(classes), 'class', 'classes')}: {some(classes, len(classes))}"))
            if unlabelled := self.items - self.labels.total():
                rows.append(("", f"{counted(unlabelled, 'item')} without a label"))
        rows += [("unreadable", reason) for reason in self.unreadable[:3]]
        rows += [("note", note) for note in self.notes]
        rows += [
            ("sample", f"{on_one_line(key)}  {text if len(text) < 120 else text[:117] + '...'}".rstrip())
            for key, text in self.samples
        ]
        return [self.name, *(f"  {head:<10} {text}" for head, text in rows)]


def check_source(source: Source, *, images: int = 1000) -> SourceCheck:
    """Read all captions and labels, and open up to ``images`` images, spread over the source; 0 opens all."""
    texts = [source.captions(i) for i in range(len(source))]
    owners = Counter(text for captions in texts for text in set(captions))
    labels = Counter(label for i in range(len(source)) if (label := source.label(i)) is not None)
    chosen = _spread(len(source), images or len(source)) if source.has_images else []
    faults, sizes, several = [], [], []
    first: dict[bytes, str] = {}
    twins = []
    for item, image in zip(chosen, open_images(source, chosen), strict=True):
        faults += [image.fault] if image.fault else []
        sizes += [image.size] if image.size else []
        several += [source.key(item)] if image.frames > 1 else []
        if image.digest is not None:
            key = first.setdefault(image.digest, source.key(item))
            if key != source.key(item):
                twins.append((source.key(item), key))
    if isinstance(source, HasBlocks):
        twins = find_twins([(source, i) for i in range(len(source))])
    return SourceCheck(
        name=source.name,
        items=len(source),
        captions=[len(captions) for captions in texts],
        shared_captions=sum(count > 1 for count in owners.values()),
        repeated_captions=sum(len(captions) - len(set(captions)) for captions in texts),
        named_captions=sum(_is_name(text, source.key(i)) for i, captions in enumerate(texts) for text in captions),
        lengths=[count_words(text) for captions in texts for text in captions],
        labels=labels,
        opened=len(chosen),
        unreadable=faults,
        sizes=sizes,
        several_frames=several,
        twins=twins,
        notes=list(
            dict.fromkeys(
                [*(source.notes if isinstance(source, HasNotes) else ()), *notes_on_labels([*labels.elements()])]
            )
        ),
        samples=[(source.key(i), next(iter(texts[i]), "")) for i in _spread(len(source), 3)],
    )


def _is_name(text: str, key: str) -> bool:
    return is_image_path(text) or is_address(text) or text == os.path.splitext(os.path.basename(key))[0]


@dataclass(frozen=True, slots=True)
class Part:
    """Some items of a source, and what a run takes from them: `pair`, `unpaired image`, `unpaired text`, `image`."""

    what: str
    source: HasSides
    items: Sequence[int] | np.ndarray

    def describe(self) -> str:
        """Such as `600 pairs (3,000 captions)`. An image without a caption is no pair."""
        source = self.source
        if "image" in self.what or not (isinstance(source, Source) and source.has_images and source.has_captions):
            return counted(len(self.items), self.what)
        captions = [len(source.captions(int(item))) for item in self.items]
        if self.what != "pair":
            return counted(sum(captions), self.what)
        without = captions.count(0)
        more = f" and {counted(without, 'image')} without a caption" if without else ""
        return f"{counted(len(captions) - without, 'pair')} ({counted(sum(captions), 'caption')}){more}"


def check_parts(parts: Sequence[Part], *, max_skipped_share: float) -> str:
    """Open a few images of each part, before anything is trained on them.

    Returns the line that `fit` prints first. Raises UserError where more of a table's images do not exist than may be
    skipped, and where more than half of the images that were tried cannot be read.
    """
    tried, several, faults = 0, 0, []
    compared: dict[tuple[int, int], tuple[HasBlocks, int]] = {}
    valid = {id(part.source) for part in parts if part.what == VALIDATION}
    for part in parts:
        if "text" in part.what or not isinstance(part.source, Source):  # encoded data needs no images
            continue
        missing = part.source.missing if isinstance(part.source, TableSource) else ()
        if len(missing) > max_skipped_share * len(part.source):
            raise UserError(
                f"{part.source.name}: {len(missing):,} of {len(part.source):,} images do not exist, over the tolerated "
                f"{max_skipped_share:.1%}: {some(missing, len(missing))}; mend the paths or raise max-skipped-share"
            )
        if isinstance(part.source, HasBlocks):
            places = [int(part.items[i]) for i in _spread(len(part.items), _COMPARED)]
            compared |= {(id(part.source), item): (part.source, item) for item in places}
        chosen = [int(part.items[i]) for i in _spread(len(part.items), _SAMPLE)]
        opened = list(open_images(part.source, chosen))
        several += sum(image.frames > 1 for image in opened)
        wrong = [image.fault for image in opened if image.fault]
        if 2 * len(wrong) > len(chosen):
            raise UserError(
                f"{part.source.name}: {len(wrong)} of {len(chosen)} images that were tried cannot be read, "
                f"such as {wrong[0]}"
            )
        tried += len(chosen)
        faults += wrong
    remarks = f"; {len(faults)} of {tried} images that were tried cannot be read" if tried else ""
    remarks += f", such as {faults[0]}" if faults else ""
    remarks += f"; of {several} with several frames the first is used" if several else ""
    twins: list[tuple[str, str]] = []
    learned: list[tuple[str, str]] = []
    for one, other in _twins(list(compared.values())):
        (learned if (id(one[0]) in valid) != (id(other[0]) in valid) else twins).append(_named_twins(one, other))
    for found, what in ((learned, "in the validation and in what is learned from"), (twins, "the same as another")):
        if found:
            remarks += f"; {counted(len(found), 'image')} of {len(compared):,} that were compared {what}: "
            remarks += some([f"{a} = {b}" for a, b in found], len(found))
    return ", ".join(part.describe() for part in parts) + remarks


def open_data_of(run: Path, name: str) -> Source:
    """The source that a run was given as `--data.NAME`, such as ``pairs``, with the columns that the run was given.

    Raises UserError where its settings do not name one, and where the source is gone.
    """
    try:
        data = read_config(run)["run"]["data"]
        spec, columns = data[name], Columns(**data["columns"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{run}/config.json: does not name the data that the run learned from") from error
    return open_finite(spec, columns)


def note_on_learned(known: HasSides, items: np.ndarray | range, scored: Source) -> list[str]:
    """A note on images of ``scored`` that are the same file as one of the ``items`` of ``known``, which a run has
    learned from. Of both up to 5,000 are compared."""
    if not (isinstance(known, HasBlocks) and isinstance(scored, HasBlocks)):
        return []
    learned = [(known, int(items[place])) for place in _spread(len(items), _COMPARED)]
    compared = [(scored, item) for item in _spread(len(scored), _COMPARED)]
    same = sum(one[0] is scored and other[0] is known for one, other in _twins([*learned, *compared]))
    if not same:
        return []
    return [
        f"{same:,} of {counted(len(compared), 'image')} that were compared {'is' if same == 1 else 'are'} among those "
        "that the run has learned from: scores on them say nothing of other images"
    ]


def note_on_lengths(lengths: Sequence[int] | np.ndarray, longest: int) -> str:
    """A note on texts that fill all ``longest`` tokens that a model reads, empty where none does."""
    full = int(np.count_nonzero(np.asarray(lengths) >= longest))
    if not full:
        return ""
    return (
        f"{full:,} of {counted(len(lengths), 'text')} that {'was' if len(lengths) == 1 else 'were'} looked at "
        f"{'fills' if full == 1 else 'fill'} all {longest} tokens that the model reads: what is longer is cut off"
    )


def find_twins(items: Sequence[tuple[HasBlocks, int]]) -> list[tuple[str, str]]:
    """Keys of images that are the same file as another one before them."""
    return [_named_twins(one, other) for one, other in _twins(items)]


def _named_twins(one: tuple[HasBlocks, int], other: tuple[HasBlocks, int]) -> tuple[str, str]:
    shown = "" if other[0] is one[0] else f"{other[0].name}: "
    return one[0].key(one[1]), shown + other[0].key(other[1])


def _twins(items: Sequence[tuple[HasBlocks, int]]) -> list[tuple[tuple[HasBlocks, int], tuple[HasBlocks, int]]]:
    """Images that are the same file as another one before them, with that. Only files of one size are read whole, and
    only if a few bytes of them are equal too."""
    alike: dict[tuple[int, bytes], list[tuple[HasBlocks, int]]] = defaultdict(list)
    for source, item in items:
        alike[source.block(item)].append((source, item))
    twins = []
    for (size, _), group in alike.items():
        first: dict[bytes, tuple[HasBlocks, int]] = {}
        for source, item in group if size and len(group) > 1 else ():
            file = source.file(item)
            data = file if isinstance(file, bytes) else file.read_bytes()
            one = (source, item)
            other = first.setdefault(_digest(data), one)
            if other != one:
                twins.append((one, other))
    return twins


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """What is seen of an image when it is opened."""

    fault: str | None
    """Why it cannot be read, else None, and nothing else is known of it."""
    pixels: UInt8[np.ndarray, "32 32 3"] | None = None
    """Its centre square."""
    size: tuple[int, int] | None = None
    """Width and height in pixels as stored; None too where the source has no files."""
    digest: bytes | None = None
    """Digest of its file, or of its pixels where the source has no files."""
    frames: int = 1
    """Number of frames of an animation, or of pages."""


def open_images(source: Source, items: Iterable[int], *, workers: int = 2) -> Iterator[OpenedImage]:
    """Open images in their order; a caller that keeps no pixels needs no memory for them."""

    def open_one(item: int) -> OpenedImage:
        try:
            pixels = source.image(item, SIDE)
        except UnreadableImage as error:
            return OpenedImage(str(error))
        if not isinstance(source, HasFiles):
            return OpenedImage(None, pixels, None, _digest(pixels.tobytes()))
        file = source.file(item)
        data = file if isinstance(file, bytes) else file.read_bytes()
        size, frames = header(data)
        return OpenedImage(None, pixels, size, _digest(data), frames)

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(open_one, items)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _spread(total: int, count: int) -> list[int]:
    """Up to ``count`` numbers below ``total``, evenly spread, each once."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


_WHOLE = 256 * 2**20
"""Total size in bytes up to which files are read whole; of more, only blocks are read."""
_BLOCK, _BLOCKS = 2**16, 16
"""Bytes of a block, and number of blocks of a file."""


def content_digest(source: Source) -> str:
    """16 hexadecimal digits; empty for scenes and data sets of the hub, which their name decides.

    It covers all captions and image files where these lie in a folder or are listed in a table, and the files
    themselves of tars, parquet and texts. Where they are more than 256 MB together, sizes and blocks stand for files.
    Neither their dates nor the place of the folder count, so that a data set may be copied. Of files behind an address
    it covers the sizes and stamps that their server tells.
    """
    if isinstance(source, KeptSource):
        inner = content_digest(source.source).encode()
        return hashlib.blake2b(inner + source.keep_file.read_bytes(), digest_size=8).hexdigest()
    if source.name.startswith(("scenes:", "hub:")):
        return ""
    if is_remote(source.name):
        identities = " ".join(file.identity for file in remote_files(source.name))
        return hashlib.blake2b(identities.encode(), digest_size=8).hexdigest()
    try:
        places = find_files(source.name)
    except UserError:  # a source that was made in Python
        return ""
    digest = hashlib.blake2b(digest_size=8)
    files = [place for place in places if place.is_file()]
    root = places[0] if places[0].is_dir() else Path()
    if len(source) and (root / source.key(0)).is_file():
        for item in range(len(source)):
            key = "" if root == Path() else source.key(item)  # in a table it is a path, which may move
            # Names of files that are no UTF-8 hold halves of surrogate pairs.
            digest.update("\0".join([key, *source.captions(item), ""]).encode(errors="surrogatepass"))
            files.append(root / source.key(item))
    sizes = [os.stat(file).st_size if file.is_file() else -1 for file in files]
    whole = sum(sizes) <= _WHOLE
    for file, size in zip(files, sizes, strict=True):
        digest.update(size.to_bytes(8, "little", signed=True))
        if whole or file in places:
            _add_file(digest, file, size, whole=whole)
    return digest.hexdigest()


def _add_file(digest: "hashlib.blake2b", file: Path, size: int, *, whole: bool) -> None:
    if size < 0:
        return
    with open(file, "rb") as stream:
        if whole or size <= _BLOCK * _BLOCKS:
            digest.update(stream.read())
            return
        for number in range(_BLOCKS):
            stream.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
