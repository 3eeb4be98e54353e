import numpy as np
import pytest
import torch

from diptych.data.store import VectorStore, write_vectors
from diptych.data.streams import BatchSampler
from diptych.errors import UserError
from diptych.uml.features import feature_statistics, read_rows, sequence_stream


def store_of(folder, vectors: np.ndarray, **arrays: np.ndarray) -> VectorStore:
    keys = [str(number) for number in range(len(vectors))]
    return write_vectors(folder, [{"vectors": vectors} | arrays], keys=keys, manifest={})


@pytest.fixture
def store(tmp_path) -> VectorStore:
    vectors = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float16)
    return store_of(tmp_path / "s", vectors, lengths=np.array([4, 1, 2, 3, 1, 2]))


def test_rows_are_cut_to_the_longest(store):
    rows = read_rows(store, np.array([5, 1]))
    assert rows.valid_BS.tolist() == [[True, True], [True, False]]
    assert rows.features_BSF.dtype == torch.float32
    np.testing.assert_array_equal(rows.features_BSF, store.vectors[[5, 1], :2].astype(np.float32))


def test_without_lengths_everything_is_real(tmp_path):
    vectors = np.arange(12, dtype=np.float32)
    assert read_rows(store_of(tmp_path / "a", vectors.reshape(2, 3, 2)), np.array([0])).valid_BS.all()
    flat = read_rows(store_of(tmp_path / "b", vectors.reshape(4, 3)), np.array([2]))
    assert flat.features_BSF.tolist() == [[[6, 7, 8]]]
    assert flat.valid_BS.tolist() == [[True]]


def test_statistics_leave_padding_out(store, monkeypatch):
    monkeypatch.setattr("diptych.data.sequences._ROWS", 4)  # in two pieces
    lengths = store.array("lengths")
    real = np.concatenate([store.vectors[i, : lengths[i]] for i in range(6)]).astype(np.float64)
    mean, scale = feature_statistics(store)
    np.testing.assert_allclose(mean, real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(scale, real.std(0), rtol=1e-5)


def test_a_constant_feature_has_a_scale(tmp_path):
    _, scale = feature_statistics(store_of(tmp_path / "s", np.ones((5, 2), np.float32)))
    assert (scale > 0).all()


def test_a_stream_of_every_store_gives_the_items_of_an_epoch_once(store):
    batches = BatchSampler({"audio": sequence_stream(store)}, multiples={"audio": 1}, batch_size=3, seed=0)
    seen = [int(n) for step in range(2) for n in batches(step)["audio"].valid_BS.sum(1)]
    assert sorted(seen) == sorted(store.array("lengths"))


@pytest.mark.parametrize("wrong", [0, 5])
def test_impossible_lengths_are_told(tmp_path, wrong):
    bad = store_of(tmp_path / "s", np.zeros((2, 4, 3), np.float32), lengths=np.array([2, wrong]))
    with pytest.raises(UserError, match="but 1 to 4 is"):
        sequence_stream(bad)
