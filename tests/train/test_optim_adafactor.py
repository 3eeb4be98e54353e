import pytest
import torch

from diptych.train.optim import Adafactor


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
