"""Searching more vectors than one waits for: an inverted file of faiss beside the store, by the extra ``ann``.

The vectors are sorted into about sqrt(N) cells; a query visits the ``PROBES`` cells whose centres lie nearest. What it
finds has the scores of exact search (up to fp16), but a neighbour in a cell that was not visited is missed.

Shapes: Q queries, N vectors, D width, K hits of a query.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diptych.data.vectors import VectorStore
from diptych.errors import UserError
from diptych.eval.search import BLOCK, Hits

PROBES = 32
_INDEX = "index.faiss"
_SAMPLE = 64
"""Vectors per cell from which the cells are learnt."""


def nearest_approximate(queries_QD: Float[Tensor, "Q D"], store: VectorStore, *, k: int, probes: int = PROBES) -> Hits:
    """As `search.nearest`, by an index that the first call builds and leaves in the store's folder.

    Building takes about half a minute a million vectors on two cores, and memory for all of them in fp16. A query
    whose cells hold fewer than ``k`` vectors gets -1 for the rest. Raises UserError without faiss.
    """
    faiss = _import_faiss()
    file = store.folder / _INDEX
    if not file.exists():
        _build(faiss, store, file)
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise UserError(f"{file}: not a readable index: delete it and the next search builds it anew") from error
    index.nprobe = probes
    scores_QK, items_QK = index.search(np.ascontiguousarray(queries_QD.cpu().float().numpy()), min(k, len(store)))
    return Hits(scores_QK=torch.from_numpy(scores_QK), items_QK=torch.from_numpy(items_QK))


def _build(faiss: Any, store: VectorStore, file: Path) -> None:
    count, width = store.vectors.shape
    cells = max(1, min(round(count**0.5), count // _SAMPLE))
    index = faiss.index_factory(width, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    step = max(1, count // (_SAMPLE * cells))
    index.train(store.vectors[::step].astype(np.float32))
    for start in range(0, count, BLOCK):
        index.add(store.vectors[start : start + BLOCK].astype(np.float32))
    partial = file.with_name(f".{file.name}.partial")
    faiss.write_index(index, str(partial))
    partial.rename(file)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"approximate search needs faiss ({error}): pip install 'diptych[ann]'") from error
    return faiss
