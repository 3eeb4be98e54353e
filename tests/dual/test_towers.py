"""Dual encoders of two pretrained models, here two small random ones that are saved as their library saves them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_towers import SIZES, bert, encoder_of, pixels, save_image, save_text, vit
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    EfficientNetConfig,
    EfficientNetModel,
    ResNetConfig,
    ResNetModel,
    VisionTextDualEncoderModel,
    ViTModel,
)

from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.dual import data as dual_data
from diptych.dual.data import CaptionIds
from diptych.dual.evaluation import evaluate_dual_run
from diptych.dual.export import save_open_clip
from diptych.dual.model import DualEncoder, DualEncoderConfig
from diptych.dual.search import Index, embed_run
from diptych.dual.towers import Heads, TowersEncoder
from diptych.dual.training import DualRun, PairsData
from diptych.encoders import open_image_encoder, open_text_encoder
from diptych.errors import UserError
from diptych.registry import RECIPES
from diptych.run_folder import read_config
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.pace import Budget, RunPlan, StageCost

TEXTS = ["a small red circle", "a blue square in the top left on a white background"]


def convolutional() -> EfficientNetModel:
    config = EfficientNetConfig(
        width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, image_size=16, kernel_sizes=[3], strides=[2],
        in_channels=[8], out_channels=[8], num_block_repeats=[1], expand_ratios=[1], depthwise_padding=[],
    )  # fmt: skip
    return EfficientNetModel(config)


def small_run(towers, name: str = "clip-frozen", *, steps: int = 4, tune: str = "heads", **changes):
    run = RECIPES[name]()
    run.data = PairsData(pairs="scenes:?count=24", valid="scenes:?split=test&count=6")
    run.model = DualEncoderConfig(
        image_tower=towers[0], text_tower=towers[1], width=16, max_text_len=24, tune=tune, dropout=0.1
    )
    options = {"device": "cpu", "precision": "fp32", "workers": 0, "tensorboard": False, "quiet": True}
    run.train = TrainConfig(steps=steps, batch_size=8, eval_every=2, checkpoint_every=2, **options)
    run.optim = OptimConfig(lr=1e-2, warmup_steps=2, schedule="constant")
    if hasattr(run.objective, "hidden"):
        run.objective.hidden = 8
    return replace(run, **changes)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """Curves take longer than all else here; tests/dual/test_training.py looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diptych.dual.training.write_run_report", lambda *arguments, **options: None)
        yield


@pytest.fixture(scope="module")
def done(towers, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "ito"
    small_run(towers, "ito-frozen").fit(out, recipe="ito-frozen")
    return out


# The encoder


def test_transformers_loads_the_folder_and_computes_the_same(towers, tmp_path):
    encoder = encoder_of(towers).eval()
    encoder.save_pretrained(tmp_path)
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    image = ScenesSource(count=1).image(0, 16)
    given = processor(text=TEXTS, images=Image.fromarray(image), return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        theirs = model(**given)
    torch.testing.assert_close(theirs.text_embeds, encoder.embed_texts(TEXTS), rtol=1e-4, atol=1e-5)
    ours = encoder.embed_images(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(theirs.image_embeds, ours, rtol=1e-4, atol=1e-5)
    again = DualEncoder.from_pretrained(tmp_path)
    assert isinstance(again, TowersEncoder)
    assert torch.equal(again.embed_images(pixels()), encoder.embed_images(pixels()))
    assert torch.equal(again.embed_texts(TEXTS), encoder.embed_texts(TEXTS))
    assert (again.max_text_len, again.image_size, again.width) == (24, 16, 12)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_tower_sees_and_pools_as_its_own_encoder(pooling, tmp_path, text_encoder, towers):
    text = save_text(tmp_path / "text", bert(text_encoder), text_encoder)
    (tmp_path / "text" / "1_Pooling").mkdir()
    (tmp_path / "text" / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}_token": True}))
    encoder, own = encoder_of((towers[0], text)).eval(), open_text_encoder(text, length=24)
    assert own.pooling == pooling
    with torch.no_grad():
        seen = encoder.encode_images(pixels() / 255).state_BW
        torch.testing.assert_close(seen, open_image_encoder(towers[0])(pixels()), rtol=1e-4, atol=1e-5)
        ids_BL, valid_BL = encoder.tokenize(TEXTS)
        output = encoder.encode_texts(ids_BL, valid_BL, keep_tokens=True)
    wanted = own(TEXTS)
    if pooling == "mean":
        wanted = torch.nn.functional.layer_norm(wanted, (16,))
    torch.testing.assert_close(output.state_BW, torch.tanh(0.1 * wanted), rtol=1e-3, atol=1e-4)
    tokens_BLF, found_BL = own.tokens(TEXTS)
    assert torch.equal(found_BL, valid_BL)
    embedded = encoder.text_projection(tokens_BLF)
    torch.testing.assert_close(output.tokens_BSD[valid_BL], embedded[valid_BL], rtol=1e-4, atol=1e-5)


def test_the_heads_follow_from_the_seed_alone(towers):
    first, again, other = (encoder_of(towers, seed=seed).text_projection.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_convolutional_and_clip_towers_and_their_grids(tmp_path, text_encoder, towers):
    torch.manual_seed(0)
    image = save_image(tmp_path / "conv", convolutional())
    config = {**SIZES, "image_size": 16, "patch_size": 4}
    text = {**SIZES, "vocab_size": text_encoder.vocab_rows, "eos_token_id": text_encoder.tokenizer.eos_token_id}
    clip = CLIPModel(CLIPConfig(vision_config=config, text_config=text, projection_dim=6))
    both = save_image(tmp_path / "clip", clip)
    text_encoder.tokenizer.save_pretrained(both)
    for names in ((image, towers[1]), (both, both)):
        encoder = encoder_of(names).eval()
        encoder.save_pretrained(tmp_path / "saved")
        again = DualEncoder.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(again.embed_images(pixels()), encoder.embed_images(pixels()))
        assert torch.equal(again.embed_texts(TEXTS), encoder.embed_texts(TEXTS))
        with torch.no_grad():
            output = encoder.encode_images(pixels() / 255, keep_tokens=True)
        assert output.tokens_BSD.shape == (3, encoder.image_tokens, 12)
        torch.testing.assert_close(output.tokens_BSD[:, 0], output.pooled_BD)


def test_models_without_a_place_are_refused(tmp_path, text_encoder, towers):
    distil = DistilBertConfig(vocab_size=text_encoder.vocab_rows, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    text = save_text(tmp_path / "distil", DistilBertModel(distil), text_encoder)
    with pytest.raises(UserError, match=r"distil: has no pooled feature.*BERT"):
        encoder_of((towers[0], text))
    deberta = DebertaV2Model(DebertaV2Config(vocab_size=text_encoder.vocab_rows, **SIZES))
    with pytest.raises(UserError, match="deberta: has no pooled feature"):
        encoder_of((towers[0], save_text(tmp_path / "deberta", deberta, text_encoder)))
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    image = save_image(tmp_path / "resnet", resnet)
    with pytest.raises(UserError, match=r"resnet: has a pooled feature \[1, 8, 1, 1\]"):
        encoder_of((image, towers[1]))


def test_a_pooler_that_the_weights_lack_is_nearly_the_first_token(tmp_path, towers):
    torch.manual_seed(0)
    model = ViTModel(vit().config, add_pooling_layer=False).eval()
    encoder = encoder_of((save_image(tmp_path / "vit", model), towers[1])).eval()
    with torch.no_grad():
        found = encoder.encode_images(pixels() / 255).state_BW
    open_encoder = open_image_encoder(tmp_path / "vit", pooling="cls")
    torch.testing.assert_close(found, torch.tanh(0.1 * open_encoder(pixels())), rtol=1e-3, atol=1e-4)


def test_frozen_towers_stay_in_evaluation_mode(towers):
    encoder = encoder_of(towers).train()
    assert encoder.training
    assert not any(part.training for part in encoder.clip.vision_model.modules())
    encoder.set_trainable("text")
    trained = {name.split(".")[1] for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert trained == {"text_model", "visual_projection", "text_projection", "logit_scale"}
    assert encoder.clip.text_model.training
    assert not encoder.clip.vision_model.training


def test_the_heads_are_those_of_the_encoder(towers):
    encoder = encoder_of(towers)
    heads = encoder.heads()
    assert isinstance(heads, Heads)
    assert sorted(heads.state_dict()) == ["logit_scale", "text_projection.weight", "visual_projection.weight"]
    assert heads.visual_projection.weight is encoder.clip.visual_projection.weight
    ids_BL, valid_BL = encoder.tokenize(TEXTS)
    for keep in (False, True):
        images = encoder.image_states(pixels() / 255, keep_tokens=keep)
        texts = encoder.text_states(ids_BL, valid_BL, keep_tokens=keep)
        with torch.no_grad():
            ours = heads.encode_images(images, keep_tokens=keep), heads.encode_texts(texts, valid_BL, keep_tokens=keep)
            whole = (
                encoder.encode_images(pixels() / 255, keep_tokens=keep),
                encoder.encode_texts(ids_BL, valid_BL, keep_tokens=keep),
            )
        for one, other in zip(ours, whole, strict=True):
            assert torch.equal(one.pooled_BD, other.pooled_BD)
            if keep:
                assert torch.equal(one.tokens_BSD, other.tokens_BSD)
            else:
                assert one.tokens_BSD is other.tokens_BSD is None


def test_features_that_are_remembered_are_the_same(towers, tmp_path, monkeypatch):
    encoder = encoder_of(towers).eval()
    fresh = encoder.embed_images(pixels()), encoder.embed_texts(TEXTS)
    encoder.remember(tmp_path)
    encoder.embed_images(pixels()), encoder.embed_texts(TEXTS)
    encoder.save_cache()

    def fail(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(TowersEncoder, "image_states", fail)
    monkeypatch.setattr(TowersEncoder, "text_states", fail)
    assert torch.equal(encoder.embed_images(pixels()), fresh[0])
    assert torch.equal(encoder.embed_texts(TEXTS), fresh[1])
    again = encoder_of(towers).eval()
    again.remember(tmp_path)
    assert torch.equal(again.embed_images(pixels()), fresh[0])
    assert torch.equal(again.embed_texts(TEXTS), fresh[1])


def test_open_clip_has_no_place_for_it(towers, tmp_path):
    with pytest.raises(UserError, match="open_clip"):
        save_open_clip(encoder_of(towers), tmp_path / "open_clip")


# Training


@pytest.mark.parametrize("name", ["siglip-frozen", "slip-frozen", "ito-frozen"])
def test_heads_learn_and_towers_stay_as_they_are(name, towers, done, tmp_path):
    out = done if name == "ito-frozen" else tmp_path / "run"
    if out != done:
        small_run(towers, name, steps=2).fit(out, recipe=name)
    before = encoder_of(towers, width=16).state_dict()
    after = DualEncoder.from_pretrained(out).state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed <= {"clip.visual_projection.weight", "clip.text_projection.weight", "clip.logit_scale"}
    assert len(changed) >= 2
    checkpoint = max((out / "checkpoints").iterdir())
    files = [file.name for file in checkpoint.rglob("*")]
    names = {key for file in checkpoint.rglob("*.safetensors") for key in load_file(file)}
    assert names, files
    assert not any("vision_model" in key or "text_model" in key for key in names)


@pytest.mark.parametrize("tune", ["text", "all"])
def test_towers_that_are_tuned_learn(tune, towers, tmp_path):
    before = encoder_of(towers, width=16).state_dict()
    small_run(towers, "ito-frozen", steps=1, tune=tune).fit(tmp_path / "run", recipe="ito-frozen")
    after = DualEncoder.from_pretrained(tmp_path / "run").state_dict()
    changed = {key.split(".")[1] for key, value in after.items() if not torch.equal(value, before[key])}
    assert ("vision_model" in changed) == (tune == "all")
    assert {"text_model", "visual_projection", "text_projection"} <= changed
    assert not (tmp_path / "run" / "features").exists()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(towers, done, tmp_path):
    small_run(towers, "ito-frozen", steps=2).fit(tmp_path, recipe="ito-frozen")
    small_run(towers, "ito-frozen", steps=4).fit(tmp_path, recipe="ito-frozen")
    assert losses(tmp_path) == losses(done)
    with pytest.raises(UserError, match=r"model\.tune"):
        small_run(towers, "ito-frozen", steps=5, tune="all").fit(tmp_path, recipe="ito-frozen")


def test_features_are_computed_once(towers, done, tmp_path, monkeypatch):
    run = small_run(towers, "ito-frozen")
    run.data.cache, run.data.valid = done / "features", None

    def fail(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr("diptych.dual.data.image_states", fail)
    monkeypatch.setattr("diptych.dual.data.text_states", fail)
    run.fit(tmp_path, recipe="ito-frozen")
    assert losses(tmp_path) == losses(done)
    run.train.seed = 1  # views are drawn once, for all seeds
    run.fit(tmp_path / "other", recipe="ito-frozen")


def test_chunks_change_no_loss(towers, done, tmp_path):
    whole, chunked = small_run(towers, "ito-frozen", steps=2), small_run(towers, "ito-frozen", steps=2)
    whole.data.cache = chunked.data.cache = done / "features"
    whole.model.dropout = chunked.model.dropout = 0.0
    chunked.objective.chunk = 3
    whole.fit(tmp_path / "whole", recipe="ito-frozen")
    chunked.fit(tmp_path / "chunked", recipe="ito-frozen")
    assert losses(tmp_path / "chunked") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.fixture
def clock(monkeypatch):
    """A budget of 24 seconds, of which each block of four images takes one."""
    monkeypatch.setattr("diptych.dual.data._ITEMS", 4)
    plain, blocks = dual_data.text_states, []

    def text_states(*arguments):
        blocks.append(1)
        return plain(*arguments)

    monkeypatch.setattr("diptych.dual.data.text_states", text_states)
    monkeypatch.setattr(Budget, "left", lambda budget: 24.0 - len(blocks))
    return blocks


def test_a_budget_takes_as_many_images_as_fit(towers, tmp_path, monkeypatch, capsys, clock):
    monkeypatch.setattr(DualRun, "_seconds_of_training", lambda *_: 8.0)
    run = small_run(towers, steps=8, data=PairsData(pairs="scenes:?count=90"))
    run.fit(tmp_path, recipe="clip-frozen", budget=Budget(0.4))
    assert "features: 60 of 90 images fit into the budget" in capsys.readouterr().out
    decisions = json.loads((tmp_path / "budget.json").read_text())["decisions"]
    assert decisions["images"] == 60
    monkeypatch.setattr(Budget, "left", lambda budget: 0.0)  # what was decided holds
    run.fit(tmp_path, recipe="clip-frozen", budget=Budget(0.4))
    assert len(clock) == 15
    assert read_config(tmp_path)["run"]["train"]["batch_size"] <= 60


@pytest.mark.parametrize("recipe", ["clip-frozen", "slip-frozen", "ito-frozen"])
def test_features_get_the_time_that_training_does_not_need(recipe, towers, tmp_path, monkeypatch, clock):
    run = small_run(towers, recipe, steps=8)
    source = open_source(run.data.pairs)
    model = run._model(source, tmp_path)
    captions = CaptionIds.read(source, np.arange(len(source)), model.ids)
    assert 0 < run._seconds_of_training(model, captions) < 20

    def seconds_of_features(training: float) -> int:
        monkeypatch.setattr(type(run), "_seconds_of_training", lambda *_: training)
        clock.clear()
        enough = run._enough(model, captions, RunPlan([StageCost(name=recipe, steps=8)], budget=Budget(0.4)))
        while not enough(0):
            clock.append(1)
        return len(clock)

    # 22 of the 24 seconds are for features and training.
    assert [seconds_of_features(seconds) for seconds in (0.0, 8.0, 1e9)] == [19, 15, 12]


def test_validation_equals_evaluate(done, tmp_path):
    options = {"train": None, "umap": False, "limit": None}
    evaluate_dual_run(done, "scenes:?split=test&count=6", out=tmp_path, device="cpu", **options)
    found = json.loads((tmp_path / "metrics.json").read_text())
    validated = [line for line in lines(done) if "valid/mean_r1" in line]
    best = max(validated, key=lambda line: line["valid/mean_r1"])
    names = [key.removeprefix("valid/") for key in best if key.startswith("valid/")]
    assert {key: best[f"valid/{key}"] for key in names} == {key: found[f"retrieval/{key}"] for key in names}


def test_embed_search_and_other_learners_take_the_run(done, tmp_path):
    embed_run(done, "scenes:?count=9", side="images", out=tmp_path / "index", workers=1, device="cpu")
    hits = Index(done, tmp_path / "index", device="cpu").search("a red circle", top=3)
    assert len(hits) == 3
    model = DualEncoder.from_pretrained(done)
    with torch.no_grad():
        assert open_image_encoder(done)(pixels()).shape == (3, model.image_tower_width)
        assert open_text_encoder(done)(TEXTS).shape == (2, model.text_tower_width)


def test_a_run_continues_with_its_towers_tuned(done, towers, tmp_path):
    run = small_run(towers, "clip-frozen", steps=1, tune="all", start=str(done))
    run.model.image_tower = run.model.text_tower = None
    run.optim.lr = 1e-4
    run.fit(tmp_path / "run", recipe="clip-frozen")
    old, new = (DualEncoder.from_pretrained(each).embed_texts(TEXTS) for each in (done, tmp_path / "run"))
    assert not torch.equal(old, new)
    torch.testing.assert_close(old, new, atol=0.1, rtol=0.1)


def test_settings_that_do_not_go_together_are_refused(towers, done, tmp_path):
    run = small_run(towers)
    run.model.text_tower = None
    with pytest.raises(UserError, match="belong together"):
        run.fit(tmp_path / "a", recipe="clip-frozen")
    with pytest.raises(UserError, match="--tokenizer is for new towers"):
        small_run(towers, tokenizer="some").fit(tmp_path / "a", recipe="clip-frozen")
    scratch = small_run((None, None), tune="all")
    with pytest.raises(UserError, match=r"--model\.tune and --model\.dropout are for pretrained towers"):
        scratch.fit(tmp_path / "a", recipe="clip-frozen")
    with pytest.raises(UserError, match="--start continues"):
        small_run(towers, start=str(done)).fit(tmp_path / "a", recipe="clip-frozen")


def test_unreadable_images_are_left_out(towers, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        image = np.full((16, 16, 3), 20 * number, np.uint8)
        Image.fromarray(image).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"grey of {number} parts")
    (folder / "05.png").write_bytes(b"<html>404</html>")
    data = PairsData(pairs=str(folder), max_skipped_share=0.1)
    for _ in range(2):  # the second time from the cache
        small_run(towers, data=data, steps=2).fit(tmp_path / "run", recipe="clip-frozen")
        assert "05.png" in (tmp_path / "run" / "skipped.jsonl").read_text()
        (tmp_path / "run" / "skipped.jsonl").unlink()
    (folder,) = (tmp_path / "run" / "features").glob("images-*")
    assert len(np.load(folder / "states.npy")) == 11
    assert np.load(folder / "rows.npy").tolist() == [0, 1, 2, 3, 4, *range(6, 12)]
