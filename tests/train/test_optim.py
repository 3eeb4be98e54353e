import itertools
import math

import pytest
import torch
from torch import nn

from diptych.errors import UserError
from diptych.train.config import OptimConfig
from diptych.train.objective import Objective
from diptych.train.optim import clip_gradient, learning_rate, make_optimizer, trained_groups


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
