import json
import math
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
import tyro

from diptych.dual.model import DualEncoder
from diptych.itit.model import ITIT
from diptych.itit.training import ItitRun
from diptych.registry import RECIPES
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.recipes import (
    encoder_untrained,
    tokenizer_paper,
    tokenizer_patches,
    tokenizer_patches_small,
    tokenizer_small,
    tokenizer_tiny,
)
from diptych.tokenizers.training import TextEncoderRun
from diptych.train.config import TrainConfig

ITIT_RECIPES = [name for name in RECIPES if name.startswith("itit-")]


def parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_the_docstring_gives_command_and_cost_or_names_the_recipe_that_does(name):
    text = RECIPES[name].__doc__ or ""
    assert text.splitlines()[0].strip().endswith(".")
    if not any(f" {other}" in text.replace("`", "") for other in RECIPES if other != name):
        assert f"diptych fit {name} " in text
        assert "Cost: " in text
        assert "--out runs/" in text


def parts_of(value) -> list:
    """Everything in a run, at any depth."""
    inner = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else []
    return [value, *(part for each in inner for part in parts_of(each))]


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_possible_and_a_source_is_asked_for(name):
    run = RECIPES[name]()
    assert RECIPES[name]() == run
    parts = parts_of(run)
    for stage in (part for part in parts if is_dataclass(part) and hasattr(part, "train")):
        if stage.train.steps == 0:  # a text encoder that is not trained
            continue
        stage.train.check()
        stage.optim.check()
        assert stage.optim.warmup_steps < stage.train.steps
        assert stage.train.checkpoint_every * 8 <= stage.train.steps  # an interruption costs an eighth at most
    if isinstance(run, ItitRun):
        run.check()
    assert any(part is tyro.MISSING for part in parts)


@pytest.mark.parametrize(("name", "millions"), [("itit-base", 221), ("itit-large", 487), ("itit-huge", 868)])
def test_the_networks_are_as_large_as_the_papers(name, millions):
    assert f"{millions}M parameters" in (RECIPES[name].__doc__ or "")
    with torch.device("meta"):
        network = ITIT(RECIPES[name]().model)
    assert parameters(network) == pytest.approx(millions * 1e6, rel=0.015)


@pytest.mark.parametrize("name", ["itit-medium", "itit-medium-256", "vqgan-medium", "vqgan-medium-256"])
def test_the_networks_for_one_gpu_are_as_large_as_their_docstrings_say(name):
    """ITIT with the text features and pieces of a T5 of size base."""
    run = RECIPES[name]()
    with torch.device("meta"):
        network = tokenizer = ImageTokenizer.from_config(
            run.tokenizer_stage.model if isinstance(run, ItitRun) else run.stage.model
        )
        if isinstance(run, ItitRun):
            sizes = {"image_tokens": tokenizer.tokens, "codebook_size": tokenizer.codebook_size, "text_features": 768}
            network = ITIT(replace(run.model, **sizes))
    assert tokenizer.tokens == 256
    assert f"{tokenizer.image_size} pixels" in (RECIPES[name].__doc__ or "")
    assert f"{parameters(network) / 1e6:.0f}M parameters" in (RECIPES[name].__doc__ or "")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["itit-medium", "itit-medium-256", "vqgan-medium", "vqgan-medium-256"])
def test_the_recipes_for_one_gpu_run(name, text_encoder, tmp_path):
    """Two steps of two rows on the CPU: one before the cycles, or the discriminator, and one with them."""
    run = RECIPES[name]()
    stage = run if isinstance(run, ItitRun) else run.stage
    stage.train = TrainConfig(
        steps=2, batch_size=2, eval_every=2, checkpoint_every=2, workers=0, tensorboard=False, device="cpu"
    )
    stage.optim = replace(stage.optim, warmup_steps=1)
    if isinstance(run, ItitRun):
        run.data.pairs, run.data.max_pairs = "scenes:?count=12", 4
        run.objective.cycle_start_step = 1
        run.model.max_text_len = 8
        run.generation.image.steps = 2
        run.generation.text.beams = 1
        ImageTokenizer.from_config(run.tokenizer_stage.model, seed=0).save_pretrained(tmp_path / "tokenizer")
        text_encoder.save_pretrained(tmp_path / "text_encoder")
        run.tokenizer, run.text_encoder = str(tmp_path / "tokenizer"), str(tmp_path / "text_encoder")
    else:
        run.images = "scenes:?count=8"
        stage.objective.adversarial_start = 0.5
        stage.objective.codebook.start = 0.5
    run.fit(tmp_path / "run", recipe=name)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", ["ito-small", "ito-medium"])
def test_dual_encoders_are_as_large_as_their_docstrings_say(name, dual_encoder):
    config, about = RECIPES[name]().model, RECIPES[name].__doc__ or ""
    with torch.device("meta"):
        built = DualEncoder.from_config(config, dual_encoder.tokenizer, seed=0)
    words = config.vocab_size - len(dual_encoder.tokenizer)  # the table of a tokenizer of full size
    assert f"{(parameters(built) + words * config.text_width) / 1e6:.0f}M parameters" in about
    assert f"{config.image_size} pixels" in about


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["ito-medium", "clip-medium", "clip-aug-medium", "siglip-medium", "slip-medium"])
def test_the_dual_recipes_for_one_gpu_run(name, tmp_path):
    """Two steps of four rows on the CPU, encoded two at a time."""
    run = RECIPES[name]()
    run.data.pairs, run.data.valid = "scenes:?count=8", "scenes:?split=test&count=4"
    run.train = TrainConfig(
        steps=2, batch_size=4, eval_every=2, checkpoint_every=2, workers=0, tensorboard=False, device="cpu"
    )
    run.optim = replace(run.optim, warmup_steps=1)
    run.objective.chunk = 2
    run.fit(tmp_path / "run", recipe=name)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert any("valid/mean_r1" in record for record in records)


@pytest.mark.parametrize("name", ITIT_RECIPES)
def test_networks_build_for_the_tokenizers_that_are_trained_first(name):
    run = RECIPES[name]()
    with torch.device("meta"):
        tokenizer = ImageTokenizer.from_config(run.tokenizer_stage.model)
        stages = {"image_tokens": tokenizer.tokens, "codebook_size": tokenizer.codebook_size}
        network = ITIT(replace(run.model, **stages, text_features=run.text_encoder_stage.model.width))
    assert network.image_bias.shape == (tokenizer.codebook_size,)


@pytest.mark.parametrize("name", ["vqgan-tiny", "vqgan-small", "vqgan-medium", "vqgan-medium-256", "vqgan-paper"])
def test_tokenizers_are_as_their_docstring_says(name):
    stage = RECIPES[name]().stage
    with torch.device("meta"):
        tokenizer = ImageTokenizer.from_config(stage.model)
    side = math.isqrt(tokenizer.tokens)
    about = RECIPES[name].__doc__ or ""
    assert f"{tokenizer.image_size} pixels" in about
    if "tokens" in about:
        assert f"{side} x {side} tokens out of {tokenizer.codebook_size}" in about


@pytest.mark.parametrize("name", ["text-encoder-tiny", "text-encoder-small"])
def test_text_encoders_build(name):
    run = RECIPES[name]()
    assert isinstance(run, TextEncoderRun)
    config = run.stage.model.t5(vocab_real=run.stage.model.vocab_size)
    assert config.d_model == run.stage.model.width


def test_variants_of_base_change_the_network_only():
    base = RECIPES["itit-base"]()
    for name in ("itit-large", "itit-huge"):
        assert replace(RECIPES[name](), model=base.model) == base


def test_itit_makes_the_tokenizers_of_its_size():
    tiny, small, frozen, medium = (RECIPES[f"itit-{name}"]() for name in ("tiny", "small", "frozen", "medium"))
    assert tiny.tokenizer_stage == tokenizer_patches()
    assert small.tokenizer_stage == frozen.tokenizer_stage == tokenizer_patches_small()
    assert medium.tokenizer_stage == RECIPES["vqgan-medium"]().stage
    assert tiny.text_encoder_stage == RECIPES["text-encoder-tiny"]().stage
    assert small.text_encoder_stage == encoder_untrained()


@pytest.mark.parametrize("name", [name for name in ITIT_RECIPES if RECIPES[name]().objective.texts != "off"])
def test_unpaired_data_that_would_never_be_used_is_noticed(name):
    run = RECIPES[name]()
    late = replace(run, objective=replace(run.objective, cycle_start_step=run.train.steps))
    with pytest.raises(ValueError, match="unpaired data would never be used"):
        late.check()
    replace(late, objective=replace(late.objective, texts="off", images="off")).check()
    with pytest.raises(ValueError, match="never be used"):
        replace(late, objective=replace(late.objective, texts="off")).check()


@pytest.mark.parametrize(
    ("stage", "tokens", "codes", "factor"),
    [
        (tokenizer_patches, 16, 256, 8),
        (tokenizer_tiny, 16, 128, 8),
        (tokenizer_patches_small, 64, 256, 8),
        (tokenizer_small, 64, 128, 8),
        (tokenizer_paper, 256, 8192, 16),
    ],
)
def test_tokenizers_give_as_many_tokens_as_their_recipes_say(stage, tokens, codes, factor):
    with torch.device("meta"):
        tokenizer = ImageTokenizer.from_config(stage().model)
    assert (tokenizer.tokens, tokenizer.codebook_size, tokenizer.factor) == (tokens, codes, factor)
