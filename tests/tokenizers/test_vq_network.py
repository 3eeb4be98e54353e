"""Our network is diffusers' VQModel: the same weights from a seed, the same results, and one format on disk."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import VQModel

from diptych.errors import UserError
from diptych.tokenizers.vq_network import VQNetwork

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
