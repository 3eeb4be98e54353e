import pytest
import torch

from diptych.itit import evaluation as module
from diptych.itit.evaluation import information_gain
from diptych.itit.pipeline import Diptych


@pytest.fixture
def made(tokenizer, text_encoder, model) -> Diptych:
    return Diptych(tokenizer, text_encoder, model, precision="fp32")


@pytest.fixture
def pairs(tokenizer, text_encoder, scene_texts):
    ids, _ = text_encoder.tokenize(scene_texts[:6], length=20)
    tokens = torch.randint(tokenizer.codebook_size, (6, tokenizer.tokens), generator=torch.Generator().manual_seed(0))
    return tokens, ids


def test_equal_captions_tell_nothing(made, pairs):
    tokens, ids = pairs
    found = information_gain(made, tokens, ids[:1].expand(6, -1))
    assert (found.caption, found.picture) == (0.0, 0.0)


def test_rows_come_in_pieces_and_padding_is_not_counted(made, pairs, monkeypatch):
    tokens, ids = pairs
    whole = information_gain(made, tokens, ids)
    monkeypatch.setattr(module, "_ROWS", 4)
    pieces = information_gain(made, tokens, torch.nn.functional.pad(ids, (0, 2)))
    assert (pieces.caption, pieces.picture) == pytest.approx((whole.caption, whole.picture), abs=1e-5)


def test_what_was_learned_is_found(made, pairs):
    """A few steps on the pairs themselves; the picture's side is learned from a text's features alone."""
    tokens, ids = pairs
    rule = torch.optim.Adam(made.model.parameters(), lr=3e-3)
    for _ in range(150):
        caption = module._caption_loss(made, module._shown(made, tokens), ids)
        rule.zero_grad()
        (caption + module._picture_loss(made, tokens, ids)).backward()
        rule.step()
    found = information_gain(made, tokens, ids)
    assert found.caption > 0.3
    assert found.picture > 0.3
