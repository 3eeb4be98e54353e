import pytest
import torch

from diptych.itit.generation import ImageGenerationConfig, TextGenerationConfig, generate_image_tokens, generate_text
from diptych.rng import StepRNG


@pytest.fixture
def model(model):
    """Fresh weights give nearly the same chance to every token; larger ones have an opinion."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight *= 10
    return model.eval()


@pytest.fixture
def text(text_encoder, scene_texts):
    ids_BL, valid_BL = text_encoder.tokenize(scene_texts[:3], length=20)
    return text_encoder.features(ids_BL, valid_BL), valid_BL


@pytest.fixture
def banned_V(text_encoder):
    banned_V = torch.zeros(text_encoder.vocab_rows, dtype=torch.bool)
    banned_V[list(text_encoder.banned_ids)] = True
    return banned_V


@pytest.fixture
def tokens_BN(tokenizer):
    return torch.randint(tokenizer.codebook_size, (3, tokenizer.tokens), generator=torch.Generator().manual_seed(0))


def drawn(model, text, *, seed=0, known=None, **settings):
    config = ImageGenerationConfig(**{"steps": 4, "guidance": 0.0, "temperature": 4.0} | settings)
    return generate_image_tokens(model, *text, config, rng=StepRNG(seed, 0), known=known)


def test_pictures_follow_from_text_and_draws(model, text, tokenizer):
    first = drawn(model, text)
    assert (first.shape, first.dtype) == ((3, tokenizer.tokens), torch.int64)
    assert first.min() >= 0
    assert first.max() < tokenizer.codebook_size
    assert torch.equal(first, drawn(model, text))
    assert not torch.equal(first, drawn(model, text, seed=1))
    assert not first.requires_grad


def test_the_text_steers_the_picture(model, text):
    """Dropping the text's features changes what is drawn with otherwise equal draws."""
    features_BLF, valid_BL = text
    assert not torch.equal(drawn(model, text), drawn(model, (features_BLF.flip(0), valid_BL.flip(0))))


def test_guidance_goes_through_a_pass_without_text(model, text, monkeypatch):
    seen = []
    encode = model.encode

    def watched(*args, **options):
        seen.append(options["features_BLF"] is None)
        return encode(*args, **options)

    monkeypatch.setattr(model, "encode", watched)
    plain = drawn(model, text)
    assert seen == [False] * 4
    seen.clear()
    guided = drawn(model, text, guidance=8.0)
    assert sorted(seen) == [False] * 4 + [True] * 4
    assert not torch.equal(plain, guided)


def test_known_tokens_stay(model, text, tokens_BN):
    hidden_BN = torch.arange(tokens_BN.shape[1]).expand_as(tokens_BN) >= tokens_BN.shape[1] // 2
    found = drawn(model, text, known=(tokens_BN, hidden_BN))
    assert torch.equal(found[~hidden_BN], tokens_BN[~hidden_BN])
    assert not torch.equal(found, tokens_BN)
    nothing = torch.zeros_like(hidden_BN)
    assert torch.equal(drawn(model, text, known=(tokens_BN, nothing)), tokens_BN)


def test_the_encoder_gets_every_visible_token_and_half_at_most(model, text, monkeypatch, tokens_BN):
    encode, kept = model.encode, []

    def watched(image_BND, *, hidden_BN, keep_BK, **options):
        if keep_BK is not None:
            visible = (~hidden_BN).sum(1)
            assert torch.equal((~hidden_BN).gather(1, keep_BK).sum(1), visible)
        kept.append(None if keep_BK is None else keep_BK.shape[1])
        return encode(image_BND, hidden_BN=hidden_BN, keep_BK=keep_BK, **options)

    monkeypatch.setattr(model, "encode", watched)
    drawn(model, text, steps=6)
    half = tokens_BN.shape[1] // 2
    assert kept[0] == half
    assert kept[-1] is None
    kept.clear()
    drawn(model, text, steps=6, drop=False)
    assert kept == [None] * 6


def test_one_beam_is_greedy_and_has_no_score(model, tokens_BN, banned_V):
    ids_BL, score_B = generate_text(model, tokens_BN, TextGenerationConfig(beams=1), banned_V=banned_V, length=10)
    assert ids_BL.shape == (3, 10)
    assert score_B is None


def test_beams_find_at_least_as_good_a_text(model, tokens_BN, banned_V):
    """Scored by the decoder itself, uncached: log p / ((5 + length) / 6) ** power."""
    config = TextGenerationConfig(beams=5, length_power=0.6)
    ids_BL, score_B = generate_text(model, tokens_BN, config, banned_V=banned_V, length=8)
    greedy_BL, _ = generate_text(model, tokens_BN, TextGenerationConfig(beams=1), banned_V=banned_V, length=8)

    def score(ids_BL):
        prefix = model.encode(model.embed_image(tokens_BN)).image_BKD
        inputs_BL = torch.cat([torch.zeros_like(ids_BL[:, :1]), ids_BL[:, :-1]], 1)
        log_p = model.text_logits(prefix, inputs_BL).log_softmax(-1).gather(-1, ids_BL[..., None])[..., 0]
        length_B = (ids_BL != 0).sum(1)
        return (log_p * (ids_BL != 0)).sum(1) / ((5 + length_B) / 6) ** 0.6

    with torch.no_grad():
        torch.testing.assert_close(score_B, score(ids_BL), rtol=1e-4, atol=1e-4)
        assert (score_B >= score(greedy_BL) - 1e-4).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_banned_ids_are_never_written_and_every_text_ends(model, tokens_BN, banned_V, beams):
    ids_BL, _ = generate_text(model, tokens_BN, TextGenerationConfig(beams=beams), banned_V=banned_V, length=6)
    for row in ids_BL.tolist():
        end = row.index(1)
        assert not any(banned_V[i] for i in row[:end])
        assert not any(row[end + 1 :])


def test_the_paper_draws_in_24_steps_and_writes_with_four_beams():
    assert (ImageGenerationConfig().steps, ImageGenerationConfig().guidance, ImageGenerationConfig().temperature) == (
        24,
        2.0,
        32.0,
    )
    assert TextGenerationConfig().beams == 4
