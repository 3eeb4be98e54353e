import numpy as np
import pytest

from diptych.data.vectors import VectorStore, write_vectors
from diptych.errors import UserError

VECTORS = np.random.default_rng(0).standard_normal((10_003, 3)).astype(np.float16)
KEYS = [f"item {number}" for number in range(len(VECTORS))]


@pytest.fixture
def store(tmp_path) -> VectorStore:
    return write_vectors(tmp_path / "store", np.array_split(VECTORS, 7), keys=KEYS, manifest={"model": "abc"})


def test_what_is_written_is_read(store, tmp_path):
    assert (len(store), store.keys, store.manifest) == (len(VECTORS), KEYS, {"model": "abc"})
    assert isinstance(store.vectors, np.memmap)
    assert store.vectors.dtype == np.float16
    np.testing.assert_array_equal(store.vectors, VECTORS)
    np.testing.assert_array_equal(np.load(store.folder / "vectors.npy"), VECTORS)
    assert store.array("labels") is None
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_further_arrays_and_sequences(tmp_path):
    vectors = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    labels = np.array([3, 1, 2, 0])
    batches = ({"vectors": vectors[i : i + 2], "labels": labels[i : i + 2]} for i in (0, 2))
    store = write_vectors(tmp_path / "store", batches, keys="abcd", manifest={})
    np.testing.assert_array_equal(store.vectors, vectors)
    np.testing.assert_array_equal(store.array("labels"), labels)


def test_keys_and_manifest_may_be_filled_by_the_maker_of_the_batches(tmp_path):
    keys: list[str] = []
    manifest = {"skipped": 0}

    def batches():
        for key in ("two\nlines", "any \udcff byte", " spaces "):
            keys.append(key)
            manifest["skipped"] += 1
            yield np.ones((1, 2), np.float32)

    store = write_vectors(tmp_path / "store", batches(), keys=keys, manifest=manifest)
    assert store.keys == ["two lines", "any \udcff byte", " spaces "]
    assert store.manifest == {"skipped": 3}


def test_a_store_is_replaced_and_nothing_else(store, tmp_path):
    write_vectors(store.folder, [VECTORS[:2]], keys=KEYS[:2], manifest={})
    assert len(VectorStore.open(store.folder)) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for taken in ("mine", "file"):
        with pytest.raises(UserError, match=taken):
            write_vectors(tmp_path / taken, [VECTORS[:2]], keys=KEYS[:2], manifest={})
    assert (tmp_path / "mine/photo.png").exists()


def test_an_interruption_leaves_the_old_store_and_nothing_else(store, tmp_path):
    def batches():
        yield VECTORS[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_vectors(store.folder, batches(), keys=KEYS, manifest={})
    assert len(VectorStore.open(store.folder)) == len(VECTORS)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_nothing_to_write(tmp_path):
    with pytest.raises(UserError, match="store: nothing to write"):
        write_vectors(tmp_path / "store", [], keys=[], manifest={})
    with pytest.raises(UserError, match="2 rows for 3 keys"):
        write_vectors(tmp_path / "store", [VECTORS[:2]], keys=KEYS[:3], manifest={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("manifest.json", lambda content: b"{"),
        ("manifest.json", None),
        ("keys.txt", lambda content: b"one\n"),
        ("vectors.npy", None),
        ("vectors.npy", lambda content: content[:-1]),
        ("vectors.npy", lambda content: content[:20]),
        ("vectors.npy", lambda content: b""),
        ("vectors.npy", lambda content: bytes(range(256))),
    ],
)
def test_a_damaged_store_is_named(store, file, damage):
    content = (store.folder / file).read_bytes()
    (store.folder / file).unlink()  # it is mapped: cutting it in place would be a bus error
    if damage is not None:
        (store.folder / file).write_bytes(damage(content))
    with pytest.raises(UserError, match=r"store: not a complete store of vectors \([^\n]+\): make it again$"):
        VectorStore.open(store.folder)


def test_no_store(tmp_path):
    assert not VectorStore.is_one(tmp_path)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        VectorStore.open(tmp_path / "nowhere")
