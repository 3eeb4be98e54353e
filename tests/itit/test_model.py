import copy
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from diptych.errors import UserError
from diptych.itit.model import (
    ITIT,
    SIZES,
    ImageFeatures,
    ItitConfig,
    Masking,
    MaskingConfig,
    mean_of_text,
    sample_masking,
    shift_right,
)
from diptych.nn.inference import autocast
from diptych.rng import StepRNG

PAPER = {"base": 221e6, "large": 487e6, "huge": 868e6}


@pytest.mark.parametrize("size", PAPER)
def test_parameter_counts_are_the_papers(size):
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ITIT(SIZES[size]).parameters())
    assert count == pytest.approx(PAPER[size], rel=0.015)


@pytest.fixture
def tokens(model):
    return torch.randint(
        model.config.codebook_size, (3, model.config.image_tokens), generator=torch.Generator().manual_seed(0)
    )


def text(model, rows=3, length=6, valid=4):
    features = torch.randn(rows, length, model.config.text_features)
    return features, torch.arange(length).expand(rows, -1) < valid


def test_hidden_tokens_do_not_reach_the_output(model, tokens):
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, 5:] = True
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 1) % model.config.codebook_size
    one, two = (model.encode(model.embed_image(t), Masking(hidden)) for t in (tokens, other))
    torch.testing.assert_close(one.image_BKD, two.image_BKD)
    torch.testing.assert_close(model.image_logits(one, hidden), model.image_logits(two, hidden))


def test_dropped_positions_come_back_in_the_decoder(model, tokens):
    """Which kept position comes first makes no difference, and every one of the N positions gets logits."""
    hidden = torch.ones_like(tokens, dtype=torch.bool)
    hidden[:, [1, 6, 9]] = False
    keep = torch.tensor([1, 6, 9, 0, 2]).expand(3, -1)
    image = model.embed_image(tokens)
    one = model.image_logits(model.encode(image, Masking(hidden, keep)), hidden)
    two = model.image_logits(model.encode(image, Masking(hidden, keep.flip(1))), hidden)
    assert one.shape == (3, 16, model.config.codebook_size)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_text_padding_changes_nothing(model, tokens):
    features, valid = text(model)
    moved = features.clone()
    moved[:, 4:] += 10
    hidden = torch.ones_like(tokens, dtype=torch.bool)
    logits = [
        model.image_logits(
            model.encode(model.embed_image(tokens), Masking(hidden), features_BLF=f[:, :n], valid_BL=valid[:, :n]),
            hidden,
        )
        for f, n in ((features, 6), (moved, 6))
    ]
    torch.testing.assert_close(logits[0], logits[1])


def test_text_steers_the_image_and_the_null_text_is_another_one(model, tokens):
    features, valid = text(model)
    hidden = torch.ones_like(tokens, dtype=torch.bool)
    image = model.embed_image(tokens)
    one = model.image_logits(model.encode(image, Masking(hidden), features_BLF=features, valid_BL=valid), hidden)
    two = model.image_logits(model.encode(image, Masking(hidden), features_BLF=-features, valid_BL=valid), hidden)
    null = model.image_logits(model.encode(image, Masking(hidden)), hidden)
    assert (one - two).abs().max() > 1e-5
    assert (one - null).abs().max() > 1e-5


def test_a_text_token_sees_the_image_and_only_earlier_text(model, tokens):
    prefix = model.encode(model.embed_image(tokens)).image_BKD
    ids = torch.randint(3, 30, (3, 6))
    moved = ids.clone()
    moved[:, 3] += 1
    same = (model.text_logits(prefix, ids) - model.text_logits(prefix, moved)).abs().amax(-1) < 1e-6
    assert same.all(0).tolist() == [True] * 3 + [False] * 3
    assert (model.text_logits(prefix, ids) - model.text_logits(-prefix, ids)).abs().amin(-1).max() > 0


def test_decoding_step_by_step_equals_the_whole(model, tokens):
    prefix = model.encode(model.embed_image(tokens)).image_BKD
    ids = torch.randint(3, 30, (3, 6))
    decoding = model.start_text(prefix, length=6)
    steps = torch.stack([decoding.step(ids[:, position]) for position in range(6)], dim=1)
    torch.testing.assert_close(steps, model.text_logits(prefix, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [4, 20])  # a few uses of the weights and enough to pack them
def test_texts_that_share_a_prefix_are_decoded_like_whole_ones(model, tokens, precision, length):
    """Two texts a prefix, reordered twice; then one of the prefixes leaves."""
    with torch.no_grad(), autocast(torch.device("cpu"), precision):
        prefix = model.encode(model.embed_image(tokens)).image_BKD
        decoding = model.start_text(prefix, length=length, beams=2)
        decoding.step(torch.zeros(6, dtype=torch.long))
        decoding.step(torch.tensor([5, 9, 5, 9, 5, 9]))
        decoding.reorder(torch.tensor([1, 1, 2, 3, 5, 4]))
        decoding.step(torch.tensor([7, 8, 7, 8, 7, 8]))
        decoding.reorder(torch.tensor([1, 0, 3, 3, 5, 4]))
        decoding.keep(torch.tensor([0, 2]))
        found = decoding.step(torch.tensor([3, 4, 3, 4]))
        texts = torch.tensor([[0, 9, 8, 3], [0, 9, 7, 4], [0, 5, 8, 3], [0, 9, 7, 4]])
        expected = model.text_logits(prefix[[0, 0, 2, 2]], texts)[:, -1]
    close = 1e-5 if precision == "fp32" else 0.02
    torch.testing.assert_close(found.float(), expected.float(), atol=close, rtol=close)


def test_decoding_follows_the_weights(model, tokens):
    """What was packed for one text is not used after the weights have changed, nor by a copy of the network."""
    prefix = model.encode(model.embed_image(tokens)).image_BKD
    for network in (model, copy.deepcopy(model)):
        for _ in range(2):
            found = network.start_text(prefix, length=20).step(torch.zeros(3, dtype=torch.long))
            expected = network.text_logits(prefix, torch.zeros(3, 1, dtype=torch.long))[:, 0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                network.text_decoder.layers[0].mlp[0].weight.mul_(3)
                network.word_embedding.weight.mul_(2)


def test_the_inputs_of_the_text_decoder_begin_with_the_pad_id():
    assert shift_right(torch.tensor([[5, 6, 1], [7, 1, 0]])).tolist() == [[0, 5, 6], [0, 7, 1]]


def test_the_network_takes_its_sizes_from_the_tokenizers(tokenizer, text_encoder):
    found = ItitConfig(width=8, depth=1, heads=1, text_decoder_heads=1).build(tokenizer, text_encoder).config
    assert (found.image_tokens, found.codebook_size) == (tokenizer.tokens, tokenizer.codebook_size)
    assert (found.text_features, found.vocab_size) == (text_encoder.width, text_encoder.vocab_rows)
    assert (found.width, found.max_text_len) == (8, 64)


def test_no_weight_is_left_uninitialised():
    """Built on the meta device and moved without values, then initialised: every weight must have been written."""
    small = {"image_tokens": 4, "codebook_size": 8, "max_text_len": 4, "text_features": 4, "vocab_size": 8}
    encoder = {"width": 8, "depth": 1, "heads": 1, "image_decoder_depth": 1}
    text_decoder = {"text_decoder_width": 8, "text_decoder_depth": 1, "text_decoder_heads": 1}
    config = ItitConfig(**small, **encoder, **text_decoder)
    empty = torch.empty

    def poisoned(*size, **options):
        return empty(*size, **options).fill_(math.nan)

    torch.empty = poisoned
    try:
        model = ITIT(config)
    finally:
        torch.empty = empty
    assert not [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]


def test_save_and_load(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    again = ITIT.from_pretrained(tmp_path)
    assert again.config == model.config
    expected = model.encode(model.embed_image(tokens)).image_BKD
    torch.testing.assert_close(again.encode(again.embed_image(tokens)).image_BKD, expected, rtol=0, atol=0)


NARROW = ItitConfig(
    image_tokens=16,
    codebook_size=40,
    max_text_len=8,
    text_features=12,
    vocab_size=30,
    width=64,
    depth=1,
    heads=2,
    image_decoder_depth=1,
    text_decoder_width=64,
    text_decoder_depth=1,
    text_decoder_heads=2,
    dropout=0.0,
)


def narrow(**changes):
    torch.manual_seed(0)
    return ITIT(replace(NARROW, **changes)).eval()


def test_initial_weights_by_fan_in_keep_the_signal():
    model = narrow(init="fan_in")
    block = model.encoder.layers[0]
    assert block.attention.qkv.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert block.attention.out.weight.std().item() == pytest.approx(64**-0.5 / 2, rel=0.05)
    assert block.mlp[2].weight.std().item() == pytest.approx(256**-0.5 / 2, rel=0.05)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert model.image_position.weight.std().item() == pytest.approx(0.06, rel=0.1)
    assert narrow().encoder.layers[0].attention.qkv.weight.std().item() == pytest.approx(0.0176, rel=0.05)


def test_the_feed_forward_layers_have_the_width_they_are_given():
    assert narrow(mlp_ratio=2).text_decoder.layers[0].mlp[0].out_features == 128


def test_whitened_text_has_variance_one_in_every_direction():
    model = narrow(whiten_text=True)
    features = torch.randn(5000, 12) * torch.logspace(0, 1, 12) + 3
    model.fit_whitening(features, floor=0.0)
    white = (features - model.text_mean_F) @ model.text_whitening_FF
    torch.testing.assert_close(white.T.cov(), torch.eye(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.mean(0), torch.zeros(12), atol=1e-3, rtol=0)


@pytest.mark.parametrize("whiten", [False, True])
def test_a_window_shows_a_token_its_neighbours_but_no_padding(whiten):
    model = narrow(text_window=5, whiten_text=whiten, depth=0)  # without blocks only the window mixes tokens
    tokens = torch.zeros(1, 16, dtype=torch.long)
    features, valid = torch.randn(1, 8, 12), torch.arange(8)[None] < 6

    def encoded(changed):
        moved = features.clone()
        moved[:, changed] += 5
        return model.encode(model.embed_image(tokens), features_BLF=moved, valid_BL=valid).text_BLD

    before = encoded([])
    assert ((encoded([1]) - before).abs().amax((0, 2)) > 1e-4).tolist() == [True] * 4 + [False] * 4
    torch.testing.assert_close(encoded([6, 7])[:, :6], before[:, :6])


def test_a_window_without_a_middle_is_refused(tokenizer, text_encoder):
    with pytest.raises(UserError, match="odd number"):
        replace(NARROW, text_window=4).build(tokenizer, text_encoder)


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


def test_a_share_of_the_dropped_tokens_enters_the_decoder():
    found = hidden(MaskingConfig(decode=0.25), rows=50, positions=16)
    whole = hidden(MaskingConfig(), rows=50, positions=16)
    assert whole.decode_BM is None
    assert torch.equal(found.hidden_BN, whole.hidden_BN)
    assert torch.equal(found.keep_BK, whole.keep_BK)
    assert torch.equal(found.decode_BM[:, :8], found.keep_BK)
    assert found.decode_BM.shape == (50, 10)
    assert all(len(row.unique()) == 10 for row in found.decode_BM)


def test_the_decoder_knows_nothing_of_what_does_not_enter_it(model, tokens):
    """All positions in another order give the same logits in that order; with fewer, the others do not matter."""
    found = sample_masking(MaskingConfig(decode=0.5), 3, 16, rng=StepRNG(0, 0), name="x", device=tokens.device)
    model.eval()

    def logits(decode_BM):
        encoded = model.encode(model.embed_image(tokens), Masking(found.hidden_BN, found.keep_BK))
        return model.image_logits(encoded, found.hidden_BN, decode_BM)

    order_BN = torch.rand(3, 16).argsort(1)
    whole = logits(None).gather(1, order_BN[..., None].expand(-1, -1, model.config.codebook_size))
    torch.testing.assert_close(logits(order_BN), whole)
    encoded = model.encode(model.embed_image(tokens), Masking(found.hidden_BN, found.keep_BK))
    wanted_BM = order_BN[:, :5]
    torch.testing.assert_close(model.image_logits(encoded, found.hidden_BN, wanted_BM=wanted_BM), whole[:, :5])
    some = logits(found.decode_BM)
    assert some.shape[1] == found.decode_BM.shape[1] == 12
    left_out = [position for position in range(16) if position not in found.decode_BM[0].tolist()]
    before = model.decoder_position.weight[left_out].clone()
    with torch.no_grad():
        model.decoder_position.weight[left_out] += 1.0
        assert torch.equal(logits(found.decode_BM)[0], some[0])
        model.decoder_position.weight[left_out] = before


def test_impossible_shares():
    with pytest.raises(UserError, match=r"decode 1\.5"):
        hidden(MaskingConfig(decode=1.5))
    with pytest.raises(UserError, match="low <= high"):
        hidden(MaskingConfig(low=0.8, high=0.5))


WIDTH, FEATURES, TEXT = 6, 5, 3


def of(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def related():
    """Image features that follow from their texts by a matrix and a constant, and a little noise."""
    text_XF, matrix_FG = of("text", 240, TEXT), of("matrix", TEXT, FEATURES)
    return text_XF @ matrix_FG + 2.0 + 0.05 * of("noise!", 240, FEATURES), text_XF


@pytest.fixture
def features(related) -> ImageFeatures:
    torch.manual_seed(0)
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    made.fit(*related)
    return made


def guess(features: ImageFeatures, text_XF: torch.Tensor, *, noise: float, step: int = 0) -> torch.Tensor:
    valid_BL = torch.ones(len(text_XF), 1, dtype=torch.bool)
    return features.of_texts(text_XF[:, None], valid_BL, noise=noise, rng=StepRNG(0, step))


def test_a_text_gives_the_features_of_its_image(features, related):
    image_XG, text_XF = related
    error = (guess(features, text_XF, noise=0.0) - image_XG).square().mean()
    assert error < 0.02 * image_XG.var()


def test_noise_adds_the_residuals_of_other_pairs(features, related):
    text_XF = related[1]
    plain, noisy = guess(features, text_XF, noise=0.0), guess(features, text_XF, noise=1.0)
    assert torch.equal(guess(features, text_XF, noise=1.0), noisy)
    assert not torch.equal(guess(features, text_XF, noise=1.0, step=1), noisy)
    residuals_XG = related[0] - plain
    assert (noisy - plain).std().item() == pytest.approx(residuals_XG.std().item(), rel=0.2)


def test_unrelated_texts_are_given_the_mean_image(related):
    """The penalty is chosen on pairs held out, so what the fitted pairs have by chance is not learned."""
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    other_XF = of("another text", 240, TEXT)
    made.fit(related[0], other_XF)
    spread = guess(made, other_XF, noise=0.0).std(0).mean()
    assert spread < 0.2 * related[0].std(0).mean()


def test_the_decoder_reads_features_of_one_scale(features, related):
    image_XG = related[0]
    scaled = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    scaled.projection.load_state_dict(features.projection.state_dict())
    scaled.fit(1000 * image_XG, related[1])
    assert features(image_XG).shape == (240, 1, WIDTH)
    torch.testing.assert_close(scaled(1000 * image_XG), features(image_XG), rtol=1e-4, atol=1e-4)


def test_a_feature_that_never_varies_does_no_harm(related):
    image_XG, text_XF = related
    constant_XG = torch.cat([image_XG[:, :-1], torch.full((240, 1), 3.0)], dim=1)
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    made.fit(constant_XG, text_XF)
    assert made(constant_XG).isfinite().all()


def test_one_pair_is_enough_to_be_fitted():
    made = ImageFeatures(width=WIDTH, features=FEATURES, text_features=TEXT)
    made.fit(of("image", 1, FEATURES), of("text", 1, TEXT))
    assert made(of("image", 1, FEATURES)).isfinite().all()


def test_the_mean_of_a_text_leaves_padding_out():
    text_BLF = torch.tensor([[[1.0], [3.0], [0.0]], [[5.0], [0.0], [0.0]]])
    valid_BL = text_BLF[..., 0] > 0
    assert mean_of_text(text_BLF, valid_BL).flatten().tolist() == [2.0, 5.0]


def test_a_caption_agrees_with_its_own_image(features, related):
    image_XG, text_XF = related[0][:20], related[1][:20]
    valid_XL = torch.ones(20, 1, dtype=torch.bool)
    own = features.agreement(image_XG, text_XF[:, None], valid_XL)
    others = features.agreement(image_XG.roll(1, 0), text_XF[:, None], valid_XL)
    assert own.min() > 0.9
    assert own.mean() > others.mean() + 0.5
