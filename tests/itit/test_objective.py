"""The whole objective: what each loss trains, what it must not, and that nothing depends on how rows are split.

The cycles are compared with the paper's definition, written out densely.
"""

import copy
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from diptych.errors import UserError
from diptych.itit import objective as module
from diptych.itit.generation import GeneratedTexts, ImageGenerationConfig
from diptych.itit.model import ITIT, Masking, MaskingConfig, sample_masking, shift_right
from diptych.itit.objective import (
    AlignmentHead,
    ItitObjective,
    ItitObjectiveConfig,
    LossWeights,
    straight_through_embedding,
    token_loss,
)
from diptych.nn.inference import autocast
from diptych.nn.transformer import Block
from diptych.rng import StepRNG

NOTHING = {"t2i": 0.0, "i2t": 0.0, "i2i": 0.0, "t2i2t": 0.0, "i2t2i": 0.0}
ENCODER = ("encoder.", "input_norm.")
IMAGE_DECODER = ("image_decoder.", "image_head.", "decoder_position", "image_bias")
TEXT_DECODER = ("text_decoder.", "word_", "prefix_projection.")
FAST = ImageGenerationConfig(steps=3, guidance=0.0, temperature=4.0)


def objective(model, text_encoder, **fields):
    return ItitObjective(
        model, text_encoder, ItitObjectiveConfig(**({"cycle_start_step": 0, "image_generation": FAST} | fields))
    )


def trained_by(model, text_encoder, batch, name, **fields):
    """Names of the parameters with a gradient that is not zero when one loss counts."""
    weights = LossWeights(**(NOTHING | {name: 1.0}))
    objective(model, text_encoder, weights=weights, **fields)(batch, 0).total.backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all(p.grad is None for p in text_encoder.parameters())
    return found


def has(names, parts):
    return any(name.startswith(parts) for name in names)


@pytest.mark.parametrize(
    ("name", "image_decoder", "text_decoder"),
    [("t2i", True, False), ("i2i", True, False), ("i2t", False, True), ("t2i2t", True, True), ("i2t2i", True, True)],
)
def test_each_loss_trains_its_own_part(model, text_encoder, batch, name, image_decoder, text_decoder):
    names = trained_by(model, text_encoder, batch, name)
    assert has(names, ENCODER)
    assert has(names, IMAGE_DECODER) == image_decoder
    assert has(names, TEXT_DECODER) == text_decoder
    assert ("text_null" in names) == (name in ("i2i", "i2t", "t2i2t"))


@pytest.mark.parametrize(
    ("stream", "name", "decoder"), [("texts", "t2i2t", IMAGE_DECODER), ("images", "i2t2i", TEXT_DECODER)]
)
def test_a_half_cycle_stops_at_the_pseudo_data(model, text_encoder, batch, stream, name, decoder):
    assert not has(trained_by(model, text_encoder, batch, name, **{stream: "half"}), decoder)


def test_t2i2t_reaches_the_image_decoder_scaled_by_the_encoder_gradient(model, text_encoder, batch):
    """0.1 of the text gradient enters the encoder, and so the image decoder behind it."""

    def gradient(share):
        model.zero_grad()
        weights = LossWeights(**(NOTHING | {"t2i2t": 1.0}))
        objective(model, text_encoder, weights=weights, encoder_grad_scale=share)(batch, 0).total.backward()
        return model.image_decoder.layers[0].mlp[0].weight.grad.clone()

    torch.testing.assert_close(gradient(0.1), 0.1 * gradient(1.0), atol=1e-9, rtol=1e-3)
    assert gradient(0.0).abs().max() == 0


def test_the_first_encoder_pass_of_a_cycle_gets_no_gradient(model, text_encoder, batch, monkeypatch):
    passes = []
    encode = model.encode

    def watched(*args, **options):
        passes.append(torch.is_grad_enabled())
        return encode(*args, **options)

    monkeypatch.setattr(model, "encode", watched)
    objective(model, text_encoder, images="off")(batch, 0)
    assert passes == [True, True, *[False] * FAST.steps, False, True]
    passes.clear()
    objective(model, text_encoder, texts="off")(batch, 0)
    assert passes == [True, True, False, False, True]


def test_a_loss_of_fewer_predicted_tokens_is_the_dense_one_on_them(model, text_encoder, batch):
    """T2I with `decode` is the loss over the hidden tokens among those that enter the decoder."""
    masking_config = MaskingConfig(decode=0.5)
    ours = objective(model, text_encoder, image_masking=masking_config)
    pairs, rng = batch["pairs"][0::2], StepRNG(0, 0)
    found = ours.t2i_loss(pairs, rng)
    positions = model.config.image_tokens
    masked = sample_masking(masking_config, len(pairs), positions, rng=rng, name="t2i", device=torch.device("cpu"))
    features = text_encoder.features(pairs.ids_BL, pairs.valid_BL)
    encoded = model.encode(model.embed_image(pairs.tokens_BN), masked, features, pairs.valid_BL)
    logits = model.image_logits(encoded, masked.hidden_BN, masked.decode_BM)
    log_p = logits.log_softmax(-1)
    target = pairs.tokens_BN.gather(1, masked.decode_BM)
    smoothed = 0.9 * log_p.gather(-1, target[..., None])[..., 0] + 0.1 * log_p.mean(-1)
    counts = masked.hidden_BN.gather(1, masked.decode_BM).float()
    dense = -((smoothed * counts).sum(1) / counts.sum(1)).mean()
    torch.testing.assert_close(found, dense)
    assert counts.sum() < masked.hidden_BN.sum()


def test_only_a_share_of_the_rows_takes_part_in_the_cycles(model, text_encoder, batch):
    whole, half = objective(model, text_encoder), objective(model, text_encoder, cycle_share=0.5)
    some = {name: batch[name][torch.tensor([0, 2])] for name in ("images", "texts")}
    expected = whole(replace(batch, streams=batch.streams | some), 0)
    found = half(batch, 0)
    assert len(batch["texts"]) == 4
    assert found.terms.keys() == expected.terms.keys()
    for name, loss in found.terms.items():
        assert torch.equal(loss, expected.terms[name]), name
    for share in (0.0, 1.2):
        with pytest.raises(UserError, match="cycle-share"):
            objective(model, text_encoder, cycle_share=share)


def test_the_total_is_the_weighted_sum(model, text_encoder, batch):
    weights = LossWeights(t2i=2.0, i2t=3.0, i2i=5.0, t2i2t=7.0, i2t2i=11.0, t2t=13.0, unpaired_i2i=17.0)
    losses = objective(model, text_encoder, weights=weights)(batch, 0)
    expected = sum(getattr(weights, name) * losses.terms[name] for name in asdict(weights) if name in losses.terms)
    assert asdict(weights).keys() - losses.terms.keys() == {"teacher"}  # there is none
    torch.testing.assert_close(losses.total, expected)


def test_a_text_encoder_in_bf16_changes_losses_as_little_as_bf16_itself(model, text_encoder, batch):
    """Also the gradient that goes through it."""

    def step(encoder, precision):
        model.zero_grad()
        with autocast(torch.device("cpu"), precision):
            losses = objective(model, encoder)(batch, 0)
        losses.total.backward()
        return losses.terms, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, exact_grad = step(text_encoder, "fp32")
    mixed, mixed_grad = step(text_encoder, "bf16")
    terms, grad = step(copy.deepcopy(text_encoder).to(torch.bfloat16), "bf16")
    assert terms.keys() == exact.keys() >= {"t2i2t", "i2t2i"}
    for name, loss in terms.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.01), name
        assert loss.item() == pytest.approx(mixed[name].item(), rel=0.01), name
    assert torch.cosine_similarity(grad, exact_grad, dim=0) > 0.99
    assert torch.cosine_similarity(mixed_grad, exact_grad, dim=0) > 0.99


def test_cycles_begin_at_their_step(model, text_encoder, batch):
    late = objective(model, text_encoder, cycle_start_step=10)
    assert set(late(batch, 9).terms) == {"t2i", "i2t", "i2i"}
    assert set(late(batch, 10).terms) == {"t2i", "i2t", "i2i", "t2i2t", "i2t2i"}
    assert not late(batch, 9).measures
    assert set(late(batch, 10).measures) == {"i2t2i/distinct_captions"}


def test_controls_and_streams(model, text_encoder, batch):
    beside = LossWeights(t2t=1.0, unpaired_i2i=1.0)
    control = objective(model, text_encoder, texts="off", images="off", weights=beside, cycle_start_step=10)
    assert set(control(batch, 0).terms) == {"t2i", "i2t", "i2i", "t2t", "unpaired_i2i"}  # before any cycle begins
    assert control.streams == {"pairs": 2, "images": 1, "texts": 1}
    both = objective(model, text_encoder, weights=beside)
    assert {"t2t", "unpaired_i2i", "t2i2t", "i2t2i"} <= set(both(batch, 0).terms)
    alone = objective(model, text_encoder, texts="off", images="off")
    assert alone.streams == {"pairs": 2}
    assert set(alone(batch, 0).terms) == {"t2i", "i2t", "i2i"}


def test_padding_changes_no_loss(model, text_encoder, batch):
    def padded(items):
        return replace(
            items,
            ids_BL=torch.nn.functional.pad(items.ids_BL, (0, 4)),
            valid_BL=torch.nn.functional.pad(items.valid_BL, (0, 4)),
        )

    longer = replace(batch, streams=batch.streams | {name: padded(batch[name]) for name in ("pairs", "texts")})
    one, two = (objective(model, text_encoder)(b, 0).terms for b in (batch, longer))
    for name in NOTHING:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)


def test_cached_features_change_no_loss(model, text_encoder, batch):
    def cached(items):
        return replace(items, features_BLF=text_encoder.features(items.ids_BL, items.valid_BL))

    cached_batch = replace(batch, streams=batch.streams | {name: cached(batch[name]) for name in ("pairs", "texts")})
    one, two = (objective(model, text_encoder)(b, 0).total for b in (batch, cached_batch))
    torch.testing.assert_close(one, two)


def test_two_processes_have_the_losses_of_one(model, text_encoder, batch):
    def part(rank):
        cut = {name: rows[rank * len(rows) // 2 : (rank + 1) * len(rows) // 2] for name, rows in batch.streams.items()}
        return replace(batch, rng=StepRNG(0, 0, rank, 2), streams=cut)

    whole = objective(model, text_encoder)(batch, 0).terms
    parts = [objective(model, text_encoder)(part(rank), 0).terms for rank in (0, 1)]
    for name in NOTHING:
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, whole[name], atol=1e-5, rtol=1e-5)


def test_the_frozen_text_encoder_is_not_in_the_checkpoint(model, text_encoder):
    state = objective(model, text_encoder).state_dict()
    assert state
    assert not [name for name in state if "text_encoder" in name]


def test_an_averaged_network_generates_and_never_learns(model, text_encoder, batch):
    averaging = objective(model, text_encoder, cycle_network="ema", cycle_network_decay=0.5)
    averaging.start_step(0)
    averaging.train()(batch, 0).total.backward()
    assert all(p.grad is None for p in averaging.averaged.parameters())
    with torch.no_grad():
        model.image_bias += 1.0
    before = averaging.averaged.image_bias.clone()
    averaging.start_step(1)
    averaging(batch, 1)
    averaging(batch, 1)  # a second micro-batch of the same step
    torch.testing.assert_close(averaging.averaged.image_bias, (before + model.image_bias) / 2)
    assert [name for name in averaging.state_dict() if name.startswith("averaged.")]


def test_it_can_over_fit_one_batch(model, text_encoder, batch):
    fit = objective(model, text_encoder, label_smoothing=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = fit(batch, 0).terms
    for step in range(150):
        optimizer.zero_grad()
        losses = fit(replace(batch, rng=StepRNG(0, step)), step)
        losses.total.backward()
        optimizer.step()
    for name in ("t2i", "i2t", "i2i", "t2i2t"):
        assert losses.terms[name] < 0.7 * first[name], name


def test_compiling_takes_the_blocks_but_not_their_cached_form(model, text_encoder, batch, monkeypatch):
    calls = []

    def compile_(block, **settings):
        def compiled(*args, **named):
            calls.append(named.get("cache"))
            return block.forward(*args, **named)

        block._compiled_call_impl = compiled

    monkeypatch.setattr(Block, "compile", compile_)
    whole = objective(model, text_encoder)
    plain = whole(batch, 0).total.item()
    whole.compile_regions()
    assert whole(batch, 0).total.item() == plain
    assert len(calls) > sum(isinstance(module, Block) for module in model.modules())
    assert all(cache is None for cache in calls)


# The cycles against the paper's definition


def masking(model, rows, seen, keep=None):
    hidden = torch.ones(rows, model.config.image_tokens, dtype=torch.bool)
    hidden[:, seen] = False
    keep = torch.arange(model.config.image_tokens) if keep is None else torch.tensor(keep)
    return Masking(hidden, keep.expand(rows, -1))


def dense_one_hot(logits):
    soft = logits.softmax(-1)
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]) + (soft - soft.detach())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, dense):
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    one, two = gradients(model, ours), gradients(model, dense)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-3, msg=name)


@pytest.fixture
def cycles(model, text_encoder, batch, monkeypatch) -> ItitObjective:
    """An objective whose cycles generate the batch's own images and texts, and hide the same positions always."""
    hidden = {"first": [0, 3, 5], "second": [1, 2, 3, 4]}
    monkeypatch.setattr(module, "generate_image_tokens", lambda *_, **options: batch["images"].tokens_BN)
    texts = GeneratedTexts(batch["texts"].ids_BL[:, None], None)
    monkeypatch.setattr(module, "generate_text", lambda *_, **options: texts)
    monkeypatch.setattr(
        module, "sample_masking", lambda *_, name, **options: masking(model, 4, hidden[name.split("/")[1]])
    )
    return objective(model, text_encoder, label_smoothing=0.1, encoder_grad_scale=0.1, gumbel=1.0)


def test_t2i2t_equals_the_dense_definition(model, text_encoder, batch, cycles):
    texts, rng = batch["texts"], StepRNG(0, 0)
    features = text_encoder.features(texts.ids_BL, texts.valid_BL)
    pseudo = batch["images"].tokens_BN
    first, second = masking(model, 4, [0, 3, 5]), masking(model, 4, [1, 2, 3, 4])
    ours = cycles.t2i2t_loss(texts, rng)

    with torch.no_grad():
        encoded = model.encode(model.embed_image(pseudo), first, features_BLF=features, valid_BL=texts.valid_BL)
    logits = model.image_logits(encoded, first.hidden_BN)
    noisy = logits + rng.gumbel("gumbel", *logits.shape)
    pseudo_hot = torch.nn.functional.one_hot(pseudo, model.config.codebook_size).float()
    one_hot = torch.where(first.hidden_BN[..., None], dense_one_hot(noisy), pseudo_hot)
    image = one_hot @ model.token_embedding.weight
    prefix = model.encode(image, second).image_BKD
    prefix = 0.1 * prefix + (0.9 * prefix).detach()
    logits = model.text_logits(prefix, shift_right(texts.ids_BL))
    dense = token_loss(logits, texts.ids_BL, texts.valid_BL, label_smoothing=0.1)
    assert_same(model, ours, dense)


def test_t2i2t_predicts_the_image_only_where_it_is_read(model, text_encoder, batch, cycles, monkeypatch):
    texts, pseudo = batch["texts"], batch["images"].tokens_BN
    first, second = masking(model, 4, [0, 3, 5]), masking(model, 4, [1, 2, 3, 4], keep=[4, 3, 9, 1, 2, 0])
    maskings = {"t2i2t/first": first, "t2i2t/second": second}
    monkeypatch.setattr(module, "sample_masking", lambda *_, name, **options: maskings[name])
    cycles.config.gumbel = 0.0
    ours = cycles.t2i2t_loss(texts, StepRNG(0, 0))

    features = text_encoder.features(texts.ids_BL, texts.valid_BL)
    with torch.no_grad():
        encoded = model.encode(model.embed_image(pseudo), first, features_BLF=features, valid_BL=texts.valid_BL)
    predicted = dense_one_hot(model.image_logits(encoded, first.hidden_BN)) @ model.token_embedding.weight
    image = torch.where(first.hidden_BN[..., None], predicted, model.embed_image(pseudo))
    prefix = model.encode(image, second).image_BKD
    logits = model.text_logits(0.1 * prefix + (0.9 * prefix).detach(), shift_right(texts.ids_BL))
    assert_same(model, ours, token_loss(logits, texts.ids_BL, texts.valid_BL, label_smoothing=0.1))


def test_i2t2i_equals_the_dense_definition(model, text_encoder, batch, cycles):
    tokens = batch["images"].tokens_BN
    longest = int(batch["texts"].valid_BL.sum(1).max())
    pseudo, valid = batch["texts"].ids_BL[:, :longest], batch["texts"].valid_BL[:, :longest]
    first, second = masking(model, 4, [0, 3, 5]), masking(model, 4, [1, 2, 3, 4])
    banned = torch.zeros(text_encoder.vocab_rows, dtype=torch.bool)
    banned[list(text_encoder.banned_ids)] = True
    ours, distinct = cycles.i2t2i_loss(batch["images"], StepRNG(0, 0))
    assert distinct == len(set(map(tuple, pseudo.tolist()))) / 4

    with torch.no_grad():
        prefix = model.encode(model.embed_image(tokens), first).image_BKD
    logits = model.text_logits(prefix, shift_right(pseudo)).masked_fill(banned, -torch.inf)
    embedded = dense_one_hot(logits) @ text_encoder.embedding.weight
    features = text_encoder.features_from_embeddings(embedded, valid)
    encoded = model.encode(
        model.embed_image(tokens),
        second,
        features_BLF=features,
        valid_BL=valid,
    )
    dense = token_loss(model.image_logits(encoded, second.hidden_BN), tokens, second.hidden_BN, label_smoothing=0.1)
    assert_same(model, ours, dense)


def test_what_was_visible_stays(model, batch, cycles, monkeypatch):
    """Where I' was visible, ~I is I' in the second pass of T2I2T."""
    images = []
    encode = model.encode

    def watched(image_BND, *others):
        images.append(image_BND)
        return encode(image_BND, *others)

    monkeypatch.setattr(model, "encode", watched)
    cycles.t2i2t_loss(batch["texts"], StepRNG(0, 0))
    expected = model.embed_image(batch["images"].tokens_BN)
    torch.testing.assert_close(images[-1][:, [0, 3, 5]], expected[:, [0, 3, 5]])
    assert (images[-1] != expected).any()


def test_a_batch_passes_through_five_files(model, text_encoder, batch):
    """Those that docs/tour.md names; below them lie the blocks, the random numbers and the evaluation mode."""
    entered = set()

    def note(frame, event, argument):
        entered.add(frame.f_code.co_filename)

    here = Path(module.__file__).parents[1]
    step = objective(model, text_encoder)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step(batch, 0)
    finally:
        sys.setprofile(before)
    found = {str(Path(file).relative_to(here)) for file in entered if Path(file).is_relative_to(here)}
    below = {"nn/transformer.py", "nn/inference.py", "rng.py"}
    others = {"data/batch.py", "itit/model.py", "itit/generation.py", "tokenizers/text_encoder.py"}
    assert found == {"itit/objective.py", *others, *below}


# Captions read from image features


@pytest.fixture
def reader(model, text_encoder, batch):
    """A network that reads captions from features of width 5, and a batch that has them."""
    torch.manual_seed(0)
    network = ITIT(replace(model.config, image_features=5))
    assert network.image_features is not None
    features_BG = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    network.image_features.fit(features_BG, torch.randn(8, text_encoder.width))
    streams = dict(batch.streams)
    streams["pairs"] = replace(batch["pairs"], image_features_BG=features_BG)
    streams["images"] = replace(batch["images"], image_features_BG=features_BG[:4])
    return network, replace(batch, streams=streams)


@pytest.mark.parametrize("name", ["i2t", "t2i2t"])
def test_captions_are_learned_from_image_features_alone(reader, text_encoder, name):
    network, batch = reader
    names = trained_by(network, text_encoder, batch, name)
    assert has(names, TEXT_DECODER)
    assert has(names, ("image_features.projection",))
    assert not has(names, ENCODER)
    assert not has(names, IMAGE_DECODER)


def test_images_are_learned_from_captions_read_from_features(reader, text_encoder):
    network, batch = reader
    names = trained_by(network, text_encoder, batch, "i2t2i")
    assert has(names, TEXT_DECODER)
    assert has(names, IMAGE_DECODER)


def test_i2i_is_learned_beside_captions_that_do_not_share_its_pass(reader, text_encoder):
    network, batch = reader
    names = trained_by(network, text_encoder, batch, "i2i")
    assert has(names, IMAGE_DECODER)
    assert not has(names, TEXT_DECODER)


def test_no_image_is_generated_for_the_features_of_one(reader, text_encoder, monkeypatch):
    network, batch = reader
    monkeypatch.setattr(module, "generate_image_tokens", lambda *_, **__: pytest.fail("an image was generated"))
    assert objective(network, text_encoder).t2i2t_loss(batch["texts"], batch.rng).isfinite()


# A frozen teacher of the encoder


def taught(model, batch, width=7):
    """A head that the features of a teacher, random ones of ``width``, decide, and a batch that has them."""
    features_XT = torch.randn(12, width, generator=torch.Generator().manual_seed(3)) * 5 + 2
    torch.manual_seed(4)
    head = AlignmentHead(features_XT[:8], width=model.config.width)
    streams = dict(batch.streams)
    streams["pairs"] = replace(batch["pairs"], teacher_features_BT=features_XT[:8])
    streams["images"] = replace(batch["images"], teacher_features_BT=features_XT[8:])
    return head, replace(batch, streams=streams)


def test_the_teacher_loss_is_the_mean_cosine_over_captioned_and_bare_images(model, text_encoder, batch):
    head, with_features = taught(model, batch)
    whole = MaskingConfig(low=0.0, high=0.0, mode=0.0)
    config = ItitObjectiveConfig(cycle_start_step=9, text_masking=whole)
    made = ItitObjective(model, text_encoder, config, teacher_head=head).eval()
    losses = made(with_features, 0)
    found = []
    for stream, step in (("pairs", 2), ("images", 1)):
        images = with_features[stream]
        tokens_BN, features_BT = images.tokens_BN[step - 1 :: step], images.teacher_features_BT[step - 1 :: step]
        shown = sample_masking(
            whole,
            len(tokens_BN),
            tokens_BN.shape[1],
            rng=with_features.rng,
            name=f"teacher/{stream}",
            device=tokens_BN.device,
        )
        encoded = model.encode(model.embed_image(tokens_BN), shown)
        known = with_features["pairs"].teacher_features_BT
        wanted_BT = (features_BT - known.mean(0)) / known.std(0, correction=0)
        predicted_BT = head.layers(encoded.image_BKD.mean(1))
        found += (-(predicted_BT * wanted_BT).sum(1) / predicted_BT.norm(dim=1) / wanted_BT.norm(dim=1)).split(1)
    expected = torch.stack([torch.cat(found[:4]).mean(), torch.cat(found[4:]).mean()]).mean()
    torch.testing.assert_close(losses.terms["teacher"], expected.detach())
    others = sum(value for name, value in losses.terms.items() if name != "teacher")
    torch.testing.assert_close(losses.total.detach(), others + 0.5 * losses.terms["teacher"])


def test_the_teacher_trains_the_encoder_and_its_head_alone(model, text_encoder, batch):
    head, with_features = taught(model, batch)
    weights = LossWeights(**(NOTHING | {"teacher": 1.0}))
    made = ItitObjective(model, text_encoder, ItitObjectiveConfig(weights=weights), teacher_head=head)
    made(with_features, 0).total.backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert has(names, ENCODER)
    assert not has(names, (*IMAGE_DECODER, *TEXT_DECODER))
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())
    grouped = {id(p) for group in made.parameter_groups() for p in group["params"]}
    assert {id(p) for p in (*model.parameters(), *head.parameters())} == grouped


def test_without_a_teacher_nothing_of_it_is_computed(model, text_encoder, batch):
    """The losses are the same to the last bit, whatever its weight and whether the data has features."""
    plain = objective(model, text_encoder)(batch, 0)
    _, with_features = taught(model, batch)
    other = objective(model, text_encoder, weights=LossWeights(teacher=9.0))(with_features, 0)
    assert torch.equal(plain.total, other.total)
    assert all(torch.equal(plain.terms[name], other.terms[name]) for name in plain.terms | other.terms)


def test_without_bare_images_the_teacher_teaches_on_pairs(model, text_encoder, batch):
    head, with_features = taught(model, batch)
    config = ItitObjectiveConfig(images="off", texts="off", cycle_start_step=9)
    made = ItitObjective(model, text_encoder, config, teacher_head=head).eval()
    streams = {"pairs": with_features["pairs"]}
    assert made(replace(with_features, streams=streams), 0).terms["teacher"].isfinite()


def test_the_head_learns_what_the_encoder_tells_of_an_image(model, text_encoder, batch):
    head, with_features = taught(model, batch)
    weights = LossWeights(**(NOTHING | {"teacher": 1.0}))
    config = ItitObjectiveConfig(weights=weights, cycle_start_step=999)
    made = ItitObjective(model, text_encoder, config, teacher_head=head)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for step in range(60):
        losses = made(replace(with_features, rng=StepRNG(0, step)), step)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert losses.terms["teacher"] < -0.7


# Functions of tensors


def smoothed(logits, target, counts, label_smoothing):
    rows = []
    for b in range(len(target)):
        losses = []
        for k in range(target.shape[1]):
            if counts[b, k]:
                log_p = logits[b, k].log_softmax(-1)
                losses.append(-(1 - label_smoothing) * log_p[target[b, k]] - label_smoothing * log_p.mean())
        rows.append(torch.stack(losses).mean())
    return torch.stack(rows).mean()


def test_token_loss_equals_a_loop():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    counts = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    found = token_loss(logits, target, counts, label_smoothing=0.1)
    torch.testing.assert_close(found, smoothed(logits, target, counts, 0.1))


def test_uniform_logits_cost_log_c():
    counts = torch.ones(2, 3, dtype=torch.bool)
    found = token_loss(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.long), counts, label_smoothing=0.1)
    assert found.item() == pytest.approx(math.log(7))


def test_what_does_not_count_changes_nothing_and_any_split_of_rows_gives_the_same():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    counts = torch.rand(4, 3) > 0.4
    counts[:, 0] = True
    whole = token_loss(logits, target, counts, label_smoothing=0.1)
    torch.testing.assert_close(token_loss(logits + 9 * ~counts[..., None], target, counts, label_smoothing=0.1), whole)
    moved = torch.where(counts[..., None], logits, torch.randn(4, 3, 5))
    torch.testing.assert_close(token_loss(moved, target, counts, label_smoothing=0.1), whole)
    halves = [token_loss(logits[i::2], target[i::2], counts[i::2], label_smoothing=0.1) for i in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, whole)


def dense_embedding(logits, table):
    """The definition: hard + (soft - soft.detach()), times the table."""
    soft = logits.softmax(-1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return (hard + (soft - soft.detach())) @ table


def test_straight_through_embedding_equals_the_dense_product():
    torch.manual_seed(0)
    logits, table = torch.randn(2, 5, 7), torch.randn(7, 3)
    ours = [logits.clone().requires_grad_(), table.clone().requires_grad_()]
    plain = [logits.clone().requires_grad_(), table.clone().requires_grad_()]
    weight = torch.randn(2, 5, 3)
    out, expected = straight_through_embedding(*ours), dense_embedding(*plain)
    torch.testing.assert_close(out, expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours[0].grad, plain[0].grad, atol=1e-7, rtol=1e-5)
    # The dense product's table sees the soft part too; its value is zero, so its gradient is the hard rows alone.
    torch.testing.assert_close(ours[1].grad, plain[1].grad, atol=1e-6, rtol=1e-5)


def test_no_gradient_for_a_frozen_table():
    logits, table = torch.randn(4, 7, requires_grad=True), torch.randn(7, 3)
    straight_through_embedding(logits, table).sum().backward()
    assert logits.grad is not None
    assert table.grad is None


def test_impossible_entries_are_never_taken_and_give_no_nan():
    logits = torch.randn(4, 7)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    table = torch.eye(7)
    out = straight_through_embedding(logits, table)
    assert (out[:, 2] == 0).all()
    (out * torch.randn(4, 7)).sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 2] == 0).all()
