import copy

import pytest
import torch
from torch import nn
from transformers import EfficientNetConfig, EfficientNetModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from diptych.encoders.folding import FoldedCopy, folded
from diptych.encoders.packages import _open_gates


def lively(network):
    """With batch norms that are not the identity."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight, part.bias, part.running_mean):
                nn.init.normal_(value, 0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return network.eval()


def efficientnet():
    sizes = {"kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 24], "expand_ratios": [1, 6]}
    stages = {"strides": [1, 2], "num_block_repeats": [1, 2], "width_coefficient": 0.25, "hidden_dim": 320}
    return EfficientNetModel(EfficientNetConfig(**sizes, **stages, image_size=32, hidden_act="relu6"))


MODELS = {
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2])),
    "efficientnet": efficientnet,
}


def norms(network):
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_has_no_batch_norms_and_computes_the_same(name):
    network = lively(MODELS[name]())
    fast, pixels = folded(network), torch.randn(2, 3, 32, 32)
    assert norms(network) > 0
    assert norms(fast) == 0
    with torch.no_grad():
        wanted = network(pixels).last_hidden_state
        torch.testing.assert_close(fast(pixels).last_hidden_state, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


def test_gates_that_are_always_open_are_left_out_and_others_stay():
    network = lively(efficientnet())
    assert any("squeeze_excite.reduce" in name for name in folded(network).state_dict())
    network.load_state_dict({**network.state_dict(), **_open_gates(network)})
    fast, pixels = folded(network), torch.randn(2, 3, 32, 32)
    assert not any("squeeze_excite.reduce" in name for name in fast.state_dict())
    with torch.no_grad():
        wanted = network(pixels).last_hidden_state
        torch.testing.assert_close(fast(pixels).last_hidden_state, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())


def test_a_convolution_whose_output_is_read_twice_stays_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, pixel_values):
            maps = self.convolution(pixel_values)
            return type("Output", (), {"last_hidden_state": maps + self.norm(maps)})

    network = lively(Twice())
    assert folded(network) is network


def test_the_copy_is_made_anew_when_weights_change_and_is_never_saved():
    network, pixels = lively(MODELS["resnet"]()), torch.randn(2, 3, 32, 32)
    kept = FoldedCopy()
    first = kept.of(network)
    assert kept.of(network) is first
    with torch.no_grad():
        next(network.parameters()).mul_(2.0)
        wanted = network(pixels).last_hidden_state
        torch.testing.assert_close(kept.of(network)(pixels).last_hidden_state, wanted, rtol=1e-4, atol=1e-3)
    assert kept.of(network) is not first
    assert copy.deepcopy(kept)._copy is None


def test_a_network_without_batch_norms_is_used_as_it_is():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    assert FoldedCopy().of(vit) is vit
