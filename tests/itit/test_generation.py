import math
from itertools import product

import pytest
import torch

from diptych.data.batch import ImageTokenExamples
from diptych.errors import UserError
from diptych.itit.generation import (
    Canvas,
    ImageGenerationConfig,
    TextGenerationConfig,
    beam_search,
    generate_image_tokens,
    generate_text,
    greedy,
    guided,
    parallel_decoding,
    sample_tokens,
)
from diptych.itit.model import evenly_spread
from diptych.nn.transformer import positions_of
from diptych.rng import StepRNG
from diptych.tokenizers.text_tokenizer import EOS, PAD

# Parallel decoding

B, N, C = 4, 12, 5


def fixed_logits(canvas):
    return torch.zeros(*canvas.open_BM.shape, C)


def decode(logits=fixed_logits, tokens=None, hidden=None, steps=6, temperature=4.0, seed=0, **options):
    tokens = torch.full((B, N), 2) if tokens is None else tokens
    hidden = torch.ones(B, N, dtype=torch.bool) if hidden is None else hidden
    rng = StepRNG(seed, 0)
    *_, canvas = parallel_decoding(logits, tokens, hidden, steps=steps, temperature=temperature, rng=rng, **options)
    return canvas.tokens_BN


def test_known_tokens_never_change_whatever_the_temperature():
    hidden = torch.rand(B, N, generator=torch.Generator().manual_seed(0)) > 0.5
    tokens = torch.full((B, N), 7)  # a code that is never sampled
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
        assert torch.equal(canvas.open_BM, canvas.hidden_BN.nonzero()[:, 1].view(B, -1))


def test_rows_with_unequal_numbers_of_hidden_tokens_each_keep_their_schedule():
    hidden = torch.zeros(2, N, dtype=torch.bool)
    hidden[0, :10] = True
    hidden[1, :3] = True
    counts = []

    def logits(canvas):
        counts.append(canvas.hidden_BN.sum(1).tolist())
        assert canvas.open_BM.shape[1] == max(counts[-1])
        assert torch.equal(canvas.hidden_BN.gather(1, canvas.open_BM).sum(1), canvas.hidden_BN.sum(1))
        return fixed_logits(canvas)

    decode(logits, tokens=torch.full((2, N), 7), hidden=hidden, steps=5)
    assert [c[0] for c in counts] == [10, 9, 8, 5, 3]
    assert [c[1] for c in counts] == [3, 2, 1, 0, 0]


def test_the_surest_tokens_come_first_without_noise():
    """Position k is certain to degree k; at temperature 0 the last positions are revealed first."""
    order = []

    def logits(canvas):
        order.append(canvas.hidden_BN[0].clone())
        sure = torch.zeros(*canvas.open_BM.shape, C)
        sure[..., 0] = canvas.open_BM * 2.0
        return sure

    decode(logits, temperature=0.0, token_temperature=0.0, steps=6)
    for mask in order:
        assert mask.int().tolist() == sorted(mask.int().tolist(), reverse=True)


def test_seeded():
    assert torch.equal(decode(seed=3), decode(seed=3))
    assert not torch.equal(decode(seed=3), decode(seed=4))


def test_two_processes_generate_what_one_generates():
    whole = decode()
    tokens, hidden = torch.full((B // 2, N), 2), torch.ones(B // 2, N, dtype=torch.bool)
    parts = []
    for rank in (0, 1):
        *_, canvas = parallel_decoding(
            fixed_logits, tokens, hidden, steps=6, temperature=4.0, rng=StepRNG(0, 0, rank, 2)
        )
        parts.append(canvas.tokens_BN)
    assert torch.equal(torch.cat(parts), whole)


def test_guidance_is_the_papers():
    tokens, hidden = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    canvas = Canvas(tokens, hidden, 0.25, torch.arange(2)[None], most_known=0, most_hidden=2)
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


# Greedy decoding and beam search

V, L = 4, 3
NONE_BANNED = torch.zeros(V, dtype=torch.bool)


class Markov:
    """Logits that depend on the whole text so far, kept per row as a decoder's cache is."""

    def __init__(self, rows, seed=0, images=1):
        self.images = images
        self.table = torch.randn(V ** (L + 1), V, generator=torch.Generator().manual_seed(seed)) * 2
        self.state = torch.zeros(rows, dtype=torch.long)
        self.shift = torch.arange(rows)

    def logits_of(self, state):
        return self.table[state % len(self.table)]

    def step(self, ids_B):
        self.state = self.state * V + ids_B
        return self.logits_of(self.state)

    def reorder(self, rows_B):
        self.state = self.state[rows_B]

    def keep(self, images_B):
        beams = len(self.state) // self.images
        self.state = self.state.view(self.images, beams)[images_B].flatten()
        self.images = len(images_B)


def score(table, ids, power):
    """log p of a text by definition, with GIT's penalty."""
    state, total = 0, 0.0
    newest = PAD
    for token in ids:
        state = state * V + newest
        total += table[state % len(table)].log_softmax(-1)[token].item()
        newest = token
    return total / ((5 + len(ids)) / 6) ** power


@pytest.mark.parametrize("power", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_beam_search_with_enough_beams_is_brute_force(power, seed):
    beams = V**L
    decoding = Markov(beams, seed)
    found = beam_search(decoding, 1, beams=beams, length=L, banned_V=NONE_BANNED, length_power=power)
    texts = [(*body, EOS) for n in range(L) for body in product([t for t in range(V) if t != EOS], repeat=n)]
    best = max(texts, key=lambda text: score(decoding.table, text, power))
    assert tuple(found.ids_BWL[0, 0].tolist()) == best + (PAD,) * (L - len(best))
    assert found.score_BW[0, 0].item() == pytest.approx(score(decoding.table, best, power), abs=1e-5)
    found = beam_search(
        Markov(beams, seed), 1, beams=beams, length=L, banned_V=NONE_BANNED, length_power=power, count=5
    )
    order = sorted(texts, key=lambda text: score(decoding.table, text, power), reverse=True)
    assert [tuple(row) for row in found.ids_BWL[0].tolist()] == [text + (PAD,) * (L - len(text)) for text in order[:5]]


class Unequal(Markov):
    """Image b begins in its own state, so texts end at different positions and leave the batch."""

    def __init__(self, starts, beams, seed=1):
        super().__init__(len(starts) * beams, seed, images=len(starts))
        self.state = torch.tensor(starts).repeat_interleave(beams)
        self.widths = []

    def step(self, ids_B):
        self.widths.append(len(ids_B))
        return super().step(ids_B)


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_a_batch_do_not_mix_and_leave_when_they_end(beams):
    def texts(starts):
        decoding = Unequal(starts, beams)
        if beams == 1:
            return greedy(decoding, len(starts), length=6, banned_V=NONE_BANNED), decoding
        found = beam_search(decoding, len(starts), beams=beams, length=6, banned_V=NONE_BANNED)
        return found.ids_BWL[:, 0], decoding

    together, decoding = texts(list(range(12)))
    assert torch.equal(together, torch.cat([texts([start])[0] for start in range(12)]))
    assert decoding.widths[-1] < decoding.widths[0] == 12 * beams


def test_greedy_is_the_argmax_and_pads_after_the_end():
    decoding = Markov(2, images=2)
    ids = greedy(decoding, 2, length=L, banned_V=NONE_BANNED)
    state, newest, expected = 0, PAD, []
    for position in range(L):
        state = state * V + newest
        newest = int(decoding.logits_of(torch.tensor([state])).argmax()) if position + 1 < L else EOS
        expected.append(newest)
        if newest == EOS:
            break
    expected += [PAD] * (L - len(expected))
    assert ids.tolist() == [expected, expected]


@pytest.mark.parametrize("beams", [1, 3])
def test_banned_ids_never_appear_and_every_text_ends(beams):
    banned = torch.zeros(V, dtype=torch.bool)
    banned[2] = True
    for seed in range(10):
        if beams == 1:
            ids = greedy(Markov(2, seed, images=2), 2, length=L, banned_V=banned)
        else:
            found = beam_search(Markov(2 * beams, seed, images=2), 2, beams=beams, length=L, banned_V=banned)
            ids = found.ids_BWL[:, 0]
        assert not (ids == 2).any()
        assert (ids == EOS).sum(1).eq(1).all()


def test_no_beams():
    with pytest.raises(UserError, match="at least one"):
        beam_search(Markov(1), 1, beams=0, length=L, banned_V=NONE_BANNED)


# Generation with the network


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
    return text_encoder.banned_V


@pytest.fixture
def tokens_BN(tokenizer):
    return torch.randint(tokenizer.codebook_size, (3, tokenizer.tokens), generator=torch.Generator().manual_seed(0))


def generated(model, text, *, seed=0, known=None, **settings):
    config = ImageGenerationConfig(**{"steps": 4, "guidance": 0.0, "temperature": 4.0} | settings)
    return generate_image_tokens(model, *text, config, rng=StepRNG(seed, 0), known=known)


def test_images_follow_from_text_and_random_numbers(model, text, tokenizer):
    first = generated(model, text)
    assert (first.shape, first.dtype) == ((3, tokenizer.tokens), torch.int64)
    assert first.min() >= 0
    assert first.max() < tokenizer.codebook_size
    assert torch.equal(first, generated(model, text))
    assert not torch.equal(first, generated(model, text, seed=1))
    assert not first.requires_grad


def test_the_text_steers_the_image(model, text):
    """With the same random numbers, other features give another image."""
    features_BLF, valid_BL = text
    assert not torch.equal(generated(model, text), generated(model, (features_BLF.flip(0), valid_BL.flip(0))))


def test_guidance_goes_through_a_pass_without_text(model, text, monkeypatch):
    seen = []
    encode = model.encode

    def watched(image_BND, masking, features_BLF, valid_BL):
        seen.append(features_BLF is None)
        return encode(image_BND, masking, features_BLF, valid_BL)

    monkeypatch.setattr(model, "encode", watched)
    plain = generated(model, text)
    assert seen == [False] * 4
    seen.clear()
    strong = generated(model, text, guidance=8.0)
    assert sorted(seen) == [False] * 4 + [True] * 4
    assert not torch.equal(plain, strong)


def test_what_is_seen_of_no_text_and_no_token_is_computed_once(model, text, monkeypatch):
    """The first round without the text is the same for all images, until the weights change."""
    rows, encode = [], model.encode

    def watched(image_BND, masking, features_BLF, valid_BL):
        if features_BLF is None:
            rows.append((len(image_BND), bool(masking.hidden_BN.all())))
        return encode(image_BND, masking, features_BLF, valid_BL)

    monkeypatch.setattr(model, "encode", watched)
    first = generated(model, text, guidance=2.0, steps=2)
    assert rows == [(1, True), (3, False)]
    assert torch.equal(generated(model, text, guidance=2.0, steps=2), first)
    assert rows[2:] == [(3, False)]
    monkeypatch.setattr(model, "of_nothing", lambda make, **_: make().expand(3, -1, -1))
    assert torch.equal(generated(model, text, guidance=2.0, steps=2), first)
    monkeypatch.undo()
    monkeypatch.setattr(model, "encode", watched)
    rows.clear()
    with torch.no_grad():
        model.image_bias += torch.randn(model.image_bias.shape, generator=torch.Generator().manual_seed(0)) * 10
    assert not torch.equal(generated(model, text, guidance=2.0, steps=2), first)
    assert rows == [(1, True), (3, False)]


def test_logits_of_hidden_tokens_alone_give_the_same_image(model, text, monkeypatch):
    found = generated(model, text, guidance=2.0)
    plain = model.image_logits
    monkeypatch.setattr(model, "image_logits", lambda *given, wanted_BM: positions_of(plain(*given), wanted_BM))
    with torch.no_grad():
        model.image_bias += 0.0  # forgets what it knows of no text
    assert torch.equal(generated(model, text, guidance=2.0), found)


def test_known_tokens_stay(model, text, tokens_BN):
    hidden_BN = torch.arange(tokens_BN.shape[1]).expand_as(tokens_BN) >= tokens_BN.shape[1] // 2
    found = generated(model, text, known=(tokens_BN, hidden_BN))
    assert torch.equal(found[~hidden_BN], tokens_BN[~hidden_BN])
    assert not torch.equal(found, tokens_BN)
    nothing = torch.zeros_like(hidden_BN)
    assert torch.equal(generated(model, text, known=(tokens_BN, nothing)), tokens_BN)


def test_the_encoder_gets_the_visible_tokens_and_no_others(model, text, monkeypatch, tokens_BN):
    encode, kept = model.encode, []

    def watched(image_BND, masking, *text):
        hidden_BN, keep_BK = masking.hidden_BN, masking.keep_BK
        if keep_BK is not None:
            visible = (~hidden_BN).sum(1)
            assert torch.equal((~hidden_BN).gather(1, keep_BK).sum(1), visible)
        kept.append(None if keep_BK is None else keep_BK.shape[1])
        return encode(image_BND, masking, *text)

    monkeypatch.setattr(model, "encode", watched)
    generated(model, text, steps=6)
    positions = tokens_BN.shape[1]
    hidden = [math.floor(positions * math.cos(math.pi / 2 * round / 6)) for round in range(6)]
    known = [positions - min(count, positions - round) for round, count in enumerate(hidden)]
    assert kept == known
    kept.clear()
    generated(model, text, steps=6, drop="half")
    half = positions // 2
    assert kept == [half if count <= half else None for count in known]
    assert half in kept
    assert None in kept
    kept.clear()
    generated(model, text, steps=6, drop="none")
    assert kept == [None] * 6


def test_one_beam_is_greedy_and_has_no_score(model, tokens_BN, banned_V):
    found = generate_text(
        model, ImageTokenExamples(tokens_BN=tokens_BN), TextGenerationConfig(beams=1), banned_V=banned_V, length=10
    )
    assert found.ids_BWL.shape == (3, 1, 10)
    assert found.score_BW is None


def test_captions_are_read_from_the_visible_share(model, tokens_BN, banned_V):
    """Tokens that are left out do not matter, those that are read do; the whole image is the default."""

    def prefix(tokens_BN, visible):
        return model.caption_prefix(tokens_BN, None, visible=visible)

    keep_K = evenly_spread(tokens_BN.shape[1], 0.5)
    other = (tokens_BN + 1) % model.config.codebook_size
    elsewhere = torch.ones_like(tokens_BN, dtype=torch.bool).index_fill(1, keep_K, False)
    with torch.no_grad():
        assert prefix(tokens_BN, 0.5).shape[1] == len(keep_K) == tokens_BN.shape[1] // 2
        assert torch.equal(prefix(torch.where(elsewhere, other, tokens_BN), 0.5), prefix(tokens_BN, 0.5))
        assert not torch.equal(prefix(torch.where(elsewhere, tokens_BN, other), 0.5), prefix(tokens_BN, 0.5))
        assert torch.equal(prefix(tokens_BN, 1.0), model.encode(model.embed_image(tokens_BN)).image_BKD)
    for share in (0.0, 1.5):
        with pytest.raises(UserError, match="visible"):
            prefix(tokens_BN, share)
    images = ImageTokenExamples(tokens_BN=tokens_BN)
    made = [
        generate_text(model, images, TextGenerationConfig(visible=share), banned_V=banned_V, length=6).score_BW
        for share in (1.0, 0.5)
    ]
    assert not torch.equal(*made)


@pytest.mark.parametrize(("side", "share", "reach"), [(4, 0.5, 1), (8, 0.5, 1), (16, 0.5, 1), (16, 0.25, 2)])
def test_the_visible_share_has_no_holes(side, share, reach):
    """Every position has a visible one within ``reach`` rows and columns."""
    keep_K = evenly_spread(side * side, share)
    assert len(keep_K.unique()) == round(share * side * side)
    grid = torch.zeros(side, side).flatten().index_fill(0, keep_K, 1.0).view(1, 1, side, side)
    assert torch.nn.functional.max_pool2d(grid, 2 * reach + 1, stride=1, padding=reach).min() == 1
    assert len(evenly_spread(side * side, 1e-6)) == 1


def test_beams_find_at_least_as_good_a_text(model, tokens_BN, banned_V):
    """Scored by the decoder itself, uncached: log p / ((5 + length) / 6) ** power."""
    config = TextGenerationConfig(beams=5, length_power=0.6)
    found = generate_text(model, ImageTokenExamples(tokens_BN=tokens_BN), config, banned_V=banned_V, length=8)
    ids_BL, score_B = found.ids_BWL[:, 0], found.score_BW[:, 0]
    one = TextGenerationConfig(beams=1)
    greedy = generate_text(model, ImageTokenExamples(tokens_BN=tokens_BN), one, banned_V=banned_V, length=8)

    def score(ids_BL):
        prefix = model.encode(model.embed_image(tokens_BN)).image_BKD
        inputs_BL = torch.cat([torch.zeros_like(ids_BL[:, :1]), ids_BL[:, :-1]], 1)
        log_p = model.text_logits(prefix, inputs_BL).log_softmax(-1).gather(-1, ids_BL[..., None])[..., 0]
        length_B = (ids_BL != 0).sum(1)
        return (log_p * (ids_BL != 0)).sum(1) / ((5 + length_B) / 6) ** 0.6

    with torch.no_grad():
        torch.testing.assert_close(score_B, score(ids_BL), rtol=1e-4, atol=1e-4)
        assert (score_B >= score(greedy.ids_BWL[:, 0]) - 1e-4).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_banned_ids_are_never_generated_and_every_text_ends(model, tokens_BN, banned_V, beams):
    found = generate_text(
        model, ImageTokenExamples(tokens_BN=tokens_BN), TextGenerationConfig(beams=beams), banned_V=banned_V, length=6
    )
    for row in found.ids_BWL[:, 0].tolist():
        end = row.index(1)
        assert not any(banned_V[i] for i in row[:end])
        assert not any(row[end + 1 :])


def test_the_paper_generates_images_in_24_steps_and_texts_with_four_beams():
    assert (ImageGenerationConfig().steps, ImageGenerationConfig().guidance, ImageGenerationConfig().temperature) == (
        24,
        2.0,
        32.0,
    )
    assert TextGenerationConfig().beams == 4
