import pytest
import torch

from diptych.tokenizers.evaluation import TextEncoderScore, effective_rank, evaluate_text_encoder


def test_the_rank_counts_directions_of_equal_variance():
    directions = torch.eye(8)[:3]
    features = torch.cat([directions, -directions]) * 5 + 7
    assert effective_rank(features) == pytest.approx(3)
    features[0] *= 1 + 1e-9
    features[:, 3] += 1e-4 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # hardly any variance, hardly any rank
    assert effective_rank(features) == pytest.approx(3, abs=0.01)
    assert effective_rank(torch.ones(4, 8)) == pytest.approx(1)


def test_padding_is_no_direction(text_encoder, scene_texts):
    short, long = (evaluate_text_encoder(text_encoder, scene_texts[:40], length=length) for length in (24, 40))
    assert short == long
    assert (short.texts, short.width) == (40, 16)
    assert 2 < short.effective_rank < 16


def test_a_warning_for_features_that_hardly_vary():
    told = [str(TextEncoderScore(texts=9, effective_rank=rank, width=256)) for rank in (20.4, 2.2)]
    assert told[0] == "features vary in 20.4 of 256 directions"
    assert told[1].startswith("features vary in 2.2 of 256 directions: too few")
