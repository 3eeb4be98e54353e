import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.cli.inference import embed
from diptych.data.store import VectorStore, write_vectors
from diptych.errors import UserError
from diptych.run_folder import kind_of
from diptych.train.config import OptimConfig, TrainConfig
from diptych.uml.ssl_objective import SharedTransformerConfig, UmlSslConfig
from diptych.uml.ssl_training import UmlSslRun, embed_features


def make_store(folder, *, width: int, seed: int, items: int = 24, places: int = 5) -> VectorStore:
    """Two classes that differ in how their sequences go on: x, then x again or -x."""
    rng = np.random.default_rng(seed)
    labels = np.arange(items) % 2
    start = rng.standard_normal((items, 1, width))
    sign = np.where(labels == 0, 1.0, -1.0)[:, None, None] ** np.arange(places)[:, None]
    vectors = (start * sign).astype(np.float32)
    arrays = {"vectors": vectors, "lengths": rng.integers(2, places + 1, items), "labels": labels}
    return write_vectors(folder, [arrays], keys=[str(n) for n in range(items)], manifest={"seed": seed})


@pytest.fixture
def run(tmp_path) -> UmlSslRun:
    make_store(tmp_path / "audio", width=4, seed=0)
    make_store(tmp_path / "images", width=6, seed=1, items=10)
    make_store(tmp_path / "texts", width=3, seed=2, items=7)
    return UmlSslRun(
        target=str(tmp_path / "audio"),
        others=f"{tmp_path / 'images'},{tmp_path / 'texts'}",
        model=SharedTransformerConfig(width=16, depth=1, heads=2),
        objective=UmlSslConfig(aux_start_step=3),
        train=TrainConfig(
            steps=8, batch_size=6, checkpoint_every=4, device="cpu", workers=0, tensorboard=False, quiet=True
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, schedule="constant"),
    )


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_the_run_folder_embeds_without_the_other_modalities(run, tmp_path):
    run.fit(tmp_path / "run", recipe="uml-ssl")
    before = embed_features(tmp_path / "run", VectorStore.open(tmp_path / "audio"), device="cpu")
    assert before.shape == (24, 16)
    shutil.move(tmp_path / "run", tmp_path / "copy")
    for other in ("images", "texts"):
        shutil.rmtree(tmp_path / other)
    again = embed_features(tmp_path / "copy", VectorStore.open(tmp_path / "audio"), device="cpu")
    np.testing.assert_array_equal(again, before)
    assert kind_of(tmp_path / "copy") == "feature encoder"


def test_a_store_of_features_becomes_one_of_embeddings(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diptych.uml.ssl_training._ROWS", 10)  # in pieces
    run.fit(tmp_path / "run", recipe="uml-ssl")
    features = VectorStore.open(tmp_path / "audio")
    embed(tmp_path / "run", str(tmp_path / "audio"), out=tmp_path / "embedded", device="cpu")
    found = VectorStore.open(tmp_path / "embedded")
    wanted = embed_features(tmp_path / "run", features, device="cpu")
    np.testing.assert_allclose(found.vectors, wanted, atol=2e-3)
    np.testing.assert_array_equal(found.array("labels"), features.array("labels"))
    assert found.keys == features.keys
    assert found.array("lengths") is None
    assert "24 embeddings" in capsys.readouterr().out


def test_the_others_join_at_their_step(run, tmp_path):
    run.fit(tmp_path / "run", recipe="uml-ssl")
    terms = [{key for key in line if key.startswith("loss/")} for line in lines(tmp_path / "run")]
    assert terms[:3] == [{"loss/target"}] * 3
    assert terms[3:] == [{"loss/target", "loss/other_1", "loss/other_2"}] * 5


def test_a_resumed_run_is_bit_identical(run, tmp_path):
    run.fit(tmp_path / "whole", recipe="uml-ssl")
    replace(run, train=replace(run.train, steps=4)).fit(tmp_path / "parts", recipe="uml-ssl")
    run.fit(tmp_path / "parts", recipe="uml-ssl")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, 9))


def test_mistakes_are_told(run, tmp_path):
    with pytest.raises(UserError, match=r"aux-start-step 8 is not before --train\.steps 8"):
        replace(run, objective=UmlSslConfig(aux_start_step=8)).fit(tmp_path / "run", recipe="uml-ssl")
    with pytest.raises(UserError, match="nowhere"):
        replace(run, others=str(tmp_path / "nowhere")).fit(tmp_path / "run", recipe="uml-ssl")
    run.fit(tmp_path / "run", recipe="uml-ssl")
    with pytest.raises(UserError, match=r"width 6, but the target of .* has width 4"):
        embed_features(tmp_path / "run", VectorStore.open(tmp_path / "images"))
    with pytest.raises(UserError, match="trained with other settings"):
        replace(run, others="").fit(tmp_path / "run", recipe="uml-ssl")


def test_the_network_follows_from_the_seed(run):
    first, again = run.build(run.open()), run.build(run.open())
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
