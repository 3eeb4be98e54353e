import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import T5ForConditionalGeneration

from diptych.data.batch import Batch, TextExamples
from diptych.errors import UserError
from diptych.rng import StepRNG
from diptych.tokenizers.span_corruption import SpanCorruption, TextEncoderConfig, corrupt, place_spans
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.text_tokenizer import train_tokenizer

SENTINELS = torch.tensor([99, 98, 97, 96, 95, 94])
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "star")
TEXTS = [f"a {c} {s} above a {d} {s} and a {c} star" for c in COLOURS for d in COLOURS for s in SHAPES]


def texts_of(lengths: list[int], *, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 10, 11, 12, ... of the wished numbers of words, closed by 1."""
    place = torch.arange(length)
    words_B1 = torch.tensor(lengths)[:, None]
    ids_BL = torch.where(place < words_B1, place + 10, torch.where(place == words_B1, 1, 0))
    return ids_BL, ids_BL != 0


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def placed(lengths: list[int], *, length: int, noise_density: float = 0.3, mean_span: float = 2.0, most: int = 6):
    rows = len(lengths)
    options = {"noise_density": noise_density, "mean_span": mean_span, "most": most}
    numbers = {"uniform_BL": uniform(rows, length), "gaps_uniform_BM": uniform(rows, length + 1, seed=1)}
    return place_spans(torch.tensor(lengths), **options, **numbers)


def naive(words: list[int], starts: list[int], lengths: list[int]) -> tuple[list[int], list[int]]:
    """The corruption of one text, token by token."""
    read, said, here = [], [], 0
    for k, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length:
            read += [*words[here:start], int(SENTINELS[k])]
            said += [int(SENTINELS[k]), *words[start : start + length]]
            here = start + length
    return [*read, *words[here:], 1], [*said, 1]


def reassembled(read: list[int], said: list[int]) -> list[int]:
    """The text back from input and target: every sentinel is replaced by what the target says of it."""
    meant: dict[int, list[int]] = {}
    for token in said[:-1]:
        if token in SENTINELS:
            meant[token] = here = []
        else:
            here.append(token)
    return [word for token in read[:-1] for word in meant.get(token, [token])]


LENGTHS = [0, 1, 2, 3, 5, 8, 13, 23]


def test_spans_have_the_promised_number_and_never_touch() -> None:
    spans = placed(LENGTHS * 50, length=24)
    for words, starts, lengths in zip(LENGTHS * 50, spans.starts_BK.tolist(), spans.lengths_BK.tolist(), strict=True):
        hidden = min(max(1, int(words * 0.3 + 0.5)), words)
        wanted = min(max(1, int(hidden / 2 + 0.5)), hidden)
        assert sum(lengths) == hidden
        used = [(start, size) for start, size in zip(starts, lengths, strict=True) if size]
        assert len(used) == wanted
        assert all(start + size < after for (start, size), (after, _) in pairwise(used))
        assert all(0 <= start <= start + size <= words for start, size in used)


def test_every_word_is_hidden_equally_often_when_one_is() -> None:
    """T5's own placement would always hide the last word of a short text."""
    spans = placed([5] * 4000, length=8, noise_density=0.15)
    counts = spans.starts_BK[:, 0].bincount(minlength=5)
    assert counts.shape == (5,)
    assert counts.min() > 700


def test_spans_of_all_lengths_and_places_are_equally_likely() -> None:
    """3 hidden of 5 in 2 spans: compositions 1+2 and 2+1, each at the 3 places for gaps."""
    spans = placed([5] * 6000, length=8, noise_density=0.6, mean_span=1.5)
    cases = torch.cat([spans.starts_BK[:, :2], spans.lengths_BK[:, :2]], dim=1).unique(dim=0, return_counts=True)[1]
    assert cases.shape == (6,)
    assert cases.min() > 850


def test_corruption_equals_a_naive_loop_and_loses_nothing() -> None:
    ids_BL, valid_BL = texts_of(LENGTHS * 20, length=24)
    spans = placed(LENGTHS * 20, length=24)
    found = corrupt(ids_BL, valid_BL, spans=spans, sentinels_K=SENTINELS, target_length=14)
    for row, words in enumerate(LENGTHS * 20):
        text = ids_BL[row, :words].tolist()
        read, said = naive(text, spans.starts_BK[row].tolist(), spans.lengths_BK[row].tolist())
        assert found.ids_BL[row][found.valid_BL[row]].tolist() == read
        assert found.target_BT[row][found.target_valid_BT[row]].tolist() == said
        assert reassembled(read, said) == text
        assert found.ids_BL[row, len(read) :].eq(0).all()
        assert found.target_BT[row, len(said) :].eq(0).all()


@pytest.mark.parametrize(("noise_density", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 20.0), (0.01, 3.0)])
@pytest.mark.parametrize("length", [2, 7, 40])
def test_the_target_always_has_room(objective: SpanCorruption, noise_density, mean_span, length) -> None:
    objective.config = replace(objective.config, noise_density=noise_density, mean_span=mean_span)
    ids_BL, valid_BL = texts_of(list(range(length)), length=length)
    found = objective.corrupt(ids_BL, valid_BL, rng=StepRNG(seed=0, step=0))
    ends = found.target_valid_BT.sum(1) - 1
    assert found.target_BT[torch.arange(length), ends].eq(1).all()
    assert found.ids_BL[torch.arange(length), found.valid_BL.sum(1) - 1].eq(1).all()


# The objective


@pytest.fixture
def objective() -> SpanCorruption:
    tokenizer = train_tokenizer(TEXTS, vocab_size=128, sentinels=6)
    sizes = {"width": 32, "layers": 2, "decoder_layers": 1, "feed_forward": 64, "sentinels": 6}
    return SpanCorruption(tokenizer, config=TextEncoderConfig(noise_density=0.3, mean_span=2.0, **sizes))


def batch_of(objective: SpanCorruption, texts: list[str], *, length: int = 16, step: int = 0) -> Batch:
    ids_BL, valid_BL = objective.text_encoder().tokenize(texts, length=length)
    return Batch(rng=StepRNG(seed=0, step=step), streams={"texts": TextExamples(ids_BL=ids_BL, valid_BL=valid_BL)})


def test_gradient_reaches_every_trainable_parameter(objective: SpanCorruption) -> None:
    losses = objective(batch_of(objective, TEXTS), 0)
    losses.total.backward()
    assert objective.streams == {"texts": 1}
    assert set(losses.terms) == {"spans"}
    dead = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_the_loss_is_that_of_plain_t5(objective: SpanCorruption) -> None:
    batch = batch_of(objective, TEXTS[:1])
    found = objective.corrupt(batch["texts"].ids_BL, batch["texts"].valid_BL, rng=batch.rng)
    plain = T5ForConditionalGeneration(objective.t5.config)
    plain.load_state_dict(objective.t5.state_dict())
    plain.config.decoder_start_token_id = 0
    labels = found.target_BT.masked_fill(~found.target_valid_BT, -100)
    expected = plain(input_ids=found.ids_BL, attention_mask=found.valid_BL.long(), labels=labels).loss
    torch.testing.assert_close(objective(batch, 0).total, expected)


def test_padding_never_changes_the_loss(objective: SpanCorruption) -> None:
    batch = batch_of(objective, TEXTS)
    garbage_BL = batch["texts"].ids_BL.masked_fill(~batch["texts"].valid_BL, 9)
    other = replace(batch, streams={"texts": replace(batch["texts"], ids_BL=garbage_BL)})
    assert torch.equal(objective(batch, 0).total, objective(other, 0).total)


def test_longer_rows_never_change_the_corruption() -> None:
    ids_BL, valid_BL = texts_of(LENGTHS, length=24)
    wide_BL, wide_valid_BL = texts_of(LENGTHS, length=40)
    short = {"uniform_BL": uniform(8, 24), "gaps_uniform_BM": uniform(8, 25, seed=1)}
    wide = {name: torch.nn.functional.pad(numbers, (0, 16)) for name, numbers in short.items()}
    options = {"noise_density": 0.3, "mean_span": 2.0, "most": 6}
    expected, found = (place_spans(torch.tensor(LENGTHS), **options, **numbers) for numbers in (short, wide))
    assert torch.equal(found.lengths_BK, expected.lengths_BK)
    rest = {"sentinels_K": SENTINELS, "target_length": 14}
    expected = corrupt(ids_BL, valid_BL, spans=expected, **rest)
    found = corrupt(wide_BL, wide_valid_BL, spans=found, **rest)
    assert torch.equal(found.target_BT, expected.target_BT)
    assert torch.equal(found.ids_BL[:, :24], expected.ids_BL)
    assert not found.valid_BL[:, 24:].any()


def test_randomness_comes_from_the_batch_and_the_seed(objective: SpanCorruption) -> None:
    first, second = batch_of(objective, TEXTS), batch_of(objective, TEXTS, step=1)
    assert torch.equal(objective(first, 0).total, objective(first, 0).total)
    assert not torch.equal(objective(first, 0).total, objective(second, 0).total)
    state = torch.get_rng_state()
    again, other = (SpanCorruption(objective.tokenizer, config=objective.config, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.t5.shared.weight, objective.t5.shared.weight)
    assert not torch.equal(other.t5.shared.weight, objective.t5.shared.weight)


def test_it_over_fits_one_batch(objective: SpanCorruption) -> None:
    batch = batch_of(objective, TEXTS[:16])
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for _ in range(100):
        loss = objective(batch, 0).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_the_text_encoder_is_a_frozen_copy_of_the_encoder_half(objective: SpanCorruption, tmp_path) -> None:
    encoder = objective.text_encoder()
    ids_BL, valid_BL = encoder.tokenize(TEXTS[:4], length=16)
    expected = objective.t5.encoder(input_ids=ids_BL, attention_mask=valid_BL.long()).last_hidden_state
    before = encoder.features(ids_BL, valid_BL)
    torch.testing.assert_close(before[valid_BL], expected[valid_BL])
    with torch.no_grad():
        objective.t5.shared.weight.zero_()
    assert torch.equal(encoder.features(ids_BL, valid_BL), before)
    assert all(p.requires_grad for p in objective.parameters())
    assert encoder.vocab_rows % 64 == 0
    encoder.save_pretrained(tmp_path)
    assert torch.equal(TextEncoder.from_pretrained(tmp_path).features(ids_BL, valid_BL), before)


def test_a_width_that_heads_cannot_share_is_refused(objective: SpanCorruption) -> None:
    config = copy.copy(objective.config)
    config.heads = 5
    with pytest.raises(UserError, match="width=32 cannot be shared by heads=5"):
        SpanCorruption(objective.tokenizer, config=config)


@pytest.mark.parametrize("config", [TextEncoderConfig.tiny(), TextEncoderConfig.small()])
def test_named_sizes_build(config: TextEncoderConfig) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=config.vocab_size, sentinels=config.sentinels)
    objective = SpanCorruption(tokenizer, config=config)
    encoder = objective.text_encoder()
    assert (encoder.width, len(encoder.t5.encoder.block)) == (config.width, config.layers)
    assert objective(batch_of(objective, TEXTS[:4]), 0).total.isfinite()
