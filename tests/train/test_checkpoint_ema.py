import pytest
import torch
from torch import nn

from diptych.train.checkpoint import Ema


def test_the_average_is_the_recurrence():
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema = Ema(module, decay=0.15)
    shadow = 1.0
    for step in range(4):
        with torch.no_grad():
            module.weight.fill_(2.0 + step)
        ema.update(step)
        decay = [0.1, 0.15, 0.15, 0.15][step]
        shadow += (1 - decay) * (2.0 + step - shadow)
    assert ema.weights["weight"].item() == pytest.approx(shadow)


def test_weights_come_back_even_after_an_error():
    module = nn.Linear(2, 2)
    ema = Ema(module, decay=0.5)
    own = module.weight.detach().clone()
    ema.weights["weight"].zero_()

    def fail():
        with ema.swapped_in():
            assert not module.weight.any()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(module.weight, own)
    assert not ema.weights["weight"].any()
