import shutil
from pathlib import Path

import pytest
import torch

from diptych.errors import UserError
from diptych.tokenizers.vqgan import PerceptualNetwork, edge_distance


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("backbone")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        ResNetModel(config).save_pretrained(folder)
    return str(folder)


def test_edge_distance_by_hand():
    left, right = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    left[..., 2:] = 1  # one vertical edge: a third of the horizontal differences at full size, all of them at half
    assert edge_distance(left, right, scales=2).item() == pytest.approx((1 / 3 + 1) / 2)
    assert edge_distance(left + 0.3, left, scales=2).item() == pytest.approx(0, abs=1e-6)


def test_edge_distance_minds_blur_more_than_l1_does():
    sharp = torch.zeros(1, 3, 16, 16)
    sharp[..., 8:] = 1
    blurred = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(sharp, (2, 2, 0, 0), "replicate"), (1, 5), stride=1
    )
    darker = sharp - (blurred - sharp).abs().mean()  # as far off in L1
    assert edge_distance(blurred, sharp) > 10 * edge_distance(darker, sharp)


def test_network_tells_pictures_apart_and_gives_gradient_to_the_output_only(backbone):
    network = PerceptualNetwork(backbone)
    output, target = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    assert network(target, target).item() == 0
    distance = network(output, target)
    assert distance > 0.01
    distance.backward()
    assert output.grad.abs().sum() > 0
    assert target.grad is None
    assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())


def test_network_has_one_map_per_layer_and_stays_in_evaluation_mode(backbone):
    network = PerceptualNetwork(backbone).train()
    assert not any(module.training for module in network.modules())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    assert [layer.shape[1] for layer in network.features(pictures())] == [4, 4, 8]
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_missing_weights_are_a_user_error(backbone, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in Path(backbone).iterdir():
        shutil.copy(file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embedder.embedder.convolution.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing"):
        PerceptualNetwork(str(tmp_path))


def test_a_folder_without_a_backbone_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no vision model") as error:
        PerceptualNetwork(str(tmp_path))
    assert "\n" not in str(error.value)
