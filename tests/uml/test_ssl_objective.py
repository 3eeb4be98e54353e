import pytest
import torch

from diptych.data.batch import Batch, SequenceExamples
from diptych.rng import StepRNG
from diptych.uml.ssl_objective import UmlSsl, UmlSslConfig, next_embedding_loss
from diptych.uml.trunk import SharedTransformer, SharedTransformerConfig

CONFIG = SharedTransformerConfig(features={"audio": 5, "text": 3, "image": 4}, width=16, depth=2, heads=2, dropout=0.0)


@pytest.fixture
def model() -> SharedTransformer:
    torch.manual_seed(0)
    return SharedTransformer(CONFIG)


def rows(lengths: list[int], *, features: int, places: int | None = None) -> SequenceExamples:
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
        rng=StepRNG(0, 0), streams={name: rows(lengths[name], features=size) for name, size in CONFIG.features.items()}
    )


def loss_of(model: SharedTransformer, items: SequenceExamples, modality: str) -> torch.Tensor:
    return next_embedding_loss(model, items.features_BSF, items.valid_BS, modality=modality)


def naive(model: SharedTransformer, items: SequenceExamples, modality: str) -> torch.Tensor:
    """Row by row, without padding, position by position."""
    losses = []
    for x_SF, valid_S in zip(items.features_BSF, items.valid_BS, strict=True):
        x_SF = x_SF[valid_S]
        predicted_SF = model.predict(model.trunk(x_SF[None], modality=modality), modality=modality)[0]
        if len(x_SF) == 1:
            losses.append(((predicted_SF[0] - x_SF[0]) ** 2).mean())
        else:
            errors = [((predicted_SF[i] - x_SF[i + 1]) ** 2).mean() for i in range(len(x_SF) - 1)]
            losses.append(torch.stack(errors).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("lengths", [[4, 4], [5, 2, 3], [1, 1], [1, 4, 1]])
def test_it_equals_a_naive_loop(model, lengths):
    items = rows(lengths, features=5)
    torch.testing.assert_close(loss_of(model, items, "audio"), naive(model, items, "audio"))


def test_by_hand(model):
    """A network that predicts zero: the mean square of the targets, each row counting alike."""
    torch.nn.init.zeros_(model.modalities["text"].out.weight)
    x_BSF = torch.tensor([[[9.0, 9, 9], [1, 2, 2], [3, 0, 0]], [[2.0, 2, 2], [7, 7, 7], [7, 7, 7]]])
    valid_BS = torch.tensor([[True, True, True], [True, False, False]])
    loss = next_embedding_loss(model, x_BSF, valid_BS, modality="text")
    assert loss.item() == pytest.approx(((9 / 3 + 9 / 3) / 2 + 4) / 2)


def test_padding_changes_neither_loss_nor_gradient(model):
    short = rows([3, 1], features=5)
    for rubbish in (1e4, float("nan")):
        longer = torch.full((2, 8, 5), rubbish)
        longer[:, :3] = torch.where(short.valid_BS[..., None], short.features_BSF, rubbish)
        padded = SequenceExamples(features_BSF=longer, valid_BS=torch.nn.functional.pad(short.valid_BS, (0, 5)))
        grads = []
        for items in (short, padded):
            model.zero_grad()
            loss = loss_of(model, items, "audio")
            loss.backward()
            grads.append([loss.detach(), *(p.grad.clone() for p in model.blocks.parameters())])
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", CONFIG.features)
def test_the_gradient_of_a_modality_reaches_the_trunk_and_its_own_maps_only(model, batch, name):
    loss_of(model, batch.streams[name], name).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    wanted = {n for n, _ in model.named_parameters() if n.startswith(("blocks.", f"modalities.{name}."))}
    assert reached == wanted


def test_the_sum_and_its_curriculum(model, batch):
    objective = UmlSsl(model, UmlSslConfig(aux_start_step=5, aux_weight=0.25), target="audio")
    assert objective.streams == {"audio": 1, "text": 1, "image": 1}
    alone, together = objective(batch, 4), objective(batch, 5)
    assert set(alone.terms) == {"audio"}
    torch.testing.assert_close(alone.total, loss_of(model, batch["audio"], "audio"))
    parts = {name: loss_of(model, items, name) for name, items in batch.streams.items()}
    torch.testing.assert_close(together.total, parts["audio"] + 0.25 * (parts["text"] + parts["image"]))


def test_it_can_over_fit_one_batch(model, batch):
    objective = UmlSsl(model, UmlSslConfig(aux_start_step=0), target="audio")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    first = objective(batch, 0).total.item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = objective(batch, 0).total
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01 * first
