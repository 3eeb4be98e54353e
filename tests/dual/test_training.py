import json
import subprocess
from dataclasses import replace
from pathlib import Path

import as_torchrun
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from diptych.data.scenes import ScenesSource
from diptych.dual.evaluation import evaluate_dual_run
from diptych.dual.model import DualEncoder, DualEncoderConfig
from diptych.dual.training import PairsData
from diptych.errors import UserError
from diptych.registry import RECIPES
from diptych.run_folder import kind_of, read_config
from diptych.train import pace
from diptych.train.config import OptimConfig, TrainConfig
from diptych.train.pace import Budget, RunPlan, StageCost

FAMILIES = ("ito", "clip", "siglip", "slip")
NAMES = [name for name in RECIPES if name.split("-")[0] in FAMILIES and not name.endswith("-frozen")]
SCENES = ScenesSource(count=24)
MODEL = DualEncoderConfig(
    image_size=16,
    patch=8,
    image_width=16,
    image_depth=1,
    max_text_len=16,
    text_width=16,
    text_depth=1,
    vocab_size=540,
    width=16,
)


def small_run(name: str = "ito-tiny", *, steps: int = 4, **changes):
    run = RECIPES[name]()
    run.data = PairsData(pairs="scenes:?count=24", valid="scenes:?split=test&count=6")
    run.model = MODEL
    run.train = TrainConfig(
        steps=steps,
        batch_size=8,
        eval_every=2,
        checkpoint_every=2,
        device="cpu",
        precision="fp32",
        workers=0,
        tensorboard=False,
        quiet=True,
    )
    run.optim = OptimConfig(lr=1e-3, warmup_steps=2, schedule="constant")
    if hasattr(run.objective, "hidden"):
        run.objective.hidden = 8
    return replace(run, **changes)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out) if "loss" in line]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "ito"
    small_run().fit(out, recipe="ito-tiny")
    return out


def test_a_run_leaves_a_plain_clip_folder_and_measures_retrieval(done):
    model = CLIPModel.from_pretrained(done / "model", local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(done / "model", local_files_only=True)
    with torch.no_grad():
        told = model.get_text_features(**processor(text=["a red circle"], return_tensors="pt")).pooler_output
    ours = DualEncoder.from_pretrained(done / "model").embed_texts(["a red circle"])
    torch.testing.assert_close(torch.nn.functional.normalize(told, dim=-1), ours)
    scores = [line for line in lines(done) if "valid/mean_r1" in line]
    assert [line["step"] for line in scores] == [2, 4]
    assert 0 <= scores[-1]["valid/image_to_text/r10"] <= 1
    assert kind_of(done) == "dual"
    assert read_config(done)["run"]["objective"]["fusion_weight"] == 2.0
    assert "pairs (" in read_config(done)["data"]


@pytest.fixture
def scored(tmp_path) -> Path:
    """Images with captions, without any, with the caption of another, and one that cannot be read."""
    folder = tmp_path / "valid"
    folder.mkdir()
    for number in range(24):
        Image.fromarray(SCENES.image(number, 20)).save(folder / f"{number:02d}.png")
        if number % 3:
            (folder / f"{number:02d}.txt").write_text(SCENES.captions(number // 6)[0])
    (folder / "05.png").write_bytes(b"<html>404</html>")
    return folder


@pytest.mark.parametrize("name", ["ito-tiny", "slip-tiny", "siglip-tiny", "clip-aug-tiny"])
def test_validation_equals_evaluate(name, scored, tmp_path, capsys):
    data = PairsData(pairs="scenes:?count=24", valid=str(scored), max_skipped_share=0.05)
    run = small_run(name, data=data)
    run.train.ema = 0.9
    run.fit(tmp_path / "run", recipe=name)
    assert "1 images cannot be read" in capsys.readouterr().err
    assert "05.png" in (tmp_path / "run" / "skipped_valid.jsonl").read_text()
    out = tmp_path / "scores"
    options = {"train": None, "umap": False, "limit": None, "max_skipped_share": 0.05}
    evaluate_dual_run(tmp_path / "run", str(scored), out=out, device="cpu", **options)
    found = json.loads((out / "metrics.json").read_text())
    validated = [line for line in lines(tmp_path / "run") if "valid/mean_r1" in line]
    best = max(validated, key=lambda line: line["valid/mean_r1"])  # of equals the first, whose weights are kept
    names = [key.removeprefix("valid/") for key in best if key.startswith("valid/")]
    assert len(names) == 9
    assert {key: best[f"valid/{key}"] for key in names} == {key: found[f"retrieval/{key}"] for key in names}
    assert (found["images"], found["retrieval/images"], found["skipped"]) == (23, 15, 1)
    assert any("captions are those of another image too" in note for note in found["notes"])
    assert any("05.png" in note for note in found["notes"])


def test_unreadable_validation_images_stop_before_the_training(scored, tmp_path):
    run = small_run(data=PairsData(pairs="scenes:?count=24", valid=str(scored)))
    with pytest.raises(UserError, match=r"1 of 24 items are unreadable.*05\.png"):
        run.fit(tmp_path / "run", recipe="ito-tiny")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    for file in scored.glob("*.txt"):
        file.unlink()
    (scored / "05.png").unlink()
    with pytest.raises(UserError, match="pairs need images and captions, and it has no captions"):
        run.fit(tmp_path / "run", recipe="ito-tiny")


def test_the_fusion_is_dropped(done):
    names = DualEncoder.from_pretrained(done / "model").state_dict()
    assert not any("fusion" in name for name in names)


@pytest.mark.parametrize("name", ["clip-aug-tiny", "siglip-tiny", "slip-tiny"])
def test_every_family_trains(name, tmp_path):
    small_run(name, steps=1).fit(tmp_path, recipe=name)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert kind_of(tmp_path) == "dual"


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(done, tmp_path):
    small_run(steps=2).fit(tmp_path, recipe="ito-tiny")
    small_run(steps=4).fit(tmp_path, recipe="ito-tiny")
    assert losses(tmp_path) == losses(done)


def test_chunks_change_no_loss_and_may_change_on_resume(done, tmp_path):
    small_run(steps=2).fit(tmp_path, recipe="ito-tiny")
    chunked = small_run(steps=4)
    chunked.objective.chunk, chunked.objective.lean = 3, False
    chunked.fit(tmp_path, recipe="ito-tiny")
    assert losses(tmp_path) == pytest.approx(losses(done), rel=1e-4)


def test_epochs_count_passes_over_the_pairs_and_resume_bit_for_bit(done, tmp_path):
    """24 pairs in batches of 8: an epoch has three steps."""

    def epochs(count: float):
        run = small_run(steps=1)
        run.train.epochs = count
        return run.fit(tmp_path, recipe="ito-tiny")

    assert epochs(1).step == 3
    assert read_config(tmp_path)["run"]["train"]["steps"] == 3
    assert epochs(1.25).step == 4
    assert losses(tmp_path) == losses(done)
    assert [line["epoch"] for line in lines(tmp_path) if "loss" in line] == [0.3333, 0.6667, 1.0, 1.3333]


def test_edited_captions_and_images_are_noticed(scored, tmp_path):
    (scored / "05.png").unlink()
    (scored / "05.txt").unlink()
    data = PairsData(pairs=str(scored))
    small_run(steps=2, data=data).fit(tmp_path / "run", recipe="ito-tiny")
    small_run(steps=3, data=data).fit(tmp_path / "run", recipe="ito-tiny")
    kept = (scored / "04.txt").read_text()
    (scored / "04.txt").write_text("a blue ring, much edited")
    with pytest.raises(UserError, match=r"captions or labels of its data have changed .* Bring the old files back"):
        small_run(steps=4, data=data).fit(tmp_path / "run", recipe="ito-tiny")
    (scored / "04.txt").write_text(kept)
    Image.new("RGB", (20, 20)).save(scored / "04.png")
    with pytest.raises(UserError, match="its data have changed"):
        small_run(steps=4, data=data).fit(tmp_path / "run", recipe="ito-tiny")


def test_a_batch_holds_no_pair_twice(tmp_path, capsys):
    run = small_run("clip-tiny", steps=2, data=PairsData(pairs="scenes:?count=5"))
    run.fit(tmp_path / "run", recipe="clip-tiny")
    assert "train.batch-size 8 is more than the 5 images with captions" in capsys.readouterr().err
    assert read_config(tmp_path / "run")["run"]["train"]["batch_size"] == 5
    small_run("clip-tiny", steps=3, data=run.data).fit(tmp_path / "run", recipe="clip-tiny")  # goes on


@pytest.mark.parametrize("name", ["ito-tiny", "clip-tiny", "siglip-tiny", "slip-tiny"])
def test_a_batch_without_partners_is_refused(name, tmp_path):
    run = small_run(name)
    run.train.batch_size = 1
    with pytest.raises(UserError, match=r"train\.batch_size is 1.*give 2 or more"):
        run.fit(tmp_path / "run", recipe=name)
    run.data, run.train.batch_size = PairsData(pairs="scenes:?count=1"), 8
    with pytest.raises(UserError, match="1 images with captions are too few"):
        run.fit(tmp_path / "run", recipe=name)


def test_accumulation_is_refused_and_the_mend_named(tmp_path):
    run = small_run()
    run.train.grad_accum_steps = 2
    with pytest.raises(UserError, match=r"train\.grad_accum_steps is 2.*objective\.chunk"):
        run.fit(tmp_path, recipe="ito-tiny")


@pytest.mark.slow  # what could differ is in tests/dual/test_objectives.py; here also the loop and the tokenizer
def test_two_processes_train_as_one(done, tmp_path):
    command = as_torchrun.command(2, Path(__file__).with_name("run_ito.py"), tmp_path)
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    assert losses(tmp_path) == pytest.approx(losses(done), rel=1e-4)


def test_a_run_continues_another(done, tmp_path):
    small_run(start=str(done), steps=1).fit(tmp_path, recipe="clip-tiny")
    again = DualEncoder.from_pretrained(tmp_path / "model")
    assert again.ids(["a red circle"]) == DualEncoder.from_pretrained(done / "model").ids(["a red circle"])


def test_a_given_tokenizer_is_used(done, tmp_path):
    small_run(tokenizer=str(done), steps=1).fit(tmp_path, recipe="ito-tiny")
    assert not (tmp_path / "tokenizer").exists()


def test_texts_without_images_and_unequal_widths_are_refused(tmp_path):
    (tmp_path / "texts.txt").write_text("a\nb\n")
    run = small_run()
    run.data.pairs = str(tmp_path / "texts.txt")
    with pytest.raises(UserError, match=r"texts\.txt: pairs need images and captions, and it has no images"):
        run.fit(tmp_path / "run", recipe="ito-tiny")
    with pytest.raises(UserError, match=r"text-width is 32 and model.width 16"):
        small_run(model=replace(MODEL, text_width=32)).fit(tmp_path / "run", recipe="ito-tiny")


def test_unreadable_images_of_the_validation_are_tolerated_up_to_the_same_share(tmp_path):
    (tmp_path / "valid").mkdir()
    for name in "abcd":
        Image.new("RGB", (16, 16), (40 * ord(name) % 256, 0, 0)).save(tmp_path / f"valid/{name}.png")
        (tmp_path / f"valid/{name}.txt").write_text(f"a {name}\n")
    (tmp_path / "valid/b.png").write_bytes(b"")
    run = small_run(steps=2)
    run.data.valid = str(tmp_path / "valid")
    with pytest.raises(UserError, match=r"1 of 4 items are unreadable.*b\.png"):
        run.fit(tmp_path / "stopped", recipe="ito-tiny")
    run.data.max_skipped_share = 0.25
    run.fit(tmp_path / "run", recipe="ito-tiny")
    (scores,) = [line for line in lines(tmp_path / "run") if "valid/mean_r1" in line]
    assert scores["valid/image_to_text/r10"] == 1  # three images and three texts


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_a_family_differ_in_size_alone(name):
    """But for what the two for a CPU depart from the paper in, each in the same way."""
    family, _, size = name.rpartition("-")
    run, base = RECIPES[name](), RECIPES[f"{family}-base"]()
    assert type(run) is type(base)
    if size in ("tiny", "small"):
        other = RECIPES[f"{family}-{'small' if size == 'tiny' else 'tiny'}"]().objective
        assert (run.objective.captions, run.objective.augment) == (other.captions, other.augment)
    else:
        assert run.objective.identity() == base.objective.identity()
    assert RECIPES[name].__doc__
    assert run.optim.betas == (0.9, 0.98)


@pytest.mark.parametrize("family", ["ito", "clip", "clip-aug", "siglip", "slip"])
def test_every_family_has_the_same_sizes(family):
    """Tiny and small are for a CPU, medium is for one GPU, base is the paper's."""
    sizes = [RECIPES[f"{family}-{size}"]() for size in ("tiny", "small", "medium", "base")]
    ito = [RECIPES[f"ito-{size}"]() for size in ("tiny", "small", "medium", "base")]
    assert [run.model for run in sizes] == [run.model for run in ito]
    assert [run.train for run in sizes] == [run.train for run in ito]
    assert [run.model.image_size for run in sizes] == [64, 96, 224, 224]
    assert [run.model.image_width for run in sizes] == [128, 192, 384, 768]
    assert [run.objective.chunk for run in sizes] == [None, None, 128, None]


def test_the_best_weights_are_kept_and_training_ends_without_better_ones(tmp_path, monkeypatch, capsys):
    values, seen = {1: 0.1, 2: 0.5, 3: 0.2, 4: 0.5}, {}

    def measure(model, pairs, *, folder):
        def run(step, objective):
            seen[step] = model.clip.visual_projection.weight.detach().clone()
            return {"valid/mean_r1": values[step]}

        return run

    monkeypatch.setattr("diptych.dual.training.measure_retrieval", measure)
    run = small_run(steps=9, patience=2)
    run.train.eval_every = 1
    assert run.fit(tmp_path / "run", recipe="ito-tiny").step == 4
    kept = DualEncoder.from_pretrained(tmp_path / "run").clip.visual_projection.weight
    assert torch.equal(kept, seen[2])
    assert "best after step 2, mean_r1 50.0 %" in capsys.readouterr().out.splitlines()[-1]


def test_the_first_line_of_the_report_says_how_the_run_does_beside_its_baselines(done):
    found = json.loads((done / "baselines.json").read_text())
    names = [row[0] for row in found["rows"]]
    assert names[:2] == ["this run", "chance"]
    assert names[2].startswith("captions of the ")
    page = (done / "report.html").read_text()
    (lead,) = [line for line in page.splitlines() if 'class="lead"' in line]
    assert found["verdict"].split(":")[0] in lead
    assert found["verdict"].startswith(("The run loses to a baseline", "No baseline does better"))


def test_the_report_has_curves_and_the_images_that_texts_find(done):
    page = (done / "report.html").read_text()
    for title in ("Samples", "Curves", "Validation", "Settings"):
        assert f">{title}</h2>" in page
    assert sorted(file.name for file in (done / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]


def test_a_budget_too_short_for_the_towers_takes_smaller_ones(tmp_path, monkeypatch, capsys):
    run = replace(small_run("ito-small", steps=1000), model=DualEncoderConfig.small())
    monkeypatch.setattr(pace, "training_seconds", lambda run, _: run.train.steps * 0.2)

    def fitting(run, minutes: float):
        plan = RunPlan([StageCost(name="ito-small", steps=1000)], budget=Budget.of_run(tmp_path, Budget(minutes)))
        return run._with_affordable_towers(lambda run: None, plan)

    assert fitting(run, 3.0) is run  # 400 steps take 80 seconds
    assert capsys.readouterr().err == ""
    (tmp_path / "budget.json").unlink()
    found, tiny = fitting(run, 1.0).model, DualEncoderConfig.tiny()
    assert "fewer than 400 steps on 8 rows fit into --minutes 1: towers as small as" in capsys.readouterr().err
    assert found == replace(tiny, vocab_size=run.model.vocab_size)
    assert fitting(replace(run, start="openai/clip"), 1.0).model == run.model  # one that is given keeps its sizes
    assert fitting(replace(run, model=tiny), 1.0).model == tiny
