"""Which of many vectors lie nearest, exactly.

Shapes: Q queries, N vectors, D width, K hits of a query, B vectors of a block.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 16_384
"""Vectors scored at once. At width 512 their fp32 copy is 32 MB, and that is all the memory a search needs."""
_QUERIES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """The best of each query, best first."""

    scores_QK: Float[Tensor, "Q K"]
    """Inner products in fp32: cosines where the vectors have length 1."""
    items_QK: Int[Tensor, "Q K"]


def nearest(queries_QD: Float[Tensor, "Q D"], vectors_ND: np.ndarray, *, k: int, block: int = BLOCK) -> Hits:
    """The ``k`` vectors (all, if there are fewer) with the largest inner product with each query.

    Every vector is scored in fp32, ``block`` of them at a time, and the best of a block are merged into the best so
    far, so that there is never a matrix of all similarities. ``vectors_ND`` may be a memory map larger than memory,
    fp16 or fp32. Among equal scores any may come first.
    """
    assert k > 0, k
    stored_ND = _as_tensor(vectors_ND)
    # Written again and again it stays mapped: a new tensor for each block would cost many times the conversion itself.
    buffer_BD = torch.empty(min(block, len(stored_ND)), stored_ND.shape[1], device=queries_QD.device)
    parts = [_nearest(some_QD.float(), stored_ND, buffer_BD, k) for some_QD in queries_QD.split(_QUERIES)]
    return Hits(
        scores_QK=torch.cat([part.scores_QK for part in parts]), items_QK=torch.cat([part.items_QK for part in parts])
    )


def _nearest(queries_QD: Tensor, stored_ND: Tensor, buffer_BD: Tensor, k: int) -> Hits:
    scores_QK = queries_QD.new_empty(len(queries_QD), 0)
    items_QK = torch.empty_like(scores_QK, dtype=torch.int64)
    for start in range(0, len(stored_ND), len(buffer_BD)):
        vectors_BD = stored_ND[start : start + len(buffer_BD)]
        if (vectors_BD.dtype, vectors_BD.device) != (buffer_BD.dtype, buffer_BD.device):
            vectors_BD = buffer_BD[: len(vectors_BD)].copy_(vectors_BD)
        block = (vectors_BD @ queries_QD.T).T.topk(min(k, len(vectors_BD)))
        scores = torch.cat([scores_QK, block.values], 1)
        items = torch.cat([items_QK, block.indices + start], 1)
        best = scores.topk(min(k, scores.shape[1]))
        scores_QK, items_QK = best.values, items.gather(1, best.indices)
    return Hits(scores_QK=scores_QK, items_QK=items_QK)


def _as_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # of memory mapped for reading only, which nobody here writes to
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
