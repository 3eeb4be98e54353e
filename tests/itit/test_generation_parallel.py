import math

import pytest
import torch

from diptych.errors import UserError
from diptych.itit.generation import Canvas, guided, parallel_decode, sample_tokens
from diptych.rng import StepRNG

B, N, C = 4, 12, 5


def fixed_logits(canvas):
    return torch.zeros(*canvas.tokens_BN.shape, C)


def decode(logits=fixed_logits, tokens=None, hidden=None, steps=6, temperature=4.0, seed=0, **options):
    tokens = torch.full((B, N), 2) if tokens is None else tokens
    hidden = torch.ones(B, N, dtype=torch.bool) if hidden is None else hidden
    return parallel_decode(
        logits, tokens, hidden, steps=steps, temperature=temperature, rng=StepRNG(seed, 0), **options
    )


def test_known_tokens_never_change_whatever_the_temperature():
    hidden = torch.rand(B, N, generator=torch.Generator().manual_seed(0)) > 0.5
    tokens = torch.full((B, N), 7)  # a code that is never drawn
    for temperature in (0.0, 32.0, 1e6):
        found = decode(tokens=tokens, hidden=hidden, temperature=temperature)
        assert torch.equal(found == 7, ~hidden)


@pytest.mark.parametrize("steps", [1, 3, 24])
def test_all_tokens_are_known_after_the_steps(steps):
    seen: list[Canvas] = []

    def logits(canvas):
        seen.append(canvas)
        return fixed_logits(canvas)

    decode(logits, steps=steps)
    counts = [int(canvas.hidden_BN.sum(1)[0]) for canvas in seen]
    cosine = [math.floor(N * math.cos(math.pi / 2 * s / steps)) for s in range(steps)]
    assert counts == [min(c, N - s) for s, c in enumerate(cosine)][: len(counts)]
    assert counts == sorted(set(counts), reverse=True)
    assert len(seen) == min(steps, N)
    for canvas in seen:
        assert (~canvas.hidden_BN).sum(1).max() <= canvas.most_known


def test_rows_with_unequal_numbers_of_hidden_tokens_each_keep_their_schedule():
    hidden = torch.zeros(2, N, dtype=torch.bool)
    hidden[0, :10] = True
    hidden[1, :3] = True
    counts = []

    def logits(canvas):
        counts.append(canvas.hidden_BN.sum(1).tolist())
        return fixed_logits(canvas)

    decode(logits, tokens=torch.full((2, N), 7), hidden=hidden, steps=5)
    assert [c[0] for c in counts] == [10, 9, 8, 5, 3]
    assert [c[1] for c in counts] == [3, 2, 1, 0, 0]


def test_the_surest_tokens_come_first_without_noise():
    """Position k is certain to degree k; at temperature 0 the last positions are revealed first."""
    order = []

    def logits(canvas):
        order.append(canvas.hidden_BN[0].clone())
        sure = torch.zeros(*canvas.tokens_BN.shape, C)
        sure[..., 0] = torch.arange(N) * 2.0
        return sure

    decode(logits, temperature=0.0, token_temperature=0.0, steps=6)
    for mask in order:
        assert mask.int().tolist() == sorted(mask.int().tolist(), reverse=True)


def test_seeded():
    assert torch.equal(decode(seed=3), decode(seed=3))
    assert not torch.equal(decode(seed=3), decode(seed=4))


def test_two_processes_draw_what_one_draws():
    whole = decode()
    tokens, hidden = torch.full((B // 2, N), 2), torch.ones(B // 2, N, dtype=torch.bool)
    parts = [
        parallel_decode(fixed_logits, tokens, hidden, steps=6, temperature=4.0, rng=StepRNG(0, 0, rank, 2))
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_guidance_is_the_papers():
    canvas = Canvas(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), 0.25, 0)
    conditional, unconditional = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    found = guided(lambda _: conditional, lambda _: unconditional, guidance=2.0)(canvas)
    torch.testing.assert_close(found, 3 * conditional - 2 * unconditional)
    ramp = guided(lambda _: conditional, lambda _: unconditional, guidance=2.0, ramp=True)(canvas)
    torch.testing.assert_close(ramp, 1.5 * conditional - 0.5 * unconditional)

    def never(_):
        raise AssertionError("guidance 0 must not pay for the unconditional pass")

    assert guided(lambda _: conditional, never, guidance=0.0)(canvas) is conditional


def test_tokens_are_sampled_from_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    chance = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
    sampled, log_p = sample_tokens(logits.expand(1, 20_000, 4), chance)
    share = torch.bincount(sampled[0], minlength=4) / 20_000
    torch.testing.assert_close(share, logits.softmax(-1), atol=0.01, rtol=0)
    torch.testing.assert_close(log_p, logits.log_softmax(-1)[sampled])
    hot, _ = sample_tokens(logits.expand(1, 20_000, 4), chance, temperature=0.5)
    torch.testing.assert_close(
        torch.bincount(hot[0], minlength=4) / 20_000, (logits / 0.5).softmax(-1), atol=0.01, rtol=0
    )
    assert (sample_tokens(logits.expand(1, 9, 4), chance[:, :9], temperature=0)[0] == 2).all()


def test_no_steps():
    with pytest.raises(UserError, match="at least one"):
        decode(steps=0)
