import json
import subprocess
import sys

import pytest
import torch
from diffusers import VQModel

from diptych.errors import UserError
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, VQNetwork, nearest_codes

SMALL = ImageTokenizerConfig(image_size=16, codebook_size=32, code_dim=4, widths=(8, 16), blocks=1, groups=4)


def pictures(rows: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (rows, 3, size, size), dtype=torch.uint8, generator=generator)


def spread_out(tokenizer: ImageTokenizer) -> ImageTokenizer:
    """Codes where the latents are, so that tokens differ."""
    latents_BEhw = tokenizer.latents(tokenizer.pixels_to_input(pictures()))
    latents_ME = latents_BEhw.permute(0, 2, 3, 1).flatten(0, 2).detach()
    tokenizer.codebook.data.copy_(latents_ME[: tokenizer.codebook_size])
    return tokenizer


@pytest.mark.parametrize("patch", [1, 2])
def test_shapes_and_types(patch):
    config = ImageTokenizerConfig(
        image_size=16, codebook_size=32, code_dim=4, widths=(8, 16), blocks=1, groups=4, patch=patch
    )
    tokenizer = spread_out(ImageTokenizer.from_config(config))
    tokens_BN = tokenizer.encode(pictures())
    assert tokens_BN.dtype == torch.int64
    assert tokens_BN.shape == (3, tokenizer.tokens) == (3, (8 // patch) ** 2)
    assert tokens_BN.unique().numel() > 5
    pixels_B3HW = tokenizer.decode(tokens_BN)
    assert pixels_B3HW.dtype == torch.uint8
    assert pixels_B3HW.shape == (3, 3, 16, 16)


def test_the_same_input_gives_the_same_output_also_under_autocast_and_in_pieces():
    tokenizer = spread_out(ImageTokenizer.from_config(SMALL))
    tokens_BN = tokenizer.encode(pictures())
    picture = tokenizer.decode(tokens_BN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(pictures()), tokens_BN)
        assert torch.equal(tokenizer.decode(tokens_BN), picture)
    assert torch.equal(tokenizer.encode(pictures(), rows=2), tokens_BN)
    assert not tokenizer.encode(pictures()).requires_grad


def test_tokens_and_pictures_are_those_of_diffusers(tmp_path):
    tokenizer = spread_out(ImageTokenizer.from_config(SMALL))
    tokenizer.save_pretrained(tmp_path)
    network = VQModel.from_pretrained(tmp_path)
    input_B3HW = pictures().float() / 255
    _, _, (_, _, indices) = network.quantize(network.encode(input_B3HW).latents)
    assert torch.equal(indices.view(3, -1), tokenizer.encode(pictures()))
    expected = network(input_B3HW).sample.clamp(0, 1).mul(255).round().to(torch.uint8)
    difference = tokenizer.decode(tokenizer.encode(pictures())).int() - expected.int()
    assert difference.abs().max() <= 1


def test_nearest_codes_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    latents_ME, codebook_KE = torch.randn(40, 3, generator=generator), torch.randn(9, 3, generator=generator)
    brute = (latents_ME[:, None] - codebook_KE[None]).square().sum(-1).argmin(1)
    assert torch.equal(nearest_codes(latents_ME, codebook_KE), brute)


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(5)
    first = ImageTokenizer.from_config(SMALL, seed=3)
    state = torch.get_rng_state()
    second = ImageTokenizer.from_config(SMALL, seed=3)
    other = ImageTokenizer.from_config(SMALL, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    for (name, mine), yours in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, yours), name
    assert not torch.equal(first.codebook, other.codebook)


@pytest.mark.parametrize("attention", [False, True])
def test_no_weight_is_left_uninitialised(attention):
    config = ImageTokenizerConfig(
        image_size=16, codebook_size=32, code_dim=4, widths=(8, 16), blocks=1, groups=4, attention=attention
    )
    tokenizer = ImageTokenizer.from_config(config)
    with torch.no_grad():
        for weight in tokenizer.parameters():
            weight.fill_(float("nan"))
    tokenizer.init_weights()
    for name, weight in tokenizer.named_parameters():
        assert weight.isfinite().all(), name
        if weight.ndim == 4 and "conv2" not in name:
            assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.3), name


def test_a_new_tokenizer_passes_the_signal_on():
    tokenizer = ImageTokenizer.from_config(SMALL)
    with torch.no_grad():
        latents_BEhw = tokenizer.latents(tokenizer.pixels_to_input(pictures()))
        picture_B3HW = tokenizer.reconstruct(latents_BEhw)
    assert 0.3 < latents_BEhw.std() < 3
    assert 0.3 < picture_B3HW.std() < 3


def test_save_and_load_give_equal_tokens_and_a_plain_diffusers_folder(tmp_path):
    tokenizer = spread_out(ImageTokenizer.from_config(SMALL))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # again, over the first
    assert {file.name for file in (tmp_path / "tokenizer").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.image_size, loaded.codebook_size, loaded.tokens, loaded.factor) == (16, 32, 64, 2)
    assert torch.equal(loaded.encode(pictures()), tokenizer.encode(pictures()))
    plain = VQModel.from_pretrained(tmp_path / "tokenizer")
    assert torch.equal(plain.quantize.embedding.weight, tokenizer.codebook)


def test_without_widths_a_token_is_the_nearest_square_of_pixels(tmp_path):
    config = ImageTokenizerConfig(image_size=32, codebook_size=48, patch=8, widths=())
    tokenizer = ImageTokenizer.from_config(config)
    assert [name for name, _ in tokenizer.named_parameters()] == ["network.quantize.embedding.weight"]
    squares = pictures(size=32).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2) / 255
    tokenizer.codebook.data.copy_(squares)
    tokens_BN = tokenizer.encode(pictures(size=32))
    assert tokens_BN.flatten().tolist() == list(range(48))
    assert torch.equal(tokenizer.decode(tokens_BN), pictures(size=32))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.image_size, loaded.tokens, loaded.factor) == (32, 16, 8)
    assert torch.equal(loaded.encode(pictures(size=32)), tokens_BN)


def test_a_pipeline_folder_of_the_amused_kind(tmp_path):
    tokenizer = spread_out(ImageTokenizer.from_config(SMALL))
    tokenizer.network.save(tmp_path / "vqvae", image_size=2)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "AmusedPipeline"}))
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded.image_size == 32  # 16 x 16 tokens, as 2 pixels cannot have been meant
    assert ImageTokenizer.from_pretrained(tmp_path, image_size=16).tokens == 64


def test_models_of_latent_diffusion_see_minus_one_to_one(tmp_path):
    tokenizer = spread_out(ImageTokenizer.from_config(SMALL))
    tokenizer.network.config["lookup_from_codebook"] = False
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert loaded.pixels_to_input(white).max() == 1
    assert loaded.pixels_to_input(white * 0).min() == -1
    assert torch.equal(loaded.output_to_pixels(loaded.pixels_to_input(pictures())), pictures())


def one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone", "missing_weight", "wrong_shape"])
def test_damaged_weights_are_a_user_error(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    tokenizer = ImageTokenizer.from_config(SMALL)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    match damage:
        case "cut":
            file.write_bytes(whole[: len(whole) // 2])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("this is not a model")
        case "gone":
            file.unlink()
        case "missing_weight":
            save_file({k: v for k, v in weights.items() if k != "quantize.embedding.weight"}, file)
        case "wrong_shape":
            save_file(weights | {"quantize.embedding.weight": torch.zeros(3, 4)}, file)
    with pytest.raises(UserError, match="weights") as error:
        ImageTokenizer.from_pretrained(tmp_path)
    assert one_line(error)
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_a_vqmodel_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no diffusers VQModel") as error:
        ImageTokenizer.from_pretrained(tmp_path)
    assert one_line(error)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="no diffusers VQModel"):
        ImageTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="no diffusers VQModel"):
        ImageTokenizer.from_pretrained(tmp_path)


def test_wrong_sizes_are_user_errors():
    tokenizer = ImageTokenizer.from_config(SMALL)
    with pytest.raises(UserError, match="16x16"):
        tokenizer.encode(pictures(size=32))
    with pytest.raises(UserError, match="64 tokens"):
        tokenizer.decode(torch.zeros(1, 16, dtype=torch.int64))
    with pytest.raises(UserError, match="15"):
        ImageTokenizer(tokenizer.network, image_size=15)


PLAIN = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "latent_channels": 6,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 20,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}
ATTENDING = PLAIN | {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    "mid_block_add_attention": True,
    "vq_embed_dim": None,
    "act_fn": "mish",
}


@pytest.fixture(params=[PLAIN, ATTENDING], ids=["plain", "attending"])
def both(request) -> tuple[VQNetwork, VQModel]:
    made = []
    for kind in (VQNetwork, VQModel):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            made.append(kind(**request.param))
    return tuple(made)


def test_a_seed_gives_the_same_weights_in_the_same_order(both):
    ours, theirs = both
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


def test_results_are_the_same(both):
    ours, theirs = both
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = ours.quant_conv(ours.encoder(x))
    torch.testing.assert_close(latents, theirs.encode(x).latents, rtol=1e-5, atol=1e-5)
    codes = theirs.quantize(latents)[0]
    torch.testing.assert_close(
        ours.decoder(ours.post_quant_conv(codes)), theirs.decode(latents).sample, rtol=1e-5, atol=1e-5
    )


def test_each_reads_the_others_folder(both, tmp_path):
    ours, theirs = both
    ours.save(tmp_path / "ours", image_size=16)
    read, report = VQModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs.save_pretrained(tmp_path / "theirs")
    again = VQNetwork.from_folder(tmp_path / "theirs")
    for name, weight in ours.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name
        assert torch.equal(again.state_dict()[name], weight), name
    assert json.loads((tmp_path / "ours/config.json").read_text())["sample_size"] == 16


@pytest.mark.parametrize(
    ("setting", "value"), [("norm_type", "spatial"), ("act_fn", "sin"), ("down_block_types", ("Cross",)), ("depth", 3)]
)
def test_a_network_that_is_not_ours_is_refused(setting, value):
    with pytest.raises(UserError, match=setting):
        VQNetwork(**PLAIN | {setting: value})


def test_diffusers_is_not_imported():
    script = "import sys, diptych.tokenizers.image_tokenizer; print('diffusers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.stdout == "False\n"
