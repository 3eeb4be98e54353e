import pytest
import torch
from toy_objective import Toy, assert_same, optim, toy_batches, weights_of

from diptych.errors import UserError
from diptych.train import checkpoint
from diptych.train.checkpoint import Ema, TrainState
from diptych.train.optim import make_optimizer, trained_groups


def make(seed=0, width=8, name="adamw"):
    toy = Toy(seed=seed, width=width)
    toy.register_buffer("count", torch.zeros(()))
    toy.register_buffer("scratch", torch.zeros(2), persistent=False)
    return toy, TrainState(
        toy, make_optimizer(trained_groups(toy, weight_decay=0.0), optim(name=name)), Ema(toy, decay=0.9)
    )


def step(toy, state, at):
    toy(toy_batches(at, 0, 1), at).total.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(at)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_restored_state_goes_on_alike(tmp_path, name):
    (toy, state), (other, restored) = make(name=name), make(seed=1, name=name)
    other.frozen.load_state_dict(toy.frozen.state_dict())
    for at in range(3):
        step(toy, state, at)
    toy.count += 3
    checkpoint.save(tmp_path, step=3, tensors=state.tensors(), state={}, keep=1)
    restored.load(checkpoint.newest(tmp_path)[0])
    step(toy, state, 3)
    step(other, restored, 3)
    assert_same(weights_of(other), weights_of(toy))
    assert_same(restored.ema.weights, state.ema.weights)
    assert other.count == 3


def test_frozen_weights_are_saved_only_if_they_moved(tmp_path):
    """So a text encoder stays out of the checkpoints and a teacher, which the objective updates, is in them."""
    toy, state = make()
    assert "frozen.weight" not in state.tensors()["model"]
    assert "scratch" not in state.tensors()["model"]
    with torch.no_grad():
        toy.frozen.weight.mul_(2)
    assert state.tensors()["model"].keys() >= {"frozen.weight", "count"}
    checkpoint.save(tmp_path, step=1, tensors=state.tensors(), state={}, keep=1)
    other, restored = make(seed=1)
    restored.load(checkpoint.newest(tmp_path)[0])
    assert torch.equal(other.frozen.weight, toy.frozen.weight)
    assert "frozen.weight" in restored.tensors()["model"]
    assert "frozen.bias" not in restored.tensors()["model"]


def test_tied_weights_are_saved_once(tmp_path):
    toy, _ = make()
    toy.late.weight = toy.head.weight
    state = TrainState(toy, make_optimizer(trained_groups(toy, weight_decay=0.0), optim()), None)
    step_names = state.tensors()["model"].keys()
    assert "head.weight" in step_names
    assert "late.weight" not in step_names
    checkpoint.save(tmp_path, step=1, tensors=state.tensors(), state={}, keep=1)
    state.load(checkpoint.newest(tmp_path)[0])


def test_another_width_is_refused(tmp_path):
    _, state = make()
    checkpoint.save(tmp_path, step=1, tensors=state.tensors(), state={}, keep=1)
    with pytest.raises(UserError, match="holds another model"):
        make(width=4)[1].load(checkpoint.newest(tmp_path)[0])
