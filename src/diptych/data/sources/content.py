"""A digest of what a source holds, by which a resumed run notices that captions or images were edited meanwhile."""

import hashlib
import os
from pathlib import Path

from diptych.data.sources.open import KeptSource, Source, find_files
from diptych.errors import UserError

_WHOLE = 256 * 2**20
"""Largest number of bytes of all files together that are read whole; of larger ones, blocks."""
_BLOCK, _BLOCKS = 2**16, 16
"""Bytes of a block, and number of blocks of a file."""


def content_digest(source: Source) -> str:
    """16 hexadecimal digits; empty for scenes and data sets of the hub, which their name decides.

    It covers all captions and image files where these lie in a folder or are listed in a table, and the files
    themselves of tars, parquet and texts. Where they are more than 256 MB together, sizes and blocks stand for files.
    Neither their dates nor the place of the folder count, so that a data set may be copied.
    """
    if isinstance(source, KeptSource):
        inner = content_digest(source.source).encode()
        return hashlib.blake2b(inner + source.keep_file.read_bytes(), digest_size=8).hexdigest()
    if source.name.startswith(("scenes:", "hub:")):
        return ""
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
