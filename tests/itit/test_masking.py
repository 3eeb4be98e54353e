import pytest
import torch
from scipy import stats

from diptych.errors import UserError
from diptych.itit.masking import MaskingConfig, sample_masking
from diptych.rng import StepRNG

CPU = torch.device("cpu")


def hidden(config, rows=4000, positions=256, **rng):
    return sample_masking(config, rows, positions, rng=StepRNG(**({"seed": 0, "step": 0} | rng)), name="t", device=CPU)


@pytest.mark.parametrize(
    "config", [MaskingConfig(), MaskingConfig(high=0.75), MaskingConfig(low=0.25, high=0.75, mode=0.5)]
)
def test_shares_follow_the_cut_normal(config):
    share = hidden(config).hidden_BN.float().mean(1)
    low, high = ((edge - config.mode) / config.std for edge in (config.low, config.high))
    expected = stats.truncnorm(low, high, loc=config.mode, scale=config.std)
    assert share.min() >= config.low
    assert share.max() <= config.high
    assert share.mean().item() == pytest.approx(expected.mean(), abs=0.01)
    assert share.std().item() == pytest.approx(expected.std(), abs=0.01)


def test_all_visible_tokens_are_kept_and_what_is_dropped_is_hidden():
    found = hidden(MaskingConfig(), rows=50, positions=16)
    assert found.keep_BK.shape == (50, 8)
    kept = torch.zeros(50, 16, dtype=torch.bool).scatter(1, found.keep_BK, True)
    assert (kept | found.hidden_BN).all()
    assert (kept & found.hidden_BN).any()


def test_positions_are_hidden_alike():
    often = hidden(MaskingConfig(high=0.5), positions=16).hidden_BN.float().mean(0)
    assert (often - 0.5).abs().max() < 0.05


def test_two_processes_hide_what_one_hides():
    one = hidden(MaskingConfig(), rows=8)
    parts = [hidden(MaskingConfig(), rows=4, rank=rank, world=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.hidden_BN for part in parts]), one.hidden_BN)
    assert torch.equal(torch.cat([part.keep_BK for part in parts]), one.keep_BK)


def test_impossible_shares():
    with pytest.raises(UserError, match="low <= high"):
        hidden(MaskingConfig(low=0.8, high=0.5))
