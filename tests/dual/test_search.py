import sys

import numpy as np
import pytest
import torch

from diptych.data.class_texts import read_names
from diptych.data.scenes import ScenesSource
from diptych.data.store import VectorStore, write_vectors
from diptych.dual import search
from diptych.dual.model import DualEncoder
from diptych.dual.search import Index, embed_run, nearest, nearest_approximate, read_templates
from diptych.errors import UserError
from diptych.io import weights_digest

# Exact search

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


# Approximate search


@pytest.fixture
def clustered(tmp_path) -> VectorStore:
    """Twenty clusters, so that there is something for cells to follow."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((20, 16))[np.arange(4000) % 20] + 0.3 * draw.standard_normal((4000, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return write_vectors(tmp_path / "s", [vectors.astype(np.float16)], keys=map(str, range(4000)), manifest={})


def queries(store: VectorStore) -> torch.Tensor:
    return torch.from_numpy(store.vectors[5:25].astype(np.float32))


def test_finds_nearly_what_exact_search_finds(clustered):
    pytest.importorskip("faiss")
    exact = nearest(queries(clustered), clustered.vectors, k=10)
    found = nearest_approximate(queries(clustered), clustered, k=10, probes=8)
    shared = [len({*a} & {*b}) / 10 for a, b in zip(exact.items_QK.tolist(), found.items_QK.tolist(), strict=True)]
    assert np.mean(shared) > 0.95
    torch.testing.assert_close(found.scores_QK[:, 0], exact.scores_QK[:, 0], atol=1e-3, rtol=0)
    all_cells = nearest_approximate(queries(clustered), clustered, k=10, probes=100)
    torch.testing.assert_close(all_cells.scores_QK, exact.scores_QK, atol=1e-3, rtol=0)


def test_the_index_is_built_once(clustered):
    pytest.importorskip("faiss")
    nearest_approximate(queries(clustered), clustered, k=1)
    built = (clustered.folder / "index.faiss").stat().st_mtime_ns
    nearest_approximate(queries(clustered), clustered, k=1)
    assert (clustered.folder / "index.faiss").stat().st_mtime_ns == built
    assert len(VectorStore.open(clustered.folder)) == 4000
    (clustered.folder / "index.faiss").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"index\.faiss: not a readable index"):
        nearest_approximate(queries(clustered), clustered, k=1)


def test_an_index_of_codes_finds_nearly_what_exact_search_finds(tmp_path, monkeypatch):
    """Its parts are searched together, and what the codes find is compared as it is."""
    pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(40, 16))
    vectors = centres[generator.integers(0, 40, 10_500)] + 0.5 * generator.normal(size=(10_500, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    store = write_vectors(tmp_path / "store", [vectors], keys=map(str, range(10_500)), manifest={})
    monkeypatch.setattr(search, "_PART", 4000)
    told = []
    assert search.build_ivfpq(store, advance=lambda *done: told.append(done)) == store.folder / "ivfpq"
    assert told == [(4000, 10_500), (8000, 10_500), (10_500, 10_500)]
    exact = nearest(queries(store), store.vectors, k=10)
    found = nearest_approximate(queries(store), store, k=10)
    shared = [len({*a} & {*b}) / 10 for a, b in zip(exact.items_QK.tolist(), found.items_QK.tolist(), strict=True)]
    assert np.mean(shared) > 0.9
    torch.testing.assert_close(found.scores_QK[:, 0], exact.scores_QK[:, 0], atol=1e-6, rtol=0)
    few = nearest_approximate(queries(store), store, k=2000, probes=1)
    rows = few.items_QK[0]
    assert (rows == -1).any()
    assert len(set(rows[rows >= 0].tolist())) == (rows >= 0).sum()
    (store.folder / "ivfpq/00001.faiss").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"00001\.faiss: not a readable index: delete .*ivfpq and embed again"):
        nearest_approximate(queries(store), store, k=1)


def test_without_faiss_the_extra_is_named(clustered, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails
    with pytest.raises(UserError, match=r"pip install 'diptych\[ann\]'"):
        nearest_approximate(queries(clustered), clustered, k=1)


# The commands

SOURCE, SRC = ScenesSource(count=12), "scenes:?count=12"


def test_a_store_of_images(dual_run, dual_encoder, tmp_path):
    store, skipped = embed_run(dual_run, SRC, side="images", out=tmp_path / "store", workers=1, device="cpu")
    assert (len(store), skipped) == (12, 0)
    assert store.vectors.dtype == np.float16
    assert store.manifest["model"] == weights_digest(dual_encoder)
    np.testing.assert_array_equal(store.array("items"), np.arange(12))
    pixels = torch.from_numpy(SOURCE.images(np.arange(12), 16)).permute(0, 3, 1, 2).contiguous()
    np.testing.assert_allclose(store.vectors, dual_encoder.embed_images(pixels).numpy(), atol=1e-3)


def test_a_store_of_texts_has_every_text_and_its_item(dual_run, dual_encoder, tmp_path):
    (tmp_path / "table.jsonl").write_text(
        '{"caption": ["a red circle", "a circle"]}\n{"caption": []}\n{"caption": ["a blue square"]}\n'
    )
    store, _ = embed_run(
        dual_run, str(tmp_path / "table.jsonl"), side="texts", out=tmp_path / "store", workers=1, device="cpu"
    )
    assert store.keys == ["a red circle", "a circle", "a blue square"]
    assert store.array("items").tolist() == [0, 0, 1]  # the table leaves out rows with nothing in them
    np.testing.assert_allclose(store.vectors, dual_encoder.embed_texts(store.keys).numpy(), atol=1e-3)


def test_results_name_the_items_of_the_source(dual_run, tmp_path):
    embed_run(dual_run, SRC, side="images", out=tmp_path / "store", workers=1, device="cpu")
    results = Index(dual_run, tmp_path / "store", device="cpu").search("a red circle", top=12)
    assert sorted(result.item for result in results) == list(range(12))
    assert [result.key for result in results] == [SOURCE.key(result.item) for result in results]


def test_a_store_without_the_name_of_its_model(dual_run, tmp_path):
    store, _ = embed_run(dual_run, SRC, side="images", out=tmp_path / "store", workers=1, device="cpu")
    (store.folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"made by another model \(another program\)"):
        Index(dual_run, store.folder, device="cpu")


def test_lines_are_clean(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeff  hot   dog \r\n\r\ncat", encoding="utf-8")
    assert read_names(tmp_path / "names.txt") == read_templates(tmp_path / "names.txt") == ["hot dog", "cat"]


@pytest.mark.parametrize(("side", "method"), [("images", "embed_images"), ("texts", "embed_texts")])
def test_an_interrupted_embedding_goes_on_where_it_was(dual_run, tmp_path, monkeypatch, side, method):
    monkeypatch.setattr(search, "_ROWS", 4)
    embed = getattr(DualEncoder, method)
    calls = []

    def count(encoder, *args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(encoder, *args)

    def run(out):
        return embed_run(dual_run, "scenes:?count=12", side=side, out=out, workers=1, device="cpu")[0]

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(DualEncoder, method, count)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    cut = run(tmp_path / "cut")
    assert len(calls) == 4  # one, one that fails, and the two that are left
    assert (cut.keys, cut.manifest) == (whole.keys, whole.manifest)
    for name in ("vectors", "items"):
        np.testing.assert_array_equal(cut.array(name), whole.array(name))
