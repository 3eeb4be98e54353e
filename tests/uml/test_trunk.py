import pytest
import torch

from diptych.uml.trunk import SharedTransformer, SharedTransformerConfig

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
