import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import as_torchrun
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import BertConfig, BertModel, BertTokenizer

from diptych.data.scenes import ScenesSource
from diptych.encoders import ScratchConfig, scratch_encoder
from diptych.errors import UserError
from diptych.io import load_network
from diptych.itit.data import DataConfig, open_data
from diptych.itit.evaluation import ALONE, EvaluateConfig, evaluate, evaluate_run
from diptych.itit.generation import GenerationConfig, ImageGenerationConfig, TextGenerationConfig
from diptych.itit.model import ITIT, SIZES, ItitConfig, mean_of_text
from diptych.itit.objective import ItitObjectiveConfig
from diptych.itit.pipeline import Diptych
from diptych.itit.recipes import itit_finetune_caption
from diptych.itit.training import NETWORK, ItitRun
from diptych.run_folder import write_config
from diptych.tokenizers.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from diptych.tokenizers.recipes import encoder_untrained, vqgan_tiny
from diptych.tokenizers.span_corruption import SpanCorruption, TextEncoderConfig
from diptych.tokenizers.text_encoder import TextEncoder
from diptych.tokenizers.training import TextEncoderRun, TextEncoderStage, TokenizerRun, TokenizerStage
from diptych.tokenizers.vqgan import VQGANConfig
from diptych.train import pace
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.pace import Budget, RunPlan

pytestmark = pytest.mark.filterwarnings("ignore:Covariance")
VALID = ScenesSource(split="test", count=6)
IMAGES = ImageGenerationConfig(steps=2, guidance=0.0, temperature=1.0)


def loop(steps: int, **changes) -> TrainConfig:
    fixed = {"checkpoint_every": 100, "eval_every": 100, "tensorboard": False, "quiet": True, "workers": 0}
    return TrainConfig(**{"steps": steps, "batch_size": 4, "device": "cpu", "precision": "fp32", **fixed, **changes})


def tiny_run(*, steps: int = 4, **data) -> ItitRun:
    """Three steps of either stage, four of the network."""
    optim = OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant")
    images = ImageTokenizerConfig(
        image_size=32, codebook_size=16, code_dim=4, widths=(8, 8), blocks=1, groups=4, patch=4
    )
    texts = replace(TextEncoderConfig.tiny(), width=16, layers=1, heads=2, feed_forward=16)
    network = {"width": 16, "depth": 1, "heads": 2, "image_decoder_depth": 1, "max_text_len": 16, "dropout": 0.1}
    network |= {"text_decoder_width": 16, "text_decoder_depth": 1, "text_decoder_heads": 2}
    return ItitRun(
        data=DataConfig(**{"pairs": "scenes:?count=40", "max_pairs": 10, "workers": 1, **data}),
        tokenizer_stage=TokenizerStage(
            model=images, objective=VQGANConfig(adversarial_weight=0.0), train=loop(3), optim=optim
        ),
        text_encoder_stage=TextEncoderStage(model=texts, max_text_len=20, train=loop(3), optim=optim),
        model=ItitConfig(**network),
        objective=ItitObjectiveConfig(cycle_start_step=1, image_generation=IMAGES),
        train=loop(steps, ema=0.9),
        optim=optim,
        generation=GenerationConfig(image=IMAGES, text=TextGenerationConfig(beams=2)),
    )


def tiny_run_without_dropout(tokenizers: str) -> ItitRun:
    run = tiny_run()
    model = replace(run.model, dropout=0.0)
    return replace(run, tokenizer=tokenizers, text_encoder=tokenizers, model=model)


def lines_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run) -> list[dict]:
    """Everything but times."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(run) if "loss" in line]


def contents(run) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, with validation; tests must not change it."""
    out = tmp_path_factory.mktemp("itit") / "run"
    result = tiny_run(valid="scenes:?split=test&count=6").fit(out, recipe="itit-tiny")
    assert (result.step, result.finished) == (4, True)
    return out


@pytest.fixture
def started(done, tmp_path):
    """The finished run's tokenizers and encoded data in a folder that has no network yet."""
    for part in ("tokenizer", "text_encoder", "encoded"):
        shutil.copytree(done / part, tmp_path / "run" / part)
    shutil.copy(done / "config.json", tmp_path / "run")
    return tmp_path / "run"


def test_a_run_folder_is_complete(done):
    expected = {"config.json", "tokenizer", "text_encoder", "model", "metrics.jsonl", "samples", "report.html"}
    assert expected <= {path.name for path in done.iterdir()}
    assert not list(done.rglob(".*"))
    config = json.loads((done / "config.json").read_text())
    assert config["recipe"] == "itit-tiny"
    assert config["data"].startswith("10 pairs (")
    assert config["run"]["data"]["max_pairs"] == 10
    assert config["run"]["generation"]["text"]["beams"] == 2
    assert {"diptych", "torch"} <= config["versions"].keys()
    assert [path.name for path in (done / "samples").iterdir()] == ["step-00000004.png"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory, scene_texts):
    """A small BERT that knows the words of the scenes, and some that they never show."""
    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = sorted({word for text in scene_texts for word in text.lower().split()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", *letters, *(f"##{c}" for c in letters), *words, "zebra", "quick"]
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_text_encoder(done: Path, name: Path, **model) -> ItitRun:
    run = tiny_run()
    return replace(run, tokenizer=str(done), text_encoder=str(name), model=replace(run.model, **model))


def test_a_run_with_another_text_encoder_than_t5(done, bert, tmp_path):
    run = with_text_encoder(done, bert, text_input="output_and_embeddings", whiten_text=True)
    run.fit(tmp_path / "run", recipe="itit-tiny")
    assert {"loss/t2i2t", "loss/i2t2i"} <= losses_of(tmp_path / "run")[-1].keys()
    with pytest.raises(UserError, match="begun with another text_encoder"):
        with_text_encoder(done, done).fit(tmp_path / "run", recipe="itit-tiny")
    before = contents(tmp_path / "run" / "text_encoder")
    result = replace(run, train=loop(5, ema=0.9)).fit(tmp_path / "run", recipe="itit-tiny")
    assert (result.step, contents(tmp_path / "run" / "text_encoder")) == (5, before)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    diptych = Diptych.from_pretrained(tmp_path / "moved", device="cpu")
    assert diptych.text_tokenizer.unknown_words(["zebra", "red"]) == ["zebra"], "the texts have no z"
    (caption,) = diptych.caption(VALID.image(0, 32))
    assert caption == " ".join(caption.split())
    assert len(diptych.cycle(text="a red ring", rounds=1)) == 3
    assert evaluate(diptych, VALID, EvaluateConfig()).metrics["images"] == 6
    again = with_text_encoder(done, tmp_path / "moved")
    again.fit(tmp_path / "again", recipe="itit-tiny")
    assert contents(tmp_path / "again" / "text_encoder") == contents(tmp_path / "moved" / "text_encoder")


def test_a_text_that_the_text_encoder_cannot_read_whole_is_told_first(bert, tmp_path):
    run = replace(tiny_run(), text_encoder=str(bert))
    with pytest.raises(UserError, match="max-text-len 24: the text encoder reads 23 tokens"):
        replace(run, model=replace(run.model, max_text_len=24)).fit(tmp_path / "run", recipe="itit-tiny")
    assert not (tmp_path / "run" / "stages").exists(), "nothing was trained before"


def test_two_processes_with_given_tokenizers_train_as_one(done, tmp_path):
    """Rank and world must be known before the first stage that has nothing to train."""
    command = as_torchrun.command(2, Path(__file__).with_name("run_itit.py"), tmp_path / "two", done)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    tiny_run_without_dropout(str(done)).fit(tmp_path / "one", recipe="itit-tiny")
    two, one = losses_of(tmp_path / "two"), losses_of(tmp_path / "one")
    assert [line["step"] for line in two] == [1, 2, 3, 4]
    for ours, alone in zip(two, one, strict=True):
        for name in alone.keys() - {"measure/i2t2i/distinct_captions"}:  # of the captions of one process
            assert ours[name] == pytest.approx(alone[name], rel=1e-4), name


def test_metrics_have_a_line_for_each_step_and_its_losses(done):
    lines = losses_of(done)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    always = {"loss/t2i", "loss/i2t", "loss/i2i"}
    cycles = {"loss/t2i2t", "loss/i2t2i"}
    assert always <= lines[0].keys()
    assert not cycles & lines[0].keys()
    assert always | cycles <= lines[1].keys()
    (valid,) = [line for line in lines_of(done) if "valid/caption_accuracy" in line]
    found = evaluate(Diptych.from_pretrained(done, device="cpu"), VALID, EvaluateConfig()).metrics
    scores = {name: value for name, value in found.items() if name != "images"}
    assert {name: valid[f"valid/{name}"] for name in scores} == scores
    assert valid["step"] == 4
    assert {"valid/cider", "valid/image_accuracy"} <= valid.keys()


def test_the_report_needs_nothing_else(done):
    report = (done / "report.html").read_text()
    for title in ("Samples", "A cycle", "Curves", "Validation", "Settings"):
        assert f">{title}</h2>" in report
    assert not re.search(r"""(src|href)\s*=\s*(["'](?!data:|#)|[^"'])""", report)
    assert not re.search(r"url\((?!data:|['\"]data:|#)|@import", report)
    assert "data.max_pairs = 10" in report


def test_the_folder_works_elsewhere(done, tmp_path):
    shutil.copytree(done, tmp_path / "copy", ignore=shutil.ignore_patterns("stages", "encoded", "checkpoints"))
    here, there = Diptych.from_pretrained(done), Diptych.from_pretrained(tmp_path / "copy")
    assert there.image_generation == IMAGES
    images = list(ScenesSource(count=3).images(range(3), 32))
    assert there.captions(images) == here.captions(images)
    np.testing.assert_array_equal(there.imagine_pixels(["a red circle"]), here.imagine_pixels(["a red circle"]))


def test_the_same_command_again_changes_nothing(done, tmp_path, monkeypatch):
    shutil.copytree(done, tmp_path / "run")
    before = contents(tmp_path / "run")

    def never(*args, **options):
        raise AssertionError("trained again")

    for name in (
        "tokenizers.training.VQGAN",
        "tokenizers.training.SpanCorruption",
        "itit.objective.ItitObjective.forward",
    ):
        monkeypatch.setattr(f"diptych.{name}", never)
    result = tiny_run(valid="scenes:?split=test&count=6").fit(tmp_path / "run", recipe="itit-tiny")
    assert (result.step, result.finished) == (4, True)
    after = contents(tmp_path / "run")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name] and name != "report.html"] == []


def test_going_on_is_the_uninterrupted_run_bit_for_bit(done, started):
    """More steps later, and a stop by the clock after each."""
    tiny_run(steps=2).fit(started, recipe="itit-tiny")
    hurried = tiny_run(steps=4)
    hurried.train = replace(hurried.train, max_seconds=1e-9)
    stopped = hurried.fit(started, recipe="itit-tiny")
    assert (stopped.step, stopped.finished) == (3, False)
    result = tiny_run(steps=4).fit(started, recipe="itit-tiny")
    assert (result.step, result.finished) == (4, True)
    assert losses_of(started) == losses_of(done)
    for part in ("model/model.safetensors", "model/config.json"):
        assert (started / part).read_bytes() == (done / part).read_bytes()


def test_without_validation_some_pairs_are_shown(started):
    tiny_run(steps=2).fit(started, recipe="itit-tiny")
    assert (started / "samples/step-00000002.png").stat().st_size > 0
    assert ">Validation</h2>" not in (started / "report.html").read_text()


def test_other_settings_are_refused(done, started):
    tiny_run(steps=2).fit(started, recipe="itit-tiny")
    other = tiny_run(steps=4)
    other.model = replace(other.model, width=32)
    with pytest.raises(UserError, match="trained with other settings: model") as caught:
        other.fit(started, recipe="itit-tiny")
    assert "\n" not in str(caught.value)
    before = (started / "config.json").read_bytes()
    with pytest.raises(UserError, match="encoded from other items"):
        tiny_run(max_pairs=11).fit(started, recipe="itit-tiny")
    assert (started / "config.json").read_bytes() == before


def test_a_run_keeps_the_tokenizers_it_began_with(started):
    before = (started / "config.json").read_bytes()
    borrowed, retrained = tiny_run(), tiny_run()
    borrowed.tokenizer = "elsewhere"
    stage = retrained.text_encoder_stage
    retrained.text_encoder_stage = replace(stage, model=replace(stage.model, width=32))
    for other, part in ((borrowed, "tokenizer"), (retrained, "text_encoder")):
        with pytest.raises(UserError, match=f"begun with another {part}"):
            other.fit(started, recipe="itit-tiny")
    assert (started / "config.json").read_bytes() == before


def test_a_run_that_was_killed_while_it_encoded_keeps_its_tokenizers(done, tmp_path, monkeypatch):
    def killed(*_args, **_settings):
        raise KeyboardInterrupt

    run = tiny_run_without_dropout(str(done))
    monkeypatch.setattr("diptych.itit.training.encode_subset", killed)
    for tokenizer in (
        str(tmp_path / "nowhere"),
        str(done),
    ):  # a mistaken name may be corrected: no tokenizer is there yet
        with pytest.raises((UserError, KeyboardInterrupt)):
            replace(run, tokenizer=tokenizer).fit(tmp_path / "run", recipe="itit-tiny")
    with pytest.raises(UserError, match="begun with another tokenizer"):
        replace(run, tokenizer=None).fit(tmp_path / "run", recipe="itit-tiny")


def test_a_run_folder_of_another_kind_is_refused(tmp_path):
    write_config(tmp_path, recipe="vqgan-tiny", run=vqgan_tiny())
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds a run of the kind 'tokenizer': train into another folder"):
        tiny_run().fit(tmp_path, recipe="itit-tiny")
    assert contents(tmp_path) == before


def test_only_the_seed_decides_the_first_weights(done):
    run = tiny_run()
    inputs = run.prepare(done)
    first, again = run.build(inputs), run.build(inputs)
    assert all((a == b).all() for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    run.train = replace(run.train, seed=1)
    other = run.build(inputs)
    assert (first.model.word_embedding.weight != other.model.word_embedding.weight).any()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_text_encoder_has_the_precision_of_the_training(done, tmp_path, precision, dtype):
    shutil.copytree(done, tmp_path / "run")
    run = tiny_run()
    run.train = replace(run.train, precision=precision)
    encoder = run.prepare(tmp_path / "run").text_encoder
    assert {value.dtype for value in encoder.parameters()} == {dtype}
    assert contents(tmp_path / "run" / "encoded") == contents(done / "encoded"), "features are stored as before"
    assert contents(tmp_path / "run" / "text_encoder") == contents(done / "text_encoder")


def test_an_earlier_run_lends_its_tokenizers(done, tmp_path):
    run = tiny_run(steps=2)
    run.tokenizer, run.text_encoder = str(done), str(done / "text_encoder")
    run.fit(tmp_path / "run", recipe="itit-tiny")
    assert not (tmp_path / "run/stages").exists()
    for part in ("tokenizer", "text_encoder"):
        weights = [next((folder / part).glob("*.safetensors")).read_bytes() for folder in (done, tmp_path / "run")]
        assert weights[0] == weights[1]


def test_the_two_sides_are_encoded_without_the_other(done):
    made = {name: json.loads((done / "encoded" / name / "store.json").read_text()) for name in ("pairs", "images")}
    assert set(made["pairs"]["arrays"]) == {"tokens", "ids", "counts", "features"}
    assert set(made["images"]["arrays"]) == {"tokens"}
    texts = json.loads((done / "encoded/texts/store.json").read_text())
    assert set(texts["arrays"]) == {"ids", "counts", "features"}
    assert [made["pairs"]["items"], made["images"]["items"], texts["items"]] == [10, 15, 15]


def test_cycles_must_begin_before_the_end():
    with pytest.raises(UserError, match=r"--objective\.cycle-start-step 1 is not before --train\.steps 1"):
        tiny_run(steps=1).check()
    alone = tiny_run(steps=1)
    alone.objective = replace(alone.objective, texts="off", images="off")
    alone.check()


def test_a_stage_on_its_own(tmp_path):
    run = tiny_run()
    images = TokenizerRun(images="scenes:?count=12", stage=run.tokenizer_stage)
    images.fit(tmp_path / "images", recipe="vqgan-tiny")
    assert ImageTokenizer.from_pretrained(tmp_path / "images/tokenizer").codebook_size == 16
    texts = TextEncoderRun(texts="scenes:?count=12", stage=run.text_encoder_stage)
    texts.fit(tmp_path / "texts", recipe="text-encoder-tiny")
    assert TextEncoder.from_pretrained(tmp_path / "texts/text_encoder").width == 16
    assert json.loads((tmp_path / "texts/config.json").read_text())["recipe"] == "text-encoder-tiny"


def test_a_stage_without_its_side_is_refused(tmp_path):
    (tmp_path / "texts.txt").write_text("bread\n")
    with pytest.raises(UserError, match="has no images to train a tokenizer on"):
        TokenizerRun(images=str(tmp_path / "texts.txt")).fit(tmp_path / "out", recipe="vqgan-tiny")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"")
    with pytest.raises(UserError, match="has no texts to train a text encoder on"):
        TextEncoderRun(texts=str(tmp_path / "photos")).fit(tmp_path / "out", recipe="text-encoder-tiny")
    assert not (tmp_path / "out").exists()


def test_the_best_weights_are_kept_and_training_ends_without_better_ones(started, monkeypatch, capsys):
    """The second validation is the best; two without a better one end the run."""
    values = {1: 1.0, 2: 9.0, 3: 2.0, 4: 9.0}
    seen = {}

    def scored(samples, step, objective):
        seen[step] = objective.model.image_bias.detach().clone()
        return {"valid/cider": values[step]}

    monkeypatch.setattr("diptych.itit.validation.Samples.run", scored)
    run = tiny_run(steps=8, valid="scenes:?split=test&count=6")
    run = replace(run, patience=2, train=replace(run.train, eval_every=1))
    result = run.fit(started, recipe="itit-tiny")
    assert (result.step, result.finished) == (4, True)
    np.testing.assert_array_equal(Diptych.from_pretrained(started, device="cpu").model.image_bias.detach(), seen[2])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "best after step 2, cider 9 on scenes:?split=test&count=6" in last
    assert f"report: {started}/report.html; next: diptych evaluate {started}" in last


def test_a_score_that_is_not_there_is_named(started):
    run = replace(tiny_run(valid="scenes:?split=test&count=6"), select="clip_score")
    with pytest.raises(UserError, match="--select clip_score: no score of that name; there are cider"):
        run.fit(started, recipe="itit-tiny")


def test_a_run_is_compared_with_its_baselines_and_with_the_pairs_alone(started, capsys):
    """This network has learned nothing, so that the consensus caption is better, and the first line says so."""
    run = tiny_run(valid="scenes:?split=test&count=6")
    run = replace(run, compare="pairs-only", objective=replace(run.objective, cycle_start_step=1))
    assert run.fit(started, recipe="itit-tiny").finished
    found = json.loads((started / "baselines.json").read_text())
    names = [row[0] for row in found["rows"]]
    assert names[:3] == ["this run", "most frequent caption", "consensus of all captions"]
    assert names[3:] == ["consensus of the 10 nearest by colour and gradient histograms", ALONE]
    assert found["verdict"].startswith("The run loses to a baseline: cider ")
    page = (started / "report.html").read_text()
    (lead,) = [line for line in page.splitlines() if 'class="lead"' in line]
    assert "The run loses to a baseline: cider " in lead
    assert found["verdict"] in capsys.readouterr().out
    ours = next(line for line in reversed(lines_of(started)) if "valid/cider" in line)
    assert found["scores"]["cider"] == ours["valid/cider"]
    config = json.loads((started / "pairs_only" / "config.json").read_text())["run"]
    assert (config["objective"]["texts"], config["objective"]["images"]) == ("off", "off")
    weights = contents(started / "pairs_only" / "model")

    evaluate_run(started, VALID, EvaluateConfig(beams=2), features=None, out=started / "scores", device="cpu")
    metrics = json.loads((started / "scores" / "metrics.json").read_text())
    assert metrics["baselines"].keys() == set(names[1:])
    for name in ("most frequent caption", "consensus of all captions", ALONE):
        known = next(row for row in found["rows"] if row[0] == name)
        assert metrics["baselines"][name]["cider"] == pytest.approx(known[1])
    run.fit(started, recipe="itit-tiny")
    assert contents(started / "pairs_only" / "model") == weights


def test_baselines_of_a_run_whose_pairs_are_gone(started):
    tiny_run().fit(started, recipe="itit-tiny")
    config = json.loads((started / "config.json").read_text())
    config["run"]["data"]["pairs"] = "gone/"
    (started / "config.json").write_text(json.dumps(config))
    evaluate_run(started, VALID, EvaluateConfig(beams=1), features=None, out=started / "scores", device="cpu")
    metrics = json.loads((started / "scores" / "metrics.json").read_text())
    assert metrics["baselines"] == {}
    assert metrics["notes"][-1].startswith("No baselines from the pairs: gone")


def test_a_comparison_needs_unpaired_data_and_validation():
    with pytest.raises(UserError, match=r"--compare pairs-only: the run has no --data\.valid"):
        replace(tiny_run(), compare="pairs-only").check()
    run = tiny_run(valid="scenes:?split=test&count=6").pairs_only()
    with pytest.raises(UserError, match="--compare pairs-only: the run has no unpaired data"):
        replace(run, compare="pairs-only").check()


# A pretrained image encoder


@pytest.fixture
def image_encoder(tmp_path) -> str:
    scratch_encoder(ScratchConfig(image_size=16, width=24, depth=1), seed=0).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_captions_are_read_from_a_pretrained_encoder(tmp_path, image_encoder):
    out = tmp_path / "run"
    run = replace(tiny_run(steps=3), image_encoder=image_encoder, compare="pairs-only")
    run.data.valid = "scenes:?split=test&count=6"
    assert run.fit(out, recipe="tiny").finished
    shutil.rmtree(image_encoder)  # the run folder needs nothing outside it
    diptych = Diptych.from_pretrained(out)
    assert diptych.image_size == 32
    images = VALID.images(range(4), 32)
    encoded = diptych.encode(images)
    assert encoded.image_features_BG.shape == (4, 24)
    assert diptych.caption(list(images)) == [found.text for found in diptych.caption_encoded(encoded)]
    # Captions do not depend on the image tokens any more.
    other = replace(encoded, tokens_BN=encoded.tokens_BN.roll(1, 0))
    assert diptych.caption_encoded(other) == diptych.caption_encoded(encoded)
    assert Diptych.from_pretrained(out / "pairs_only").image_encoder is not None
    with pytest.raises(UserError, match=r"--visible 0\.5: .* reads captions from features"):
        Diptych.from_pretrained(out, visible=0.5)
    baselines = json.loads((out / "baselines.json").read_text())
    assert any(image_encoder in each["name"] for each in baselines["baselines"])


def test_a_run_keeps_its_image_encoder(tmp_path, image_encoder):
    out = tmp_path / "run"
    run = replace(tiny_run(steps=2), image_encoder=image_encoder)
    run.fit(out, recipe="tiny")
    with pytest.raises(UserError, match="begun with another image_encoder"):
        replace(run, image_encoder=None).fit(out, recipe="tiny")
    before = contents(out / "encoded")
    replace(run, train=replace(run.train, steps=3)).fit(out, recipe="tiny")
    assert contents(out / "encoded") == before


def test_captions_that_agree_with_the_features_come_first(tmp_path, image_encoder):
    """The regression decides among the candidates where its weight is large; without one, the score does."""
    out = tmp_path / "run"
    replace(tiny_run(steps=2), image_encoder=image_encoder).fit(out, recipe="tiny")
    diptych = Diptych.from_pretrained(out)
    images = diptych.encode(VALID.images(range(6), 32))
    by_score = diptych.candidates_encoded(images, count=4)
    assert [found[0] for found in by_score] == diptych.caption_encoded(images, beams=4)
    diptych.text_generation = replace(diptych.text_generation, agreement=1000.0)
    ranked = diptych.candidates_encoded(images, count=4)
    assert [found[0] for found in ranked] == diptych.caption_encoded(images, beams=4)
    reader, length = diptych.model.image_features, diptych.model.config.max_text_len
    for row, found in enumerate(ranked):
        assert {each.text for each in found} == {each.text for each in by_score[row]}
        ids_BL, valid_BL = diptych.text_encoder.tokenize([each.text for each in found], length=length)
        features_BG = images.image_features_BG[row].expand(len(found), -1)
        agreement = reader.agreement(features_BG, diptych.text_encoder.features(ids_BL, valid_BL), valid_BL)
        assert (agreement.diff() <= 1e-3).all()


def test_captions_like_those_of_near_images_come_first(tmp_path, image_encoder):
    out, run = tmp_path / "run", replace(tiny_run(steps=2), image_encoder=image_encoder)
    run.generation.text = replace(run.generation.text, beams=4, consensus=1000.0)
    run.fit(out, recipe="tiny")
    pairs = open_data(run.data).pairs
    diptych = Diptych.from_pretrained(out)
    near = diptych.near_captions
    assert near.captions == [pairs.source.captions(int(item)) for item in pairs.items]
    texts = open_data(run.data).texts
    assert near.texts == [text for item in texts.items for text in texts.source.captions(int(item))]
    ids_BL, valid_BL = diptych.text_encoder.tokenize(near.texts, length=diptych.model.config.max_text_len)
    means_BF = mean_of_text(diptych.text_encoder.features(ids_BL, valid_BL), valid_BL)
    expected_BG = diptych.model.image_features.expected(means_BF).numpy()
    assert np.allclose(near.expected_UF, expected_BG, rtol=2e-3, atol=2e-3)
    images = diptych.encode(VALID.images(range(6), 32))
    ranked = diptych.candidates_encoded(images, count=4)
    assert [found[0] for found in ranked] == diptych.caption_encoded(images)
    features_BG = images.image_features_BG.numpy()
    for each in near.similarity(features_BG, [[one.text for one in found] for found in ranked]):
        assert each == sorted(each, reverse=True)
    diptych.text_generation = replace(diptych.text_generation, consensus=0.0)
    by_score = diptych.candidates_encoded(images, count=4)
    assert [{one.text for one in found} for found in by_score] == [{one.text for one in found} for found in ranked]
    assert by_score != ranked
    alone = replace(run, objective=replace(run.objective, texts="off"), tokenizer=str(out), text_encoder=str(out))
    alone.fit(tmp_path / "alone", recipe="tiny")
    assert not Diptych.from_pretrained(tmp_path / "alone").near_captions.texts  # pairs alone use nothing else
    (out / "near_captions" / "captions.json").unlink()
    with pytest.raises(UserError, match="near_captions: cannot be read"):
        Diptych.from_pretrained(out)


# A frozen teacher of the encoder


def test_a_teacher_is_cached_resumed_and_dropped(done, tmp_path, image_encoder):
    out, run = tmp_path / "run", replace(tiny_run(), tokenizer=str(done), text_encoder=str(done), teacher=image_encoder)
    run.fit(out, recipe="itit-tiny")
    taught = losses_of(out)
    assert all(-1 <= line["loss/teacher"] <= 1 for line in taught)
    for subset in ("pairs", "images"):
        assert np.load(out / "encoded" / subset / "teacher_features.npy").shape[1] == 24
        tokens = [np.load(folder / "encoded" / subset / "tokens.npy") for folder in (out, done)]
        assert np.array_equal(*tokens)  # reading images once more for the teacher changes no token
    assert not (out / "encoded" / "texts" / "teacher_features.npy").exists()
    assert not any("teacher" in name for name in load_file(out / "model" / "model.safetensors"))
    shutil.rmtree(image_encoder)  # the run folder needs nothing outside it
    halves, checkpoints = tmp_path / "halves", out / "checkpoints"
    shutil.copytree(out, halves)
    shutil.rmtree(halves / "checkpoints")
    replace(run, train=replace(run.train, steps=2)).fit(halves, recipe="itit-tiny")
    run.fit(halves, recipe="itit-tiny")
    ended = [
        load_file(next(folder.glob("step-00000004")) / "model.safetensors")
        for folder in (checkpoints, halves / "checkpoints")
    ]
    assert any("teacher_head" in name for name in ended[0])
    assert all(np.array_equal(ended[0][name], ended[1][name]) for name in ended[0])
    shutil.rmtree(out / "stages" / "teacher")  # nothing of it is needed to caption
    assert Diptych.from_pretrained(out).caption(list(VALID.images(range(2), 32)))
    with pytest.raises(UserError, match="begun with another teacher"):
        replace(run, teacher=None).fit(halves, recipe="itit-tiny")


def test_without_a_teacher_a_run_is_what_it_was(done, tmp_path):
    """Against the weights of a run of the same settings whose loss weight of the absent teacher differs."""
    run = replace(tiny_run(valid="scenes:?split=test&count=6"), tokenizer=str(done), text_encoder=str(done))
    run.objective.weights.teacher = 3.0
    run.fit(tmp_path / "run", recipe="itit-tiny")
    first, second = losses_of(done), losses_of(tmp_path / "run")
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    run.objective.weights.teacher = 0.0
    with pytest.raises(UserError, match="--teacher teaches nothing"):
        replace(run, teacher="vit").check()


def test_captions_are_fine_tuned_from_the_weights_of_a_run(done, tmp_path, capsys):
    asked = itit_finetune_caption()
    run = replace(
        asked, init=str(done), data=tiny_run().data, train=loop(4), optim=replace(asked.optim, warmup_steps=0)
    )
    assert run.fit(tmp_path / "tuned", recipe="itit-finetune-caption").finished
    before, after = (load_network(ITIT, folder / "model") for folder in (done, tmp_path / "tuned"))
    assert after.config == replace(before.config, dropout=run.model.dropout)
    assert any(not value.equal(before.state_dict()[name]) for name, value in after.state_dict().items())
    assert {name for line in losses_of(tmp_path / "tuned") for name in line if name.startswith("loss/")} == {"loss/i2t"}
    for part in ("tokenizer", "text_encoder"):
        (weights,) = (done / part).glob("*.safetensors")
        assert (tmp_path / "tuned" / part / weights.name).read_bytes() == weights.read_bytes()
    # Training begins with the weights of the run, not with new ones.
    inputs = run.with_parts_of(done).prepare(tmp_path / "tuned")
    objective = run.with_parts_of(done).build(inputs)
    for name, value in objective.model.state_dict().items():
        assert value.equal(before.state_dict()[name])


def test_a_run_that_begins_with_the_weights_of_another_may_have_a_teacher(done, tmp_path, image_encoder):
    run = replace(tiny_run(), init=str(done), teacher=image_encoder).with_parts_of(done)
    objective = run.build(run.prepare(tmp_path / "tuned"))
    assert objective.teacher_head is not None
    before = load_network(ITIT, done / "model").state_dict()
    assert all(value.equal(before[name]) for name, value in objective.model.state_dict().items())


def test_fine_tuning_needs_a_finished_run(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        replace(itit_finetune_caption(), init=str(tmp_path), data=tiny_run().data).fit(tmp_path / "out", recipe="x")


def test_a_budget_too_short_for_the_network_takes_a_smaller_one(tmp_path, monkeypatch, capsys):
    large = replace(tiny_run(), model=replace(SIZES["small"], max_text_len=16), train=loop(1000))
    seconds = {"row": 0.1}
    monkeypatch.setattr(
        pace, "training_seconds", lambda run, _: run.train.steps * run.train.batch_size * seconds["row"]
    )

    def fitting(run: ItitRun, minutes: float, out: Path) -> ItitRun:
        out.mkdir(exist_ok=True)
        plan = RunPlan(
            [cost for cost in run.costs() if cost.name == NETWORK], budget=Budget.of_run(out, Budget(minutes))
        )
        return run._with_affordable_network(tiny_run().ready, plan)

    assert fitting(large, 3.0, tmp_path / "enough") is large  # 400 steps of 4 rows take 160 seconds
    assert capsys.readouterr().err == ""
    small = fitting(large, 2.0, tmp_path / "short").model
    assert "fewer than 400 steps on 4 rows fit into --minutes 2: a network as small as" in capsys.readouterr().err
    assert (small.width, small.depth, small.image_decoder_depth, small.text_decoder_width) == (128, 1, 2, 128)
    assert (small.max_text_len, small.text_input) == (large.model.max_text_len, large.model.text_input)
    given = replace(large, init="runs/other")
    assert fitting(given, 2.0, tmp_path / "given") is given
    seconds["row"] = 0.0  # what was decided holds when the run goes on
    assert fitting(large, 2.0, tmp_path / "short").model == small


def test_a_short_budget_scores_few_validation_images(capsys):
    run = tiny_run(valid="scenes:?split=test&count=200")
    assert [run._with_fewer_valid_images(minutes).data.valid_images for minutes in (0.5, 2, 20)] == [16, 32, 128]
    assert "validation: 32 of 128 images fit into the budget" in capsys.readouterr().out
    assert replace(run, data=replace(run.data, valid=None))._with_fewer_valid_images(2).data.valid_images == 128


def test_a_text_encoder_of_no_steps_keeps_its_first_weights(tmp_path):
    stage = encoder_untrained()
    encoder = stage.fit(["a red circle", "a blue star above a green ring"] * 4, tmp_path)
    first = SpanCorruption(encoder.tokenizer, config=stage.model, seed=stage.train.seed).text_encoder()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["text_encoder.json"]
