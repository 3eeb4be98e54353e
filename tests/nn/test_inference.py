import pytest
import torch
from torch import nn

from diptych.errors import UserError
from diptych.nn.inference import (
    Prediction,
    autocast,
    eval_mode,
    pack_linears,
    pick_device,
    replace_linears_by_int8,
    top_predictions,
)


def test_evaluating_restores_each_mode():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    module[0].eval()
    with eval_mode(module):
        assert not any(part.training for part in module.modules())
        assert not module(torch.ones(1, 2)).requires_grad
    assert module.training
    assert module[1].training
    assert not module[0].training


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest_there_is(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == expected
    assert pick_device("cpu") == "cpu"


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda': torch finds no such device"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("able", "kernels", "expected"),
    [
        ({"avx512_bf16": True}, "AVX512", True),
        ({"avx512_bf16": True}, "AVX2", False),  # ATEN_CPU_CAPABILITY=avx2
        ({"avx512_f": True}, "AVX512", False),
        ({}, "AVX2", False),
    ],
)
def test_a_cpu_takes_bf16_only_where_torch_uses_instructions_for_it(monkeypatch, able, kernels, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    cpu = torch.device("cpu")
    for precision, bf16 in (("auto", expected), ("bf16", True), ("fp32", False)):
        with autocast(cpu, precision):
            assert torch.is_autocast_enabled("cpu") == bf16


PROBABILITIES = torch.tensor([[0.25, 0.5, 0.125, 0.125], [0.0, 0.0, 0.25, 0.75]])


def test_predictions_come_best_first():
    first, second = top_predictions(PROBABILITIES, "abcd", top=2)
    assert first == [Prediction(name="b", probability=0.5), Prediction(name="a", probability=0.25)]
    assert [guess.name for guess in second] == ["d", "c"]


def test_more_predictions_than_classes():
    assert [len(predictions) for predictions in top_predictions(PROBABILITIES, "abcd", top=9)] == [4, 4]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_packed_linear_layers_compute_the_same(rows, precision):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False)).requires_grad_(False)
    with autocast(torch.device("cpu"), precision):
        packed = pack_linears(module, rows=rows, uses=20)
        for count in (rows, 7):  # the rows that it was packed for, and others
            x = torch.randn(count, 24)
            torch.testing.assert_close(packed(x), module(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(packed(x[:, None]), module(x[:, None]), atol=1e-5, rtol=1e-5)
    assert isinstance(module[0], nn.Linear)


@pytest.mark.parametrize("rows", [1, 7])
def test_linear_layers_of_8_bits_compute_nearly_the_same(rows):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False))
    with torch.no_grad():
        module[0].weight[5] = 0  # an output of zeros has no scale
        x = torch.randn(rows, 3, 64)
        expected = module(x)
        replace_linears_by_int8(module)
        found = module(x)
        torch.testing.assert_close(found[:1], module(x[:1]))  # rows do not see each other
    assert found.shape == expected.shape
    assert 0 < (found - expected).norm() < 0.03 * expected.norm()
    assert not list(module.parameters())


def test_8_bits_are_for_a_cpu():
    with pytest.raises(UserError, match="int8 is for a CPU"):
        replace_linears_by_int8(nn.Linear(2, 2, device="meta"))
