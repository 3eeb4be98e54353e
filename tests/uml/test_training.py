import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from diptych.data.pixels import decode_files
from diptych.data.scenes import ScenesSource
from diptych.data.sources import open_source
from diptych.data.splits import Labelled
from diptych.encoders import ScratchConfig, open_image_encoder, scratch_encoder
from diptych.errors import UserError
from diptych.nn.inference import eval_mode
from diptych.registry import RECIPES
from diptych.run_folder import kind_of
from diptych.train.config import OptimConfig
from diptych.train.pace import Budget
from diptych.uml.classifier import Classifier, evaluate_classifier_run
from diptych.uml.data import read_features
from diptych.uml.recipes import uml_finetune, uml_probe
from diptych.uml.training import UmlData

TINY = ScratchConfig(image_size=16, patch=4, width=24, depth=1, heads=2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder of rings and squares, 12 each; a folder of texts about them."""
    root, source = tmp_path_factory.mktemp("dataset"), ScenesSource(count=200)
    for shape in ("ring", "square"):
        (root / "images" / shape).mkdir(parents=True)
        items = [i for i in range(200) if source.label(i) == shape][:12]
        for i in items:
            Image.fromarray(source.image(i, 16)).save(root / "images" / shape / f"{i}.png")
    (root / "texts").mkdir()
    (root / "texts" / "ring.txt").write_text("it is round\na disc\n")
    (root / "texts" / "square.txt").write_text("it has four corners\n")
    return root


@pytest.fixture(scope="module")
def encoders(dataset, text_encoder):
    scratch_encoder(TINY, seed=0).save_pretrained(dataset / "encoder")
    text_encoder.save_pretrained(dataset / "text_encoder")
    return {"encoder": str(dataset / "encoder"), "text_encoder": str(dataset / "text_encoder")}


def small(run, dataset, encoders, **changes):
    data = UmlData(images=str(dataset / "images"), texts=str(dataset / "texts"), valid_share=0.25)
    train = replace(
        run.train,
        steps=12,
        batch_size=8,
        eval_every=4,
        checkpoint_every=6,
        workers=0,
        quiet=True,
        device="cpu",
        tensorboard=False,
    )
    optim = OptimConfig(lr=1e-2, warmup_steps=2, max_grad_norm=None)
    return replace(run, **{**encoders, "data": data, "train": train, "optim": optim, "scratch": TINY, **changes})


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_not_resumed_with_other_images(dataset, encoders, tmp_path):
    shutil.copytree(dataset / "images", tmp_path / "images")
    run = small(uml_probe(), dataset, encoders)
    run.data.images = str(tmp_path / "images")
    run.fit(tmp_path / "run", recipe="uml-probe")
    Image.new("RGB", (9, 9)).save(sorted((tmp_path / "images" / "ring").iterdir())[0])
    with pytest.raises(UserError, match="its data have changed"):
        run.fit(tmp_path / "run", recipe="uml-probe")


def test_a_run_is_not_resumed_with_other_labels(dataset, encoders, tmp_path):
    run = small(uml_probe(), dataset, encoders)
    run.fit(tmp_path / "run", recipe="uml-probe")
    run.data.shots = 2
    with pytest.raises(UserError, match=r"settings: labels\.image \('[0-9a-f]{16}' then, '[0-9a-f]{16}' now\)\. "):
        run.fit(tmp_path / "run", recipe="uml-probe")


def test_a_probe_leaves_a_run_that_classifies_without_texts(dataset, encoders, tmp_path):
    run = small(uml_probe(), dataset, encoders)
    assert run.fit(tmp_path / "run", recipe="uml-probe").finished
    assert kind_of(tmp_path / "run") == "classifier"
    files = sorted((dataset / "images" / "ring").iterdir())[:3]
    classifier = Classifier.from_pretrained(str(tmp_path / "run"), device="cpu")
    found = classifier.predictions(decode_files(files, size=classifier.image_size), top=2)
    assert [{guess.name for guess in predictions} for predictions in found] == [{"ring", "square"}] * 3
    assert all(sum(g.probability for g in predictions) == pytest.approx(1) for predictions in found)
    assert all(predictions[0].probability >= predictions[1].probability for predictions in found)

    assert classifier.predictions([str(file) for file in files], top=2) == found
    assert classifier.predictions(files[0])[0] == found[0][:1]

    source = open_source(str(dataset / "images"))
    metrics = evaluate_classifier_run(tmp_path / "run", source, out=tmp_path / "scores", device="cpu")
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text()) == metrics
    assert metrics["images"] == 24
    assert metrics["accuracy"] == pytest.approx(np.mean(list(metrics["per_class"].values())))
    guessed = [predictions[0].name for predictions in found]
    assert metrics["per_class"]["ring"] >= guessed.count("ring") / 12


@pytest.mark.parametrize("recipe", [uml_probe, uml_finetune])
def test_validation_equals_evaluate(recipe, dataset, encoders, tmp_path):
    """With an image that cannot be read: its place is taken by no other."""
    valid = tmp_path / "valid"
    shutil.copytree(dataset / "images", valid)
    broken = sorted((valid / "ring").iterdir())[0]
    broken.write_bytes(b"<html>404</html>")
    run = small(recipe(), dataset, encoders)
    run = replace(run, data=replace(run.data, valid=str(valid), max_skipped_share=0.05))
    run.fit(tmp_path / "run", recipe="uml")
    best = json.loads((tmp_path / "run" / "best" / "scores.json").read_text())
    step = max(best, key=lambda score: (score["value"], score["tie_break"]))["step"]
    (last,) = [line for line in lines(tmp_path / "run") if "valid/loss" in line and line["step"] == step]
    found = evaluate_classifier_run(
        tmp_path / "run", open_source(str(valid)), out=tmp_path / "scores", device="cpu", max_skipped_share=0.05
    )
    for name in ("accuracy", "mean_class_accuracy", "loss"):
        assert last[f"valid/{name}"] == found[name]
    assert (found["images"], found["skipped"]) == (23, 1)
    for listed in (tmp_path / "run" / "skipped_valid.jsonl", tmp_path / "scores" / "skipped.jsonl"):
        assert broken.name in listed.read_text()


def test_codes_are_told(dataset, encoders, tmp_path, capsys):
    for shape, code in (("ring", "n01440764"), ("square", "n01443537")):
        shutil.copytree(dataset / "images" / shape, tmp_path / "images" / code)
    run = small(uml_probe(), dataset, encoders)
    run = replace(run, data=replace(run.data, images=str(tmp_path / "images"), texts=None))
    run.fit(tmp_path / "run", recipe="uml-probe")
    assert "the labels are codes (n01440764, n01443537)" in capsys.readouterr().err


def test_the_frozen_encoder_is_as_it_was_and_its_features_are_made_once(dataset, encoders, tmp_path, monkeypatch):
    run = small(uml_probe(), dataset, encoders)
    run = replace(run, data=replace(run.data, cache=tmp_path / "cache"))
    run.fit(tmp_path / "run", recipe="uml-probe")
    before, after = open_image_encoder(encoders["encoder"]), open_image_encoder(tmp_path / "run" / "encoder")
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new)

    def refuse(*arguments, **options):
        raise AssertionError("an image was read again")

    monkeypatch.setattr("diptych.uml.data.image_batches", refuse)
    run.fit(tmp_path / "again", recipe="uml-probe")
    assert lines(tmp_path / "again")[-1]["valid/accuracy"] == lines(tmp_path / "run")[-1]["valid/accuracy"]


def test_a_resumed_probe_is_the_uninterrupted_one(dataset, encoders, tmp_path):
    run = small(uml_probe(), dataset, encoders)
    run = replace(run, optim=replace(run.optim, schedule="constant"))
    run.fit(tmp_path / "whole", recipe="uml-probe")
    # Cut where both validate: a further validation could be the best one.
    replace(run, train=replace(run.train, steps=8)).fit(tmp_path / "cut", recipe="uml-probe")
    run.fit(tmp_path / "cut", recipe="uml-probe")
    scores = [json.loads((tmp_path / name / "best" / "scores.json").read_text()) for name in ("whole", "cut")]
    assert scores[1] == scores[0]
    whole, resumed = (Classifier.from_pretrained(tmp_path / name, device="cpu").head for name in ("whole", "cut"))
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_patience_ends_the_run(dataset, encoders, tmp_path):
    """A rate of nearly nothing never finds better weights than those of the first validation."""
    run = replace(small(uml_probe(), dataset, encoders), patience=1)
    run = replace(run, optim=replace(run.optim, lr=1e-30), train=replace(run.train, eval_every=2))
    result = run.fit(tmp_path / "run", recipe="uml-probe")
    assert (result.step, result.finished) == (4, True)
    assert (tmp_path / "run" / "head").is_dir()


def test_one_shot_with_a_large_batch(dataset, encoders, tmp_path):
    run = small(uml_probe(), dataset, encoders)
    run = replace(run, data=replace(run.data, shots=1), train=replace(run.train, batch_size=32))
    assert run.fit(tmp_path / "run", recipe="uml-probe").step == 12
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run") if "loss" in line)


def test_fine_tuning_trains_the_encoder_and_keeps_its_format(dataset, encoders, tmp_path):
    run = small(uml_finetune(), dataset, encoders)
    run.fit(tmp_path / "run", recipe="uml-finetune")
    before, after = open_image_encoder(encoders["encoder"]), open_image_encoder(tmp_path / "run" / "encoder")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    metrics = evaluate_classifier_run(
        tmp_path / "run", open_source(str(dataset / "images")), out=tmp_path / "scores", device="cpu"
    )
    assert 0 <= metrics["accuracy"] <= 1
    again = small(uml_probe(), dataset, encoders | {"encoder": str(tmp_path / "run")})
    assert again.fit(tmp_path / "probe", recipe="uml-probe").finished  # a run's encoder may serve another run


def test_a_new_encoder_is_trained_from_nothing(dataset, encoders, tmp_path):
    run = small(uml_finetune(), dataset, encoders | {"encoder": "scratch"})
    run.fit(tmp_path / "run", recipe="uml-finetune")
    found = Classifier.from_pretrained(tmp_path / "run", device="cpu")
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with eval_mode(found.encoder):
        assert found.encoder(pixels).shape == (1, 24)


def test_mistakes_are_told_before_anything_is_computed(dataset, encoders, tmp_path):
    with pytest.raises(UserError, match="has learnt nothing"):
        small(uml_probe(), dataset, encoders | {"encoder": "scratch"}).fit(tmp_path / "run", recipe="uml-probe")
    tuned = small(uml_finetune(), dataset, encoders)
    with pytest.raises(UserError, match="centred needs features that stay"):
        replace(tuned, head=replace(tuned.head, features="centred")).check()
    (tmp_path / "t.csv").write_text("image,label\n" + "".join(f"{i}.png,cat\n" for i in range(4)))
    for i in range(4):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    one = small(uml_probe(), dataset, encoders)
    with pytest.raises(UserError, match="all images are of the class 'cat'; a classifier needs two"):
        replace(one, data=replace(one.data, images=str(tmp_path / "t.csv"))).fit(tmp_path / "run", recipe="uml-probe")
    with pytest.raises(UserError, match="no run folder"):
        Classifier.from_pretrained(tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_recipes_are_listed():
    assert {"uml-probe", "uml-finetune"} <= RECIPES.keys()


def test_a_budget_takes_fewer_images_of_each_class_where_their_features_take_too_long(
    dataset, encoders, tmp_path, monkeypatch, capsys
):
    run = small(uml_probe(), dataset, encoders)
    monkeypatch.setattr("diptych.uml.training._FEATURES_SHARE", 1e-9)
    run.fit(tmp_path / "run", recipe="uml-probe", budget=Budget(1.0))
    decided = json.loads((tmp_path / "run/budget.json").read_text())["decisions"]
    assert decided["features"] < 0.01
    assert "of the images fit into --minutes 1" in capsys.readouterr().out
    labelled = Labelled.of(open_source(str(dataset / "images")))
    kept = run._some(labelled, np.arange(24), 0.5)
    assert np.bincount(labelled.labels_N[kept]).tolist() == [6, 6]
    assert (tmp_path / "run/classes.json").is_file()


def test_a_probe_is_compared_with_logistic_regression(dataset, encoders, tmp_path, capsys):
    """One step with a rate near zero learns nothing, so that the regression is better, and the first line says so."""
    run = small(uml_probe(), dataset, encoders)
    train = replace(run.train, steps=1, eval_every=1)
    run = replace(run, train=train, optim=replace(run.optim, lr=1e-9))
    run.fit(tmp_path / "run", recipe="uml-probe")
    found = json.loads((tmp_path / "run" / "baselines.json").read_text())
    names = [row[0] for row in found["rows"]]
    assert names == [
        "this run",
        "chance",
        "logistic regression on the same features",
        "logistic regression on colour and gradient histograms",
    ]
    assert found["verdict"].startswith("The run loses to a baseline: accuracy ")
    page = (tmp_path / "run" / "report.html").read_text()
    (lead,) = [line for line in page.splitlines() if 'class="lead"' in line]
    assert "The run loses to a baseline: accuracy " in lead
    assert found["verdict"] in capsys.readouterr().out

    # Where the images are those that were selected on, evaluate has the same numbers.
    labelled = Labelled.of(open_source(str(dataset / "images")))
    valid = tmp_path / "valid"
    for item in run._split(labelled, 1.0).valid:
        file = labelled.source.key(int(item))
        (valid / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(dataset / "images" / file, valid / file)
    scores = evaluate_classifier_run(tmp_path / "run", open_source(str(valid)), out=tmp_path / "scores", device="cpu")
    assert scores["verdict"] == found["verdict"]
    for each in found["baselines"]:
        assert scores["baselines"][each["name"]] == pytest.approx(each["scores"])


def test_a_tuned_encoder_is_compared_with_histograms(dataset, encoders, tmp_path):
    run = small(uml_finetune(), dataset, encoders)
    run.fit(tmp_path / "run", recipe="uml-finetune")
    names = [each["name"] for each in json.loads((tmp_path / "run" / "baselines.json").read_text())["baselines"]]
    assert names == ["chance", "logistic regression on colour and gradient histograms"]
    (tmp_path / "run" / "baselines.safetensors").unlink()
    source = open_source(str(dataset / "images"))
    scores = evaluate_classifier_run(tmp_path / "run", source, out=tmp_path / "scores", device="cpu")
    assert scores["baselines"] == {}
    assert any("older Diptych" in note for note in scores["notes"])


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_features_from_a_file_train_as_those_that_are_computed(kind, dataset, encoders, tmp_path):
    run = small(uml_probe(), dataset, encoders)
    run.fit(tmp_path / "computed", recipe="uml-probe")
    source, encoder = open_source(str(dataset / "images")), open_image_encoder(encoders["encoder"])
    files = [dataset / "images" / source.key(item) for item in range(len(source))]
    with eval_mode(encoder):
        vectors = encoder(decode_files(files, size=encoder.image_size)).numpy()
    file = tmp_path / f"features.{kind}"
    if kind == "npy":
        np.save(file, vectors)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"features": list(vectors)}), file)
    run.data.features = file
    run.fit(tmp_path / "given", recipe="uml-probe")
    one, other = (Classifier.from_pretrained(tmp_path / name, device="cpu").head for name in ("computed", "given"))
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "given" / "features").glob("*/items.npy"))


def test_features_from_a_file_that_do_not_fit(tmp_path):
    file = tmp_path / "features.npy"
    np.save(file, np.zeros((3, 2)))
    with pytest.raises(UserError, match="holds 3 x 2 numbers, but 4 images and an encoder of width 2 need 4 x 2"):
        read_features(file, rows=4, width=2)
    np.save(file, np.full((3, 2), np.nan))
    with pytest.raises(UserError, match="not finite"):
        read_features(file, rows=3, width=2)
    with pytest.raises(UserError, match=r"gone\.npy: cannot be read"):
        read_features(tmp_path / "gone.npy", rows=3, width=2)
    with pytest.raises(UserError, match=r"features\.csv: features are a \.npy file"):
        read_features(tmp_path / "features.csv", rows=3, width=2)
    with pytest.raises(UserError, match=r"--data\.features are of an encoder that stays as it is"):
        replace(uml_finetune(), encoder="scratch", data=UmlData(images="x", features=file)).check()
