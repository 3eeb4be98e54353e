import torch
from toy_objective import Toy, config, optim, toy_batches, weights_of

from diptych.train.distributed import Devices
from diptych.train.step import TrainStep


def make(toy, *, rule=None, **changes):
    devices = Devices(device="cpu", precision="auto")
    return TrainStep(toy, train=config(**changes), optim=rule or optim(), devices=devices)


def test_dropout_differs_between_steps_and_micro_batches_and_repeats_with_them():
    def rng(seed):
        toy, seen = Toy(), []
        toy.on_step = lambda step: seen.append(torch.rand(()).item())
        update = make(toy, grad_accum_steps=2, seed=seed)
        for step in range(3):
            update(step, toy_batches(step, 0, 1))
        return seen

    first = rng(0)
    assert len(set(first)) == 6
    assert rng(0) == first
    assert not set(rng(1)) & set(first)


def test_the_average_follows_the_weights():
    toy = Toy()
    update = make(toy, ema=0.15)
    shadow = toy.head.weight.detach().clone()
    for step in range(4):
        update(step, toy_batches(step, 0, 1))
        shadow.lerp_(toy.head.weight.detach(), 1 - (0.1 if step == 0 else 0.15))
    torch.testing.assert_close(update.ema.weights["head.weight"], shadow, rtol=1e-5, atol=1e-7)


def test_the_numbers_are_the_loss_its_terms_the_measures_and_the_norm():
    toy = Toy(late_from=0)
    outcome = make(toy)(0, toy_batches(0, 0, 1))
    loss, main, late, _, norm = outcome.values.tolist()
    assert outcome.names == ["loss/main", "loss/late", "measure/mean"]
    assert abs(loss - main - late) < 1e-5
    assert norm > 0
    assert not outcome.values.requires_grad


def test_a_group_scales_the_learning_rate():
    toy, before = Toy(), weights_of(Toy())
    toy.parameter_groups = lambda: [
        {"params": [toy.head.weight]},
        {"params": [toy.head.bias], "lr_scale": 0.0},
        {"params": list(toy.frozen.parameters())},
    ]
    make(toy)(0, toy_batches(0, 0, 1))
    assert not torch.equal(toy.head.weight, before["head.weight"])
    assert torch.equal(toy.head.bias, before["head.bias"])
    assert torch.equal(toy.embedding.weight, before["embedding.weight"])
