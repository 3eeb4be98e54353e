import pytest
import torch

from diptych.nn.transformer import (
    Blocks,
    LayerCache,
    attention,
    init_weights,
    positions_of,
    prefix_causal,
    rounded,
    softmax,
)


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return Blocks(3, 12, heads=3).apply(init_weights)


def test_prefix_causal():
    attend = prefix_causal(2, 3)
    assert attend.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_a_later_position_moves_no_earlier_one(blocks):
    x = torch.randn(1, 6, 12)
    moved = x.clone()
    moved[:, 4] = torch.randn(12)
    attend = prefix_causal(2, 4)
    changed = (blocks(x, attend=attend) - blocks(moved, attend=attend)).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 4 + [True, True]


def test_cached_equals_uncached(blocks):
    x = torch.randn(2, 7, 12)
    expected = blocks(x, attend=prefix_causal(3, 4))
    cache = blocks.empty_cache(x, positions=7)
    found = [blocks(x[:, :3], cache=cache)] + [blocks(x[:, s : s + 1], cache=cache) for s in range(3, 7)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_prefix_that_is_only_read_leaves_the_same_keys_and_values(blocks):
    x = torch.randn(2, 7, 12)
    expected = blocks(x, attend=prefix_causal(3, 4))[:, 3:]
    cache = blocks.empty_cache(x, positions=7)
    blocks.read(x[:, :3], cache=cache)
    found = [blocks(x[:, s : s + 1], cache=cache) for s in range(3, 7)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


OF_EACH_ROW = torch.tensor([[5, 0, 3], [1, 2, 6]])
VALID = torch.ones(2, 1, 1, 7, dtype=torch.bool).tril(3)


@pytest.mark.parametrize(
    ("wanted", "attend"),
    [
        *[(part, attend) for part in (slice(3), slice(3, None)) for attend in (None, prefix_causal(3, 4), VALID)],
        *[(OF_EACH_ROW, attend) for attend in (None, VALID)],
    ],
)
def test_wanted_positions_are_those_of_the_whole(blocks, wanted, attend):
    x = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole, part = positions_of(blocks(x, attend=attend), wanted), blocks(x, attend=attend, wanted=wanted)
    torch.testing.assert_close(part, whole)
    inputs = (x, *blocks.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(part.square().sum(), inputs), torch.autograd.grad(whole.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_cache_goes_on_with_the_rows_that_are_kept():
    cache = LayerCache(torch.arange(8.0).view(2, 1, 4, 1), torch.arange(8.0).view(2, 1, 4, 1), length=3)
    cache.keep(torch.tensor([1]))
    assert cache.keys_BHTE.flatten().tolist() == cache.values_BHTE.flatten().tolist() == [4, 5, 6, 7]


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="10 cannot be cut into 3"):
        Blocks(1, 10, heads=3)


@pytest.mark.parametrize("positions", [5, 120])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_for_bf16_equals_the_fused_one(masked, positions):
    """Few positions and many take different kernels of softmax."""
    torch.manual_seed(0)
    fp32 = [torch.randn(2, 3, positions, 8) for _ in range(3)]
    attend = prefix_causal(2, positions - 2) if masked else None
    ours = [x.bfloat16().requires_grad_() for x in fp32]
    plain = [x.detach().float().requires_grad_() for x in ours]
    found, expected = attention(*ours, attend=attend), attention(*plain, attend=attend)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    found.sum().backward()
    expected.sum().backward()
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad.float(), two.grad, atol=0.03, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_attention_is_attention_under_a_triangle(dtype):
    q, k, v = torch.randn(3, 2, 2, 5, 4).to(dtype)
    triangle = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, causal=True), attention(q, k, v, attend=triangle))


@pytest.mark.parametrize("positions", [5, 120])
def test_softmax_keeps_its_type_under_autocast(positions):
    scores = torch.randn(3, positions).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        weights = softmax(scores)
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float(), scores.float().softmax(-1), atol=1e-3, rtol=0.01)


def test_only_autocast_rounds():
    x = torch.randn(3)
    assert rounded(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert rounded(x).dtype == torch.bfloat16
