import sys

import numpy as np
import pytest
import torch

from diptych.data.store import VectorStore, write_vectors
from diptych.dual.search import nearest, nearest_approximate
from diptych.errors import UserError


@pytest.fixture
def store(tmp_path) -> VectorStore:
    """Twenty clusters, so that there is something for cells to follow."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((20, 16))[np.arange(4000) % 20] + 0.3 * draw.standard_normal((4000, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return write_vectors(tmp_path / "s", [vectors.astype(np.float16)], keys=map(str, range(4000)), manifest={})


def queries(store: VectorStore) -> torch.Tensor:
    return torch.from_numpy(store.vectors[5:25].astype(np.float32))


def test_finds_nearly_what_exact_search_finds(store):
    pytest.importorskip("faiss")
    exact = nearest(queries(store), store.vectors, k=10)
    found = nearest_approximate(queries(store), store, k=10, probes=8)
    shared = [len({*a} & {*b}) / 10 for a, b in zip(exact.items_QK.tolist(), found.items_QK.tolist(), strict=True)]
    assert np.mean(shared) > 0.95
    torch.testing.assert_close(found.scores_QK[:, 0], exact.scores_QK[:, 0], atol=1e-3, rtol=0)
    all_cells = nearest_approximate(queries(store), store, k=10, probes=100)
    torch.testing.assert_close(all_cells.scores_QK, exact.scores_QK, atol=1e-3, rtol=0)


def test_the_index_is_built_once(store):
    pytest.importorskip("faiss")
    nearest_approximate(queries(store), store, k=1)
    built = (store.folder / "index.faiss").stat().st_mtime_ns
    nearest_approximate(queries(store), store, k=1)
    assert (store.folder / "index.faiss").stat().st_mtime_ns == built
    assert len(VectorStore.open(store.folder)) == 4000
    (store.folder / "index.faiss").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"index\.faiss: not a readable index"):
        nearest_approximate(queries(store), store, k=1)


def test_without_faiss_the_extra_is_named(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    with pytest.raises(UserError, match=r"pip install 'diptych\[ann\]'"):
        nearest_approximate(queries(store), store, k=1)
