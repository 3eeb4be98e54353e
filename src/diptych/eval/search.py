"""Which of many vectors lie nearest, exactly.

Shapes: Q queries, N vectors, D width, K hits of a query, B vectors of a block, C of those in the cache.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 16_384
"""Vectors whose scores are held at once."""
_CACHED = 1024
"""Vectors converted to fp32 at once: they are still in the cache (2 MB at width 512) when they are multiplied."""
_QUERIES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """The best of each query, best first."""

    scores_QK: Float[Tensor, "Q K"]
    """Inner products in fp32: cosines where the vectors have length 1."""
    items_QK: Int[Tensor, "Q K"]


def nearest(queries_QD: Float[Tensor, "Q D"], vectors_ND: np.ndarray, *, k: int, block: int = BLOCK) -> Hits:
    """The ``k`` vectors (all, if there are fewer) with the largest inner product with each query.

    Every vector is scored in fp32 as it is stored, and the best of each ``block`` are merged into the best so far, so
    that there is never a matrix of all similarities. ``vectors_ND`` may be a memory map larger than memory,
    fp16 or fp32. Among equal scores any may come first.
    """
    assert k > 0, k
    stored_ND = _as_tensor(vectors_ND)
    parts = [_nearest(some_QD.float(), stored_ND, k, block) for some_QD in queries_QD.split(_QUERIES)]
    return Hits(
        scores_QK=torch.cat([part.scores_QK for part in parts]), items_QK=torch.cat([part.items_QK for part in parts])
    )


def _nearest(queries_QD: Tensor, stored_ND: Tensor, k: int, block: int) -> Hits:
    scores_BQ = queries_QD.new_empty(min(block, len(stored_ND)), len(queries_QD))
    # Both are written again and again: new memory for each block would cost more than the arithmetic.
    buffer_CD = queries_QD.new_empty(min(_CACHED, len(scores_BQ)), queries_QD.shape[1])
    scores_QK = queries_QD.new_empty(len(queries_QD), 0)
    items_QK = torch.empty_like(scores_QK, dtype=torch.int64)
    for start in range(0, len(stored_ND), len(scores_BQ)):
        vectors_BD = stored_ND[start : start + len(scores_BQ)]
        block_BQ = _score(vectors_BD, queries_QD, buffer_CD, scores_BQ[: len(vectors_BD)])
        found = block_BQ.T.topk(min(k, len(vectors_BD)))
        scores, items = torch.cat([scores_QK, found.values], 1), torch.cat([items_QK, found.indices + start], 1)
        best = scores.topk(min(k, scores.shape[1]))
        scores_QK, items_QK = best.values, items.gather(1, best.indices)
    return Hits(scores_QK=scores_QK, items_QK=items_QK)


def _score(vectors_BD: Tensor, queries_QD: Tensor, buffer_CD: Tensor, scores_BQ: Tensor) -> Tensor:
    """Fills ``scores_BQ``."""
    pieces = zip(vectors_BD.split(len(buffer_CD)), scores_BQ.split(len(buffer_CD)), strict=True)
    for some_CD, scores_CQ in pieces:
        if (some_CD.dtype, some_CD.device) != (buffer_CD.dtype, buffer_CD.device):
            some_CD = buffer_CD[: len(some_CD)].copy_(some_CD)
        torch.mm(some_CD, queries_QD.T, out=scores_CQ)
    return scores_BQ


def _as_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # of memory mapped for reading only, which nobody here writes to
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
