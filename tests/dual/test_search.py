import numpy as np
import pytest
import torch

from diptych.dual import search
from diptych.dual.search import nearest

VECTORS = np.random.default_rng(0).standard_normal((1000, 16)).astype(np.float32)
QUERIES = torch.from_numpy(np.random.default_rng(1).standard_normal((7, 16)).astype(np.float32))


def naive(vectors: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = QUERIES.double() @ torch.from_numpy(vectors.astype(np.float64)).T
    best = scores.sort(descending=True)
    return best.values[:, :k], best.indices[:, :k]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block", [1, 3, 999, 1000, 5000])
@pytest.mark.parametrize("cached", [1, 7, 1024])
def test_equals_sorting_all_similarities(monkeypatch, dtype, block, cached):
    monkeypatch.setattr(search, "_CACHED", cached)
    vectors = VECTORS.astype(dtype)
    scores_QK, items_QK = naive(vectors, 10)
    found = nearest(QUERIES, vectors, k=10, block=block)
    torch.testing.assert_close(found.items_QK, items_QK)
    torch.testing.assert_close(found.scores_QK, scores_QK.float(), rtol=1e-5, atol=1e-5)


def test_more_queries_than_are_scored_at_once(monkeypatch):
    monkeypatch.setattr(search, "_QUERIES", 3)
    torch.testing.assert_close(nearest(QUERIES, VECTORS, k=4).items_QK, naive(VECTORS, 4)[1])


def test_more_hits_than_vectors():
    found = nearest(QUERIES, VECTORS[:5], k=10, block=2)
    assert found.items_QK.shape == (7, 5)
    assert (found.items_QK.sort().values == torch.arange(5)).all()


def test_a_memory_map_is_read_without_a_warning(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS.astype(np.float16))
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    torch.testing.assert_close(nearest(QUERIES, vectors, k=3).items_QK, naive(vectors, 3)[1])


def test_memory_is_a_block_and_no_more(monkeypatch):
    """No tensor as large as the similarities or the vectors is ever made."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if not function.is_view:
                sizes = [t.numel() for t in (made if isinstance(made, (tuple, list)) else [made]) if torch.is_tensor(t)]
                largest = max(largest, *sizes, 0)
            return made

    with Watch():
        nearest(QUERIES, VECTORS.astype(np.float16), k=10, block=32)
    assert 32 * 16 <= largest < 1000 * 7
