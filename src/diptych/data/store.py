"""Folders of NumPy arrays on disk that are read memory-mapped, and encoding into them.

    Store, encode              images as tokens and texts as ids, computed ahead of training
    VectorStore, write_vectors feature vectors

Every array is an ordinary ``NAME.npy``, which `numpy.load` reads too. Beside the arrays lies ``keys.txt`` with a name
for each item.

Shapes: B rows, N image tokens, L text tokens, F width of the text features, G width of the image features,
T width of the teacher's features, S pixels of a side.
"""

import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diptych.data.batch import ImageTokenExamples, PairExamples, TextExamples
from diptych.data.check import content_digest
from diptych.data.engine import KEYS_ENCODING, LOCAL, Engine, ResumableArrayWriter, Rows, items_digest, npy_bytes
from diptych.data.pixels import SkippedItems, channels_first, read_block
from diptych.data.sources import Source
from diptych.data.splits import at
from diptych.data.streams import Rows as Examples
from diptych.data.streams import Stream, block_order, choose
from diptych.errors import UserError

STORE_MANIFEST = "store.json"
STORE_VERSION = 2
"""1: arrays were ``NAME.bin`` files without a header."""
VECTORS_MANIFEST = "manifest.json"

_TRIM = 8
"""Texts of a batch are cut to its longest, rounded up to this: padding costs time and changes nothing."""
_BLOCK = 32
"""Items between two of the sums that an index of captions keeps: 25 MB for 10^8 items."""
_ROWS = 2**14
"""Items that are looked up at once."""
_MOST_MAPPED = 400 * 2**20
"""Bytes of mapped files that may be resident in a process before it releases them."""
Taken = TypeVar("Taken")
_CHUNK = 512
"""Number of items after which an interrupted encoding can resume."""


@dataclass(frozen=True)
class Store:
    """A folder of encoded data: image tokens and text ids, ready to train on.

    store.json     shapes and types, the source, and which tokenizers made it
    tokens.npy     [items, N]        image tokens, if there are images
    ids.npy        [captions, L]     text ids, if there are captions; those of an item lie together
    counts.npy     [items]           number of captions of each item, if there are captions
    features.npy   [captions, L, F]  features of the frozen text encoder, optional
    image_features.npy [items, G]    features of a pretrained image encoder, optional
    teacher_features.npy [items, T]  features of the vision model that teaches the encoder, optional
    keys.txt       a name for each item
    """

    folder: Path
    manifest: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(repr=False, compare=False)
    """Memory-mapped, by name."""
    _resident: "_Resident" = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Map the arrays; none of them is read.

        Raises UserError for a folder that holds no encoded data, for data of an earlier version, and for a file of
        another length than the manifest says.
        """
        try:
            manifest = json.loads((folder / STORE_MANIFEST).read_text())
            if (version := manifest.get("version", 1)) != STORE_VERSION:
                raise ValueError(f"its version is {version!r}, not {STORE_VERSION}")
            arrays = {name: _map(folder / f"{name}.npy", array) for name, array in manifest["arrays"].items()}
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: not a folder of encoded data ({error}): encode it again") from error
        return cls(folder, manifest, arrays, _Resident(arrays.values()))

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        return (Path(folder) / STORE_MANIFEST).is_file()

    def __len__(self) -> int:
        return self.manifest["items"]

    @property
    def has_images(self) -> bool:
        return "tokens" in self.arrays

    @property
    def has_captions(self) -> bool:
        return "ids" in self.arrays

    @cached_property
    def captions(self) -> "CaptionIndex":
        """Where the captions of each item lie. Reads all counts once. A store of images alone has no such attribute."""
        if "counts" not in self.arrays:  # what isinstance with a protocol that has captions asks for
            raise AttributeError("the store was encoded without captions")
        return CaptionIndex(self.arrays["counts"], after_part=self._resident.let_go)

    def pairs(self, items: np.ndarray | range, *, seed: int) -> Stream[PairExamples]:
        """Images with one of their captions, chosen anew each epoch. Items without a caption are left out.

        A range of all items takes no memory, and an array of items takes that of its numbers.
        """
        captions = self.captions
        if self._are_all(items):
            size, item_of = captions.captioned_items, captions.captioned
        else:
            chosen = np.asarray(items)
            chosen = chosen[captions.counts[chosen] > 0]
            size, item_of = len(chosen), chosen.__getitem__

        def take(index: np.ndarray, epoch: np.ndarray) -> PairExamples:
            item = item_of(index)
            ids, valid, features = self._read_texts(
                captions.first(item) + choose(captions.counts[item], item, epoch, seed)
            )
            return PairExamples(
                tokens_BN=self._read_tokens(item),
                ids_BL=ids,
                valid_BL=valid,
                features_BLF=features,
                image_features_BG=self._read_features("image_features", item),
                teacher_features_BT=self._read_features("teacher_features", item),
            )

        return self._stream(size, take)

    def images(self, items: np.ndarray | range) -> Stream[ImageTokenExamples]:
        """Unpaired images."""

        def take(index: np.ndarray, epoch: np.ndarray) -> ImageTokenExamples:
            item = at(items, index)
            return ImageTokenExamples(
                tokens_BN=self._read_tokens(item),
                image_features_BG=self._read_features("image_features", item),
                teacher_features_BT=self._read_features("teacher_features", item),
            )

        return self._stream(len(items), take)

    def texts(self, items: np.ndarray | range) -> Stream[TextExamples]:
        """Unpaired texts: every caption of the items is an example of its own.

        A range of all items takes no memory, and an array of items takes that of a number for each caption.
        """
        if self._are_all(items):
            rows: np.ndarray | range = range(len(self.arrays["ids"]))
        else:
            rows = self.captions.rows(np.asarray(items))

        def take(index: np.ndarray, epoch: np.ndarray) -> TextExamples:
            ids, valid, features = self._read_texts(at(rows, index))
            return TextExamples(ids_BL=ids, valid_BL=valid, features_BLF=features)

        return self._stream(len(rows), take)

    def _stream(self, size: int, take: Callable[[np.ndarray, np.ndarray], Examples]) -> Stream[Examples]:
        order = block_order(size)
        return Stream(size=size, take=take if order is None else self._resident.limited(take), shards=order)

    def _are_all(self, items: np.ndarray | range) -> bool:
        return isinstance(items, range) and items == range(len(self))

    def _read_tokens(self, items: np.ndarray) -> Tensor:
        return _to_torch(self.arrays["tokens"][items])

    def _read_features(self, name: str, items: np.ndarray) -> Tensor | None:
        if name not in self.arrays:
            return None
        return torch.from_numpy(self.arrays[name][items].astype(np.float32))

    def _read_texts(self, captions: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [B L], which of them are valid [B L] and, where they are stored, their features [B L F]."""
        found = self.arrays["ids"][captions]
        longest = int((found != 0).sum(1).max())
        length = min(found.shape[1], -(-longest // _TRIM) * _TRIM)
        ids = _to_torch(found[:, :length])
        features = None
        if "features" in self.arrays:
            features = torch.from_numpy(self.arrays["features"][captions, :length].astype(np.float32))
        return ids, ids != 0, features


class CaptionIndex:
    """Where the captions of an item lie, from how many each item has.

    It keeps sums over blocks of items and adds the counts within a block when it is asked: 10^8 items need no table.
    """

    def __init__(self, counts: np.ndarray, *, after_part: Callable[[], None] = lambda: None) -> None:
        """``counts`` are those of all items, int32 [items]; ``after_part`` is called after each part that was read."""
        self.counts = counts
        zero = np.zeros(1, np.int64)
        captions, captioned = [zero], [zero]
        for start in range(0, len(counts), _ROWS * _BLOCK):
            part = counts[start : start + _ROWS * _BLOCK]
            blocks = np.arange(0, len(part), _BLOCK)
            captions.append(np.add.reduceat(part, blocks, dtype=np.int64))
            captioned.append(np.add.reduceat(part > 0, blocks, dtype=np.int64))
            after_part()
        self._captions, self._captioned = (np.concatenate(each).cumsum() for each in (captions, captioned))
        self.captioned_items = int(self._captioned[-1])
        """Number of items that have captions."""

    def first(self, item: np.ndarray) -> np.ndarray:
        """Row of the first caption of each ``item``, int64 [B]."""
        block, place = item // _BLOCK, item % _BLOCK
        return self._captions[block] + (self._of_block(block) * (np.arange(_BLOCK) < place[:, None])).sum(1)

    def captioned(self, number: np.ndarray) -> np.ndarray:
        """The items of these numbers among those that have captions, int64 [B]."""
        if self.captioned_items == len(self.counts):
            return number
        block = np.searchsorted(self._captioned, number, side="right") - 1
        within = number - self._captioned[block]
        return block * _BLOCK + ((self._of_block(block) > 0).cumsum(1) > within[:, None]).argmax(1)

    def rows(self, items: np.ndarray) -> np.ndarray:
        """Rows of all captions of ``items``, in their order."""
        counts = self.counts[items]
        first = [self.first(items[start : start + _ROWS]) for start in range(0, len(items), _ROWS)]
        before = np.cumsum(counts, dtype=np.int64) - counts
        return np.repeat(np.concatenate([*first, before[:0]]) - before, counts) + np.arange(counts.sum())

    def _of_block(self, block: np.ndarray) -> np.ndarray:
        """Counts of the items of each block [B, _BLOCK]; what lies behind the last item counts 0."""
        item = block[:, None] * _BLOCK + np.arange(_BLOCK)
        found = self.counts.take(item, mode="clip")
        return found * (item < len(self.counts))


class _Resident:
    """Keeps mapped files from filling a process's memory.

    Every page that is read stays resident. When these pages take too much, the process releases all that it has mapped;
    they stay in the system's cache, from where they come back without the disk.
    """

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        """``arrays`` are those of `_map`."""
        maps: list[Any] = [array.base.base for array in arrays if array.base is not None]
        self._maps = [each for each in maps if hasattr(each, "madvise")]
        self._kept = _mapped_bytes()

    def limited(self, take: Callable[[np.ndarray, np.ndarray], Taken]) -> Callable[[np.ndarray, np.ndarray], Taken]:
        """``take`` with a look at the memory after it."""

        def limited(index: np.ndarray, epoch: np.ndarray) -> Taken:
            found = take(index, epoch)
            self.limit()
            return found

        return limited

    def limit(self) -> None:
        """Release what is mapped if too much of it is resident."""
        if _mapped_bytes() - self._kept > _MOST_MAPPED:
            self.let_go()

    def let_go(self) -> None:
        """Release all that is mapped."""
        for each in self._maps:
            each.madvise(mmap.MADV_DONTNEED)
        self._kept = _mapped_bytes()


def _mapped_bytes() -> int:
    """Bytes of files that are resident in this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def _map(path: Path, array: Mapping[str, Any]) -> np.ndarray:
    """The array of a ``.npy`` file, memory-mapped. Raises an error where the file is not what ``array`` says."""
    expected, found = npy_bytes(array), path.stat().st_size
    if found != expected:
        raise UserError(f"{path} has {found} bytes, not {expected}: encode it again")
    mapped = np.load(path, mmap_mode="r")
    if ([*mapped.shape], mapped.dtype.str) != (array["shape"], array["dtype"]):
        raise ValueError(f"{path.name} holds {mapped.dtype} {[*mapped.shape]}, not {array['dtype']} {array['shape']}")
    return np.asarray(mapped)  # still mapped; rows of an `np.memmap` itself are slower to take


def _to_torch(array: np.ndarray) -> Tensor:
    # Converted by NumPy: torch would start a team of OpenMP threads in each preparing thread, which then spin.
    return torch.from_numpy(array.astype(np.int64))


@dataclass(frozen=True, slots=True)
class VectorStore:
    """A folder of vectors: embeddings to search, features to learn from.

    vectors.npy     [items, width] or [items, length, width], float32 or float16
    NAME.npy        [items, ...]: further arrays, for example `labels` or `lengths`
    keys.txt        a name for each item
    manifest.json   what the writer wants to be remembered, for example the digest of the model
    """

    folder: Path
    keys: list[str]
    manifest: dict[str, Any]
    _arrays: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: Path) -> "VectorStore":
        """Map the arrays; none of them is read. Raises UserError for a folder that holds none, or not all of it."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of vectors")
        try:
            manifest = json.loads((folder / VECTORS_MANIFEST).read_text())
            keys = (folder / "keys.txt").read_text(**KEYS_ENCODING).split("\n")[:-1]
            arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
            if "vectors" not in arrays:
                raise ValueError("it has no vectors.npy")
            for name, array in arrays.items():
                if len(array) != len(keys):
                    raise ValueError(f"{name}.npy has {len(array)} rows for {len(keys)} keys")
        except (OSError, EOFError, ValueError, TypeError) as error:  # JSON's and Unicode's errors are ValueErrors
            raise UserError(f"{folder}: not a complete store of vectors ({error}): make it again") from error
        return cls(folder, keys, manifest, arrays)

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        return (Path(folder) / VECTORS_MANIFEST).is_file() and (Path(folder) / "vectors.npy").is_file()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def vectors(self) -> np.ndarray:
        return self._arrays["vectors"]

    @property
    def further(self) -> dict[str, np.ndarray]:
        """All arrays but the vectors, by name."""
        return {name: array for name, array in self._arrays.items() if name != "vectors"}

    def array(self, name: str) -> np.ndarray | None:
        """A further array, or None if the store has none of that name."""
        return self._arrays.get(name)


def write_vectors(
    folder: Path,
    batches: Iterable[np.ndarray | Mapping[str, np.ndarray]],
    *,
    keys: Iterable[str],
    manifest: Mapping[str, Any],
) -> VectorStore:
    """Write a store of vectors batch by batch. The folder appears when it is complete and replaces an earlier store.

    Args:
        folder: Folder to write. Raises UserError when it holds anything but a store.
        batches: Arrays [B, ...] of vectors, or several arrays by name with ``vectors`` among them.
        keys: A name for each item. Like ``manifest`` it is read after the last batch, so that a generator of batches
            may still fill both.
        manifest: Anything that JSON can hold.
    """
    check_free(folder)
    writer = ResumableArrayWriter(folder, None)
    try:
        for batch in batches:
            writer.append(batch if isinstance(batch, Mapping) else {"vectors": batch})
        writer.append({}, keys=keys)
        return finish_vectors(writer, manifest)
    finally:
        writer.discard()


def finish_vectors(writer: ResumableArrayWriter, manifest: Mapping[str, Any]) -> VectorStore:
    """Finish a store of vectors. For callers that use the writer themselves, in order to resume after a stop."""
    if not writer.arrays:
        raise UserError(f"{writer.out.name}: nothing to write")
    return writer.finish(VECTORS_MANIFEST, manifest, VectorStore.open)


def check_free(folder: Path) -> None:
    """Raise UserError when ``folder`` holds anything but a store of vectors: a check before hours of work."""
    if folder.exists() and not VectorStore.is_one(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and holds no vectors: choose another folder")


# Encoding ahead of training


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTokenizers:
    """The functions that turn pixels into tokens and texts into ids. None leaves that side out."""

    image_size: int = 0
    """Pixels of a side S of the images that ``tokenize_images`` and ``image_features`` take."""
    tokenize_images: Callable[[Tensor], Tensor] | None = None
    """uint8 pixels [B 3 S S] to tokens [B N]."""
    image_features: Callable[[Tensor], Tensor] | None = None
    """uint8 pixels [B 3 S S] to features of a pretrained encoder [B G], which are stored in half precision. They need
    ``tokenize_images`` beside them."""
    teacher_size: int = 0
    """Pixels of a side of the images that ``teacher_features`` takes. They are read apart, so that the tokens of an
    image do not depend on a teacher."""
    teacher_features: Callable[[Tensor], Tensor] | None = None
    """uint8 pixels [B 3 H W] to features of the model that teaches [B T], which are stored in half precision. They need
    ``tokenize_images`` beside them."""
    tokenize_texts: Callable[[list[str]], Tensor] | None = None
    """Texts to ids [B L], padded with 0."""
    text_features: Callable[[Tensor], Tensor] | None = None
    """Ids [B L] to features of the frozen text encoder [B L F], which are stored in half precision."""
    fingerprint: str = ""
    """Differs for other weights or settings. Data of different fingerprints must not be mixed."""


def encode(
    source: Source,
    out: Path,
    tokenizers: DataTokenizers,
    *,
    indices: np.ndarray | range | None = None,
    max_skipped_share: float = 0.01,
    workers: int = 2,
    engine: Engine = LOCAL,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Store:
    """Encode ``indices`` (default: all) of a source into the folder ``out``, which appears when it is complete.

    An interrupted call resumes when it is repeated with the same arguments. Unreadable images are left out, counted and
    listed in ``skipped.jsonl``; more than ``max_skipped_share`` of them raise UserError. So does an ``out`` that holds
    anything but encoded data; encoded data is replaced.

    Args:
        source: Images, texts or both.
        out: Folder to write.
        tokenizers: What to encode with.
        indices: Items of the source to encode, in this order.
        max_skipped_share: Share of unreadable images that is tolerated, 0 to 1.
        workers: Number of threads that decode images.
        engine: Who encodes; the ``reopen`` of another one than the local gives the source and the tokenizers.
        advance: Called after each chunk with the numbers of items done and of items in all.
    """
    if out.exists() and not Store.is_one(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and holds no encoded data: choose another folder")
    items = range(len(source)) if indices is None else indices
    writer = ResumableArrayWriter(out, origin(source, tokenizers, items))
    skipped = SkippedItems(max_skipped_share=max_skipped_share, reasons=writer.skipped)
    work = partial(_encode_block, workers=workers)
    engine.write(writer, work, (source, tokenizers), items, rows=_CHUNK, skipped=skipped, advance=advance)
    skipped.check(len(items))
    if writer.items == 0:
        raise UserError(f"{source.name}: nothing to encode")
    manifest = {name: writer.state[name] for name in ("made_by", "items", "arrays")}
    manifest |= {"version": STORE_VERSION, "skipped": len(skipped)}
    return writer.finish(STORE_MANIFEST, manifest, Store.open)


def origin(source: Source, tokenizers: DataTokenizers, indices: np.ndarray | range) -> dict[str, str]:
    """What the content of a store depends on; its manifest has it as ``made_by``."""
    found = {"source": source.name, "tokenizers": tokenizers.fingerprint, "items": items_digest(indices)}
    return found | {"content": content_digest(source)}


def _encode_block(tools: tuple[Source, DataTokenizers], items: np.ndarray, *, workers: int) -> Rows:
    """Arrays of the block, integers in four bytes, and the keys of its readable items."""
    source, tokenizers = tools
    arrays: dict[str, np.ndarray] = {}
    skipped: dict[str, str] = {}
    if tokenizers.tokenize_images is not None:
        pixels, items, skipped = read_block(source, items, size=tokenizers.image_size, workers=workers)
        if len(items):
            pixels_B3SS = channels_first(pixels)
            arrays["tokens"] = tokenizers.tokenize_images(pixels_B3SS).cpu().numpy().astype(np.int32)
            if tokenizers.image_features is not None:
                arrays["image_features"] = tokenizers.image_features(pixels_B3SS).half().cpu().numpy()
            if tokenizers.teacher_features is not None:
                pixels, _, _ = read_block(source, items, size=tokenizers.teacher_size, workers=workers)
                features = tokenizers.teacher_features(channels_first(pixels))
                arrays["teacher_features"] = features.half().cpu().numpy()
    if tokenizers.tokenize_texts is not None:
        captions = [source.captions(int(item)) for item in items]
        arrays["counts"] = np.array([len(texts) for texts in captions], np.int32)
        texts = [text for group in captions for text in group]
        if texts:
            ids = tokenizers.tokenize_texts(texts)
            arrays["ids"] = ids.cpu().numpy().astype(np.int32)
            if tokenizers.text_features is not None:
                arrays["features"] = tokenizers.text_features(ids).half().cpu().numpy()
    return Rows(arrays=arrays, keys=[source.key(int(item)) for item in items], skipped=skipped)
