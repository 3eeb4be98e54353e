import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.cli.inference import embed
from diptych.data.batch import Batch, SequenceExamples
from diptych.data.store import VectorStore, write_vectors
from diptych.errors import UserError
from diptych.rng import StepRNG
from diptych.run_folder import kind_of
from diptych.train.config import OptimConfig, TrainConfig
from diptych.uml.self_supervised import (
    SharedTransformer,
    SharedTransformerConfig,
    UmlSsl,
    UmlSslConfig,
    UmlSslRun,
    embed_features,
    next_embedding_loss,
)

CONFIG = SharedTransformerConfig(features={"image": 5, "text": 3}, width=16, depth=2, heads=2, dropout=0.0)


@pytest.fixture
def model() -> SharedTransformer:
    torch.manual_seed(0)
    model = SharedTransformer(CONFIG)
    for name, size in CONFIG.features.items():
        model.set_statistics(torch.randn(size).numpy(), (torch.rand(size) + 0.5).numpy(), modality=name)
    return model.eval()


def rows(lengths: list[int], *, places: int, features: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(len(lengths), places, features), torch.arange(places) < torch.tensor(lengths)[:, None]


def test_later_positions_change_nothing_earlier(model):
    x_BSF, _ = rows([6, 6], places=6)
    changed_BSF = x_BSF.clone()
    changed_BSF[0, 3] += 1
    before, after = (model.trunk(x, modality="image") for x in (x_BSF, changed_BSF))
    torch.testing.assert_close(after[0, :3], before[0, :3])
    torch.testing.assert_close(after[1], before[1])
    assert (after[0, 3:] - before[0, 3:]).abs().amax(-1).min() > 1e-4


def test_padding_never_changes_an_embedding(model):
    x_BSF, valid_BS = rows([2, 5, 1], places=8)
    alone = [(x[None, :n], v[None, :n]) for x, v, n in zip(x_BSF, valid_BS, [2, 5, 1], strict=True)]
    wanted = torch.cat([model.embed(*row, modality="image") for row in alone])
    for rubbish in (0.0, 1e4, float("nan")):
        padded_BSF = x_BSF.masked_fill(~valid_BS[..., None], rubbish)
        torch.testing.assert_close(model.embed(padded_BSF, valid_BS, modality="image"), wanted)


def test_order_counts(model):
    x_BSF, valid_BS = rows([4], places=4)
    assert (
        model.embed(x_BSF.flip(1), valid_BS, modality="image") - model.embed(x_BSF, valid_BS, modality="image")
    ).abs().max() > 1e-4


def test_features_are_standardized(model):
    own = model.modalities["text"]
    x_BSF = own.mean_F + own.scale_F * torch.tensor([[[1.0, -2.0, 0.5], [9.0, 9.0, 9.0]]])
    found = model.standardized(x_BSF, torch.tensor([[True, False]]), modality="text")
    torch.testing.assert_close(found, torch.tensor([[[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]]))


def test_it_is_saved_with_its_statistics(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = SharedTransformer.from_pretrained(str(tmp_path), local_files_only=True).eval()
    assert again.config == CONFIG
    x_BSF, valid_BS = rows([4], places=4, features=3)
    torch.testing.assert_close(
        again.embed(x_BSF, valid_BS, modality="text"), model.embed(x_BSF, valid_BS, modality="text")
    )


def test_no_weight_is_left_uninitialized():
    """Two networks made after one seeding from different memory are the same."""
    torch.manual_seed(0)
    first = SharedTransformer(CONFIG)
    torch.manual_seed(0)
    junk = [torch.full((64, 64), 7.0) for _ in range(50)]
    del junk
    second = SharedTransformer(CONFIG)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    weights = dict(first.named_parameters())
    assert all(weight.abs().max() <= 0.04 for name, weight in weights.items() if "norm" not in name)


THREE = SharedTransformerConfig(features={"audio": 5, "text": 3, "image": 4}, width=16, depth=2, heads=2, dropout=0.0)


@pytest.fixture
def fresh() -> SharedTransformer:
    torch.manual_seed(0)
    return SharedTransformer(THREE)


def sequences(lengths: list[int], *, features: int, places: int | None = None) -> SequenceExamples:
    generator = torch.Generator().manual_seed(features)
    places = places or max(lengths)
    return SequenceExamples(
        features_BSF=torch.randn(len(lengths), places, features, generator=generator),
        valid_BS=torch.arange(places) < torch.tensor(lengths)[:, None],
    )


@pytest.fixture
def batch() -> Batch:
    lengths = {"audio": [3, 6], "text": [1, 1], "image": [4, 1]}
    return Batch(
        rng=StepRNG(0, 0),
        streams={name: sequences(lengths[name], features=size) for name, size in THREE.features.items()},
    )


def loss_of(fresh: SharedTransformer, items: SequenceExamples, modality: str) -> torch.Tensor:
    return next_embedding_loss(fresh, items.features_BSF, items.valid_BS, modality=modality)


def naive(fresh: SharedTransformer, items: SequenceExamples, modality: str) -> torch.Tensor:
    """Row by row, without padding, position by position."""
    losses = []
    for x_SF, valid_S in zip(items.features_BSF, items.valid_BS, strict=True):
        x_SF = x_SF[valid_S]
        predicted_SF = fresh.predict(fresh.trunk(x_SF[None], modality=modality), modality=modality)[0]
        if len(x_SF) == 1:
            losses.append(((predicted_SF[0] - x_SF[0]) ** 2).mean())
        else:
            errors = [((predicted_SF[i] - x_SF[i + 1]) ** 2).mean() for i in range(len(x_SF) - 1)]
            losses.append(torch.stack(errors).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lengths", [[4, 4], [5, 2, 3], [1, 1], [1, 4, 1]])
def test_it_equals_a_naive_loop(fresh, lengths):
    items = sequences(lengths, features=5)
    torch.testing.assert_close(loss_of(fresh, items, "audio"), naive(fresh, items, "audio"))


def test_by_hand(fresh):
    """A network that predicts zero: the mean square of the targets, each row counting alike."""
    torch.nn.init.zeros_(fresh.modalities["text"].out.weight)
    x_BSF = torch.tensor([[[9.0, 9, 9], [1, 2, 2], [3, 0, 0]], [[2.0, 2, 2], [7, 7, 7], [7, 7, 7]]])
    valid_BS = torch.tensor([[True, True, True], [True, False, False]])
    loss = next_embedding_loss(fresh, x_BSF, valid_BS, modality="text")
    assert loss.item() == pytest.approx(((9 / 3 + 9 / 3) / 2 + 4) / 2)


def test_padding_changes_neither_loss_nor_gradient(fresh):
    short = sequences([3, 1], features=5)
    for rubbish in (1e4, float("nan")):
        longer = torch.full((2, 8, 5), rubbish)
        longer[:, :3] = torch.where(short.valid_BS[..., None], short.features_BSF, rubbish)
        padded = SequenceExamples(features_BSF=longer, valid_BS=torch.nn.functional.pad(short.valid_BS, (0, 5)))
        grads = []
        for items in (short, padded):
            fresh.zero_grad()
            loss = loss_of(fresh, items, "audio")
            loss.backward()
            grads.append([loss.detach(), *(p.grad.clone() for p in fresh.blocks.parameters())])
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", THREE.features)
def test_the_gradient_of_a_modality_reaches_the_trunk_and_its_own_maps_only(fresh, batch, name):
    loss_of(fresh, batch.streams[name], name).backward()
    reached = {n for n, p in fresh.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    wanted = {n for n, _ in fresh.named_parameters() if n.startswith(("blocks.", f"modalities.{name}."))}
    assert reached == wanted


def test_the_sum_and_its_curriculum(fresh, batch):
    objective = UmlSsl(fresh, UmlSslConfig(aux_start_step=5, aux_weight=0.25), target="audio")
    assert objective.streams == {"audio": 1, "text": 1, "image": 1}
    alone, together = objective(batch, 4), objective(batch, 5)
    assert set(alone.terms) == {"audio"}
    torch.testing.assert_close(alone.total, loss_of(fresh, batch["audio"], "audio"))
    parts = {name: loss_of(fresh, items, name) for name, items in batch.streams.items()}
    torch.testing.assert_close(together.total, parts["audio"] + 0.25 * (parts["text"] + parts["image"]))


def test_it_can_over_fit_one_batch(fresh, batch):
    objective = UmlSsl(fresh, UmlSslConfig(aux_start_step=0), target="audio")
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2, weight_decay=0.0)
    first = objective(batch, 0).total.item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = objective(batch, 0).total
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * first


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
    monkeypatch.setattr("diptych.uml.self_supervised._ROWS", 10)  # in pieces
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
