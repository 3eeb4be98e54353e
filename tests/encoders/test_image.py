import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    EfficientNetConfig,
    EfficientNetModel,
    MobileNetV1Config,
    MobileNetV1Model,
    MobileNetV2Config,
    MobileNetV2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from diptych.dual.model import DualEncoder, DualEncoderConfig
from diptych.encoders import ScratchConfig, encoder_width, open_image_encoder, scratch_encoder
from diptych.encoders.image import FoldedCopy, folded
from diptych.encoders.loading import _open_gates
from diptych.errors import UserError
from diptych.itit.pipeline import ItitImageEncoder
from diptych.nn.inference import eval_mode

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
NORMAL = {"image_size": 8, "patch_size": 4}
EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 0.25,
    "hidden_dim": 320,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 16],
    "out_channels": [16, 24],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6],
}
MODELS = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES, **NORMAL)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, **NORMAL)),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])),
    "convnext": lambda: ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 1])),
    "efficientnet": lambda: EfficientNetModel(EfficientNetConfig(**EFFICIENT)),
    "mobilenet_v1": lambda: MobileNetV1Model(MobileNetV1Config(depth_multiplier=0.25, image_size=32)),
    "mobilenet_v2": lambda: MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25, image_size=32)),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config={**SIZES, **NORMAL}, text_config=SIZES, projection_dim=6)),
}


def run(encoder, pixels):
    with eval_mode(encoder):
        return encoder(pixels)


@pytest.mark.parametrize("name", MODELS)
def test_any_family_gives_its_own_pooled_features(name, save_image_model, pixels):
    model = MODELS[name]().eval()
    folder = save_image_model(model)
    encoder = open_image_encoder(folder)
    inputs = pixels / 255 * 2 - 1
    with torch.no_grad():
        expected = (
            model.get_image_features(pixel_values=inputs).pooler_output
            if name == "clip"
            else model(pixel_values=inputs).pooler_output.flatten(1)
        )
    torch.testing.assert_close(run(encoder, pixels), expected, rtol=1e-4, atol=1e-5)
    assert encoder.width == expected.shape[1] == encoder_width(folder, "image")
    tokens = encoder.tokens(pixels)
    assert (tokens.ndim, len(tokens)) == (3, 3)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_the_same_encoder_in_its_own_format(name, save_image_model, pixels, tmp_path):
    encoder = open_image_encoder(save_image_model(MODELS[name]()))
    encoder.save_pretrained(tmp_path / "again")
    again = open_image_encoder(tmp_path / "again")
    torch.testing.assert_close(run(again, pixels), run(encoder, pixels))
    assert again.preprocessing == encoder.preprocessing


def test_a_pooler_that_was_never_trained_is_not_used(save_image_model, pixels):
    model = ViTModel(ViTConfig(**SIZES, **NORMAL), add_pooling_layer=False).eval()
    folder = save_image_model(model)
    hidden = model(pixel_values=pixels / 255 * 2 - 1).last_hidden_state.detach()
    torch.testing.assert_close(run(open_image_encoder(folder), pixels), hidden[:, 0], rtol=1e-4, atol=1e-5)
    assert open_image_encoder(folder).network.pooler is None
    mean = run(open_image_encoder(folder, pooling="mean"), pixels)
    torch.testing.assert_close(mean, hidden.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "efficientnet"])
def test_few_images_at_once_give_the_same_features(name, save_image_model, monkeypatch):
    encoder = open_image_encoder(save_image_model(MODELS[name]()))
    pixels = torch.randint(256, (5, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)
    seen = []
    encoder.network.register_forward_pre_hook(lambda _, args, options: seen.append(1), with_kwargs=True)
    whole, tokens = encoder(pixels).detach(), encoder.tokens(pixels).detach()  # with gradients all rows at once
    assert len(seen) == 2
    monkeypatch.setattr("diptych.encoders.image.CPU_ROWS", 2)
    torch.testing.assert_close(run(encoder, pixels), whole, rtol=1e-4, atol=1e-5)
    with eval_mode(encoder):
        torch.testing.assert_close(encoder.tokens(pixels), tokens, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2 + 6 or name == "efficientnet"  # which computes by its folded copy


def test_other_sizes_are_resized(save_image_model):
    encoder = open_image_encoder(save_image_model(MODELS["dinov2"]()))
    assert run(encoder, torch.zeros(2, 3, 20, 20, dtype=torch.uint8)).shape == (2, 16)
    assert encoder.image_size == 8


def test_the_width_is_read_without_the_weights(save_image_model):
    folder = save_image_model(MODELS["dinov2"]())
    (folder / "model.safetensors").unlink()
    assert encoder_width(folder, "image") == 16
    with pytest.raises(UserError, match="cannot be loaded as a vision model"):
        open_image_encoder(folder)


def test_weights_that_are_missing_are_an_error_not_random(save_image_model):
    from safetensors.torch import load_file, save_file

    folder = save_image_model(MODELS["vit"]())
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layernorm\.weight is missing"):
        open_image_encoder(folder)


def test_an_itit_run_gives_the_mean_of_its_image_tokens(model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "run" / "tokenizer")
    model.save_pretrained(tmp_path / "run" / "model")
    encoder = open_image_encoder(tmp_path / "run")
    assert isinstance(encoder, ItitImageEncoder)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with eval_mode(model):
        expected = model.encode(model.embed_image(tokenizer.encode(images))).image_BKD
    torch.testing.assert_close(run(encoder, images), expected.mean(1))
    assert encoder_width(tmp_path / "run", "image") == encoder.width == 16
    encoder.save_pretrained(tmp_path / "classifier" / "encoder")
    torch.testing.assert_close(run(open_image_encoder(tmp_path / "classifier"), images), expected.mean(1))


def test_a_dual_run_gives_the_embedding_of_its_image_tower(text_encoder, tmp_path):
    from diptych.dual.model import train_clip_tokenizer

    config = DualEncoderConfig(
        image_size=16, patch=8, image_width=64, image_depth=1, max_text_len=16, text_width=64, text_depth=1, width=12
    )
    tokens = train_clip_tokenizer(["a red circle", "a red square"] * 4, vocab_size=514, length=16)
    dual = DualEncoder.from_config(config, tokens, seed=0)
    dual.save_pretrained(tmp_path / "run" / "model")
    tokens.save_pretrained(tmp_path / "run" / "tokenizer")  # as a run does; an ITIT run has such a folder too
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    encoder = open_image_encoder(tmp_path / "run")
    found = torch.nn.functional.normalize(run(encoder, images), dim=1)
    torch.testing.assert_close(found, dual.embed_images(images), rtol=1e-4, atol=1e-5)
    assert encoder_width(tmp_path / "run", "image") == 12


def test_a_new_encoder_follows_from_its_seed_and_comes_back(tmp_path, pixels):
    config = ScratchConfig(image_size=8, patch=4, width=12, depth=1, heads=2)
    first, second, other = (scratch_encoder(config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(run(first, pixels), run(second, pixels))
    assert not torch.equal(run(first, pixels), run(other, pixels))
    first.save_pretrained(tmp_path)
    torch.testing.assert_close(run(open_image_encoder(tmp_path), pixels), run(first, pixels))
    with pytest.raises(UserError, match="cannot have these sizes"):
        scratch_encoder(replace(config, patch=3), seed=0)


def test_gradients_reach_the_weights(save_image_model, pixels):
    encoder = open_image_encoder(save_image_model(MODELS["dinov2"]()))
    encoder(pixels)[:, 0].sum().backward()  # the sum over a closing LayerNorm is a constant
    assert encoder.network.encoder.layer[0].attention.q_proj.weight.grad.abs().sum() > 0


def test_mistakes_are_told_in_one_line(tmp_path, save_image_model):
    with pytest.raises(UserError, match="no such folder"):
        open_image_encoder(tmp_path / "absent")
    folder = save_image_model(MODELS["dinov2"]())
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    with pytest.raises(UserError, match="names no input size"):
        open_image_encoder(folder)


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


CONVOLUTIONAL = {
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2])),
    "efficientnet": efficientnet,
}


def norms(network):
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_copy_has_no_batch_norms_and_computes_the_same(name):
    network = lively(CONVOLUTIONAL[name]())
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
    network, pixels = lively(CONVOLUTIONAL["resnet"]()), torch.randn(2, 3, 32, 32)
    kept = FoldedCopy()
    first = kept.of(network)
    assert kept.of(network) is first
    with torch.no_grad():
        next(network.parameters()).mul_(2.0)
        wanted = network(pixels).last_hidden_state
        torch.testing.assert_close(kept.of(network)(pixels).last_hidden_state, wanted, rtol=1e-4, atol=1e-3)
    assert kept.of(network) is not first
    assert copy.deepcopy(kept)._copy._kept is None


def test_a_network_without_batch_norms_is_used_as_it_is():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4))
    assert FoldedCopy().of(vit) is vit
