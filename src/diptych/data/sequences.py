"""Feature sequences of a vector store as rows of a batch: tokens of an image or a text, frames of a sound.

A store of [items, length, width] may have an array `lengths` (default: all positions are real); items of a store of
[items, width] are sequences of one position.

Shapes: B rows, L positions, F width of the features.
"""

import numpy as np
import torch

from diptych.data.batch import Items
from diptych.data.streams import Stream
from diptych.data.vectors import VectorStore
from diptych.errors import UserError

_ROWS = 256
"""Items read at once where all are read."""
_SMALLEST_SCALE = 1e-4
"""A feature that hardly varies is not blown up."""


def sequence_stream(store: VectorStore) -> Stream:
    """All items. Raises UserError for lengths that cannot be."""
    lengths = store.array("lengths")
    most = store.vectors.shape[1] if store.vectors.ndim == 3 else 1
    if lengths is not None and len(lengths) and not 1 <= lengths.min() <= lengths.max() <= most:
        raise UserError(
            f"{store.folder}: lengths of {lengths.min()} to {lengths.max()}, but 1 to {most} is possible: make it again"
        )
    return Stream(size=len(store), take=lambda index, _: read_rows(store, index))


def read_rows(store: VectorStore, index: np.ndarray) -> Items:
    """The items ``index``, padded with whatever the store holds there to the longest of them."""
    vectors, lengths = store.vectors[index].astype(np.float32), store.array("lengths")
    if vectors.ndim == 2:
        vectors = vectors[:, None]
    count = np.full(len(index), vectors.shape[1]) if lengths is None else np.asarray(lengths[index])
    longest = int(count.max())
    valid = np.arange(longest) < count[:, None]
    return Items(features_BLF=torch.from_numpy(vectors[:, :longest]), valid_BL=torch.from_numpy(valid))


def feature_statistics(store: VectorStore) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over all valid positions, float32 [F]."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(store), _ROWS):
        rows = read_rows(store, np.arange(start, min(start + _ROWS, len(store))))
        assert rows.features_BLF is not None
        found = rows.features_BLF[rows.valid].numpy().astype(np.float64)
        count, total, squares = count + len(found), total + found.sum(0), squares + np.square(found).sum(0)
    mean = np.asarray(total) / count
    scale = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 0)).clip(_SMALLEST_SCALE)
    return mean.astype(np.float32), scale.astype(np.float32)
