import numpy as np
import pytest
import torch

from diptych.data.scenes.source import ScenesSource
from diptych.dual import search as dual_runs
from diptych.dual.model import DualEncoder
from diptych.dual.search import Index, embed_run, read_lines
from diptych.errors import UserError
from diptych.io import weights_digest

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


def test_hits_name_the_items_of_the_source(dual_run, tmp_path):
    embed_run(dual_run, SRC, side="images", out=tmp_path / "store", workers=1, device="cpu")
    hits = Index(dual_run, tmp_path / "store", device="cpu").search("a red circle", top=12)
    assert sorted(hit.item for hit in hits) == list(range(12))
    assert [hit.key for hit in hits] == [SOURCE.key(hit.item) for hit in hits]


def test_a_store_without_the_name_of_its_model(dual_run, tmp_path):
    store, _ = embed_run(dual_run, SRC, side="images", out=tmp_path / "store", workers=1, device="cpu")
    (store.folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"made by another model \(another program\)"):
        Index(dual_run, store.folder, device="cpu")


def test_lines_are_clean(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeff  hot   dog \r\n\r\ncat", encoding="utf-8")
    assert read_lines(tmp_path / "names.txt", what="name") == ["hot dog", "cat"]


@pytest.mark.parametrize(("side", "method"), [("images", "embed_images"), ("texts", "embed_texts")])
def test_an_interrupted_embedding_goes_on_where_it_was(dual_run, tmp_path, monkeypatch, side, method):
    monkeypatch.setattr(dual_runs, "_ROWS", 4)
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
