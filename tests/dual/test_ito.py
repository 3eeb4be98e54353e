import pytest
import torch

from diptych.dual.ito import Fusion, FusionConfig, first_position, sin_cos_table
from diptych.nn.transformer import Block, init_weights

WIDTH, TOKENS = 16, 5


@pytest.fixture
def fusion() -> Fusion:
    torch.manual_seed(0)
    module = Fusion(FusionConfig(head_width=4), width=WIDTH, image_tokens=TOKENS)
    for parameter in module.parameters():  # biases too, which start at zero
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def inputs(rows: int = 3, length: int = 4):
    torch.manual_seed(1)
    valid_BL = torch.arange(length) < torch.tensor([length, 2, 1])[:rows, None]
    return torch.randn(rows, TOKENS, WIDTH), torch.randn(rows, length, WIDTH), valid_BL, torch.randn(length, WIDTH)


def test_the_short_last_block_equals_the_plain_one(fusion):
    """Values and all gradients."""
    block, x = fusion.last, torch.randn(3, 7, WIDTH, requires_grad=True)
    attend = (torch.rand(3, 1, 1, 7) < 0.6) | (torch.arange(7) == 0)
    short, plain = first_position(block, x, attend), block(x, attend=attend)[:, 0]
    torch.testing.assert_close(short, plain)
    weights = [x, *block.parameters()]
    wanted = torch.autograd.grad(plain.square().sum(), weights)
    for found, want in zip(torch.autograd.grad(short.square().sum(), weights), wanted, strict=True):
        # The gradient of the keys' bias is zero; the plain block has rounding there.
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_it_equals_the_computation_written_out(fusion):
    image, text, valid, positions = inputs()
    for row in range(3):
        kept = torch.cat([image[row] + fusion.positions_SD, (text[row] + positions)[valid[row]]])[None]
        for block in (*fusion.early, fusion.last):
            kept = block(kept)
        wanted = torch.nn.functional.normalize(fusion.norm(kept[0, 0]), dim=-1)
        torch.testing.assert_close(fusion(image, text, valid, positions)[row], wanted)


def test_padding_is_never_seen(fusion):
    image, text, valid, positions = inputs()
    moved = torch.where(valid[:, :, None], text, torch.randn_like(text))
    torch.testing.assert_close(fusion(image, moved, valid, positions), fusion(image, text, valid, positions))
    longer = torch.nn.functional.pad(text, (0, 0, 0, 3)), torch.nn.functional.pad(valid, (0, 3))
    positions = torch.cat([positions, torch.randn(3, WIDTH)])
    torch.testing.assert_close(fusion(image, *longer, positions), fusion(image, text, valid, positions[:4]))


def test_it_has_the_papers_size():
    with torch.device("meta"):
        fusion = Fusion(FusionConfig(), width=512, image_tokens=197)
    assert sum(p.numel() for p in fusion.parameters()) == 6_305_792
    assert fusion.last.attention.heads == 8


def test_positions_tell_every_patch_from_every_other():
    table = sin_cos_table(17, 32)
    assert table.shape == (17, 32)
    assert torch.equal(table[0], torch.zeros(32))
    assert torch.cdist(table[1:], table[1:]).add(torch.eye(16)).min() > 0.5
    assert torch.equal(table[1, :16], table[5, :16])  # same column
    assert torch.equal(table[1, 16:], table[2, 16:])  # same row
    with pytest.raises(ValueError, match="square grid of 6"):
        sin_cos_table(7, 32)


def test_a_block_without_keys_bias_sees_the_same():
    """What the short block leaves out: a bias of the keys moves all scores of a query alike."""
    block = Block(8, heads=2).apply(init_weights)
    x = torch.randn(2, 3, 8)
    before = block(x)
    block.attention.qkv.bias.data[8:16] = torch.randn(8)
    torch.testing.assert_close(block(x), before)
