import itertools
import math

import pytest
import torch
from torch import nn

from diptych.errors import UserError
from diptych.train.config import OptimConfig
from diptych.train.objective import Objective
from diptych.train.optim import Adafactor, clip_gradient, learning_rate, make_optimizer, trained_groups


def test_cosine_with_warm_up():
    config = OptimConfig(lr=2.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(step, config, steps=110) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4] == pytest.approx(1.0)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * 0.55)
    assert rates[35] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rates[109] == pytest.approx(0.2, rel=0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_a_constant_rate_and_steps_past_the_end():
    constant = OptimConfig(lr=2.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(step, constant, steps=10) for step in range(10)} == {2.0}
    assert learning_rate(50, OptimConfig(lr=2.0, warmup_steps=0, final_lr=0.5), steps=10) == pytest.approx(1.0)


class Wrapped(Objective):
    """An objective around a module, with the groups that every objective has unless it says otherwise."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_vectors_do_not_decay_and_frozen_weights_are_left_out():
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 3).requires_grad_(False))
    matrices, vectors = trained_groups(Wrapped(module), weight_decay=0.3)
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 2)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,), (3,), (3,)]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


def test_an_objective_may_group_its_parameters():
    module = nn.Linear(2, 3)
    objective = Wrapped(module)
    objective.parameter_groups = lambda: [{"params": [module.bias], "lr_scale": 0.1}, {"params": [module.weight]}]
    first, second = make_optimizer(
        trained_groups(objective, weight_decay=0.3), OptimConfig(weight_decay=0.3)
    ).param_groups
    assert (first["params"], first["lr_scale"], first["weight_decay"]) == ([module.bias], 0.1, 0.3)
    assert second["lr_scale"] == 1.0


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="Wrapped has no parameter to train"):
        trained_groups(Wrapped(nn.Linear(2, 2).requires_grad_(False)), weight_decay=0.0)


@pytest.mark.parametrize("limit", [None, 0.5, 100.0])
def test_clipping_is_that_of_torch(limit):
    ours, theirs = (
        [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(1))] for _ in "ab"
    )
    for parameter in (*ours[:2], *theirs[:2]):
        parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter)
    norm = clip_gradient(ours, limit)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, limit or math.inf))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def naive_steps(start, gradients, *, lr, beta1, cap, decay, clip=1.0):
    """Adafactor as its equations stand, on nested loops over a matrix or a vector, in float64."""
    x = start.double().clone()
    matrix = x.flatten(1) if x.ndim > 1 else x[None]
    rows, columns = matrix.shape
    row, column, full, momentum = (
        torch.zeros(rows),
        torch.zeros(columns),
        torch.zeros(columns),
        torch.zeros_like(matrix),
    )
    row, column, full = row.double(), column.double(), full.double()
    for t, gradient in enumerate(gradients, start=1):
        beta2 = min(1 - t**-0.8, cap)
        g = gradient.double().reshape(rows, columns)
        update = torch.zeros_like(g)
        for i in range(rows):
            row[i] = beta2 * row[i] + (1 - beta2) * (g[i] ** 2 + 1e-30).sum() / columns
        for j in range(columns):
            column[j] = beta2 * column[j] + (1 - beta2) * (g[:, j] ** 2 + 1e-30).sum() / rows
            full[j] = beta2 * full[j] + (1 - beta2) * (g[0, j] ** 2 + 1e-30)
        for i in range(rows):
            for j in range(columns):
                second = row[i] * column[j] / row.mean() if x.ndim > 1 else full[j]
                update[i, j] = g[i, j] / second**0.5
        update = update / max(1.0, float((update**2).mean() ** 0.5) / clip)
        momentum = beta1 * momentum + (1 - beta1) * update
        matrix *= 1 - lr * decay
        matrix -= lr * momentum
    return matrix.reshape(start.shape)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 2, 2)])
def test_it_equals_the_naive_reference(shape):
    """Long enough for the decay to reach its cap of 0.9, which 1 - t^-0.8 passes at t = 18."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) * (1 + 5 * (t % 3)) for t in range(25)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Adafactor([parameter], lr=0.02, betas=(0.9, 0.9), weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    wanted = naive_steps(start, gradients, lr=0.02, beta1=0.9, cap=0.9, decay=0.1)
    torch.testing.assert_close(parameter.detach().double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_first_update_is_a_tenth_of_the_sign():
    """A vector's first second moment is its squared gradient, so the update is its sign, times 1 - beta1, times lr."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([3.0, -0.01, 1e-4, -7.0])
    Adafactor([parameter], lr=0.5, betas=(0.9, 0.96)).step()
    torch.testing.assert_close(parameter.detach(), -0.05 * parameter.grad.sign())


def test_a_matrix_costs_rows_plus_columns_besides_the_momentum():
    parameter = torch.nn.Parameter(torch.zeros(7, 5))
    parameter.grad = torch.ones(7, 5)
    optimizer = Adafactor([parameter], lr=0.1)
    optimizer.step()
    assert {name: tuple(value.shape) for name, value in optimizer.state[parameter].items()} == {
        "step": (),
        "momentum": (7, 5),
        "row_square": (7,),
        "column_square": (5,),
    }


def test_found_inf_skips_the_update_and_its_count():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Adafactor([parameter], lr=0.1, weight_decay=0.1)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()} | {"x": parameter.clone()}
    parameter.grad = torch.full((2, 2), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = dict(optimizer.state[parameter]) | {"x": parameter}
    assert all(torch.equal(after[name], before[name]) for name in before)
    optimizer.found_inf, parameter.grad = torch.zeros(()), torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(parameter, before["x"])


def test_a_zero_gradient_moves_nothing_to_nan():
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Adafactor([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.zeros(3, 3)
        optimizer.step()
    assert torch.equal(parameter, torch.ones(3, 3))
