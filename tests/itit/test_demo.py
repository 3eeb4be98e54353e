import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest

from diptych.data.pixels import channels_first
from diptych.data.scenes import ScenesSource
from diptych.eval.scenes import image_accuracy
from diptych.itit import controls, demo
from diptych.itit.controls import train_stopped, train_watched
from diptych.itit.demo import demo_recipe, run_demo
from diptych.itit.pipeline import Diptych
from diptych.tokenizers.image_tokenizer import ImageTokenizer
from diptych.tokenizers.text_encoder import TextEncoder

pytestmark = pytest.mark.filterwarnings("ignore:Covariance")


def shrunk(run):
    """The demo's own recipe with a few steps of a small network."""
    short = {"steps": 3, "batch_size": 4, "quiet": True, "workers": 0, "device": "cpu", "tensorboard": False}
    return replace(
        run,
        data=replace(run.data, pairs="scenes:?level=3&split=train&count=40", max_pairs=10),
        model=replace(run.model, width=16, depth=1, heads=2, text_decoder_width=16, text_decoder_heads=2),
        objective=replace(run.objective, cycle_start_step=1),
        train=replace(run.train, **short),
    )


@contextmanager
def trained_before(run, out, test, *, waiting):
    """The controls in this process: another one takes seconds to start."""
    alone = run.pairs_only()
    inputs = alone.prepare(out / "itit")
    train_watched(alone, inputs, out / "paired_only", test, title="pairs only")
    shutil.copytree(out / "paired_only", out / "paired_only_longer")
    train_stopped(alone, inputs, out / "paired_only_stopped", test)
    yield lambda name: out / name
    waiting(7.0)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_recipe", lambda **options: shrunk(demo_recipe(**options)))
        patch.setattr(demo, "_SCORED", 8)
        patch.setattr(controls, "_WATCHED", 4)
        yield patch


class Watched(demo.WholeBar):
    """A bar that keeps what it was told."""

    told: ClassVar = []

    def show(self, part, *, left, later):
        self.told.append((part, left, later))
        super().show(part, left=left, later=later)


@pytest.fixture(scope="module")
def shown(tmp_path_factory, patch):
    out = tmp_path_factory.mktemp("demo") / "out"
    with patch.context() as inner:
        inner.setattr(demo, "controls_beside", trained_before)
        inner.setattr(demo, "WholeBar", Watched)
        return out, run_demo(out)


def test_metrics_of_both_runs_and_the_time(shown):
    out, metrics = shown
    written = json.loads((out / "metrics.json").read_text())
    assert written == json.loads(json.dumps(metrics))
    for name in ("paired_only", "itit"):
        for side in ("caption_accuracy", "image_accuracy"):
            assert 0 <= written[name][side] <= 1
        assert written[name]["steps"] == 3
        assert written[name]["seconds"] > 0
        assert written[name]["images"] == 8
    assert written["seconds"] > written["itit"]["seconds"]
    assert 0 <= written["tokenizer"]["image_accuracy"] <= 1
    assert written["quick"] is False
    assert set(written["controls"]) == {*controls.TITLES, "logistic_regression_on_pixels", "best"}
    assert written["controls"]["best"]["caption_accuracy"] >= written["paired_only"]["caption_accuracy"]
    assert written["world"] == {"distinct_scenes": 40, "images": 25, "distinct_grids": 25}


def test_one_bar_has_all_parts_and_ends(shown):
    parts, left, later = zip(*Watched.told, strict=True)
    waited = controls.TITLES[controls.LONGER]
    assert parts == ("encoding", "encoding", "ITIT", demo._SCORES, waited, demo._REPORT, "done")
    assert list(later) == sorted(later, reverse=True)
    assert later[0] == pytest.approx(left[2] + later[2])  # what is still to come is all that follows
    assert later[2] == pytest.approx(left[3] + later[3])
    assert left[4] == 7  # as told
    assert later[4] == pytest.approx(left[5])
    assert (left[-1], later[-1]) == (0, 0)


def test_a_repeated_call_expects_what_is_left(shown, tmp_path):
    run = shrunk(demo_recipe(quick=False, seed=0))
    whole, again = ({cost.name: cost.all for cost in demo.costs_left(run, out)} for out in (tmp_path, shown[0]))
    done = {"tokenizer", "text encoder", "encoding", "ITIT", controls.TITLES[controls.LONGER]}
    assert again == {name: 0 if name in done else cost for name, cost in whole.items()}
    assert min(cost for name, cost in whole.items() if name not in ("tokenizer", "text encoder")) > 0
    (tmp_path / "itit").mkdir()
    (tmp_path / "itit/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 2.0}\n')
    half = {cost.name: cost.all for cost in demo.costs_left(run, tmp_path)}
    assert half == whole | {"ITIT": 5.0}  # one step with cycles of three steps


def test_stages_from_scratch_are_among_the_costs(tmp_path):
    given, scratch = (demo_recipe(quick=True, from_scratch=trained, seed=0) for trained in (False, True))
    both = [{cost.name: cost.all for cost in demo.costs_left(run, tmp_path)} for run in (given, scratch)]
    assert [each["tokenizer"] for each in both] == [0, 60 * 17]
    assert both[1]["text encoder"] == pytest.approx(30 * 1.3)


def test_both_run_folders_load(shown):
    out, _ = shown
    for name in ("paired_only", "itit"):
        loaded = Diptych.from_pretrained(out / name)
        assert loaded.imagine_pixels(["a red circle"]).shape == (1, 32, 32, 3)
        lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
        assert any("caption_accuracy" in line for line in lines)
        assert any("loss/t2i2t" in line for line in lines) == (name == "itit")
    weights = [(out / name / "tokenizer/config.json").read_bytes() for name in ("paired_only", "itit")]
    assert weights[0] == weights[1]


def test_the_report_needs_nothing_else(shown):
    out, _ = shown
    report = (out / "report.html").read_text()
    for title in ("What was learned", "Captions", "Images", "Cycles", "Curves"):
        assert f">{title}</h2>" in report
    assert not re.search(r"""(src|href)\s*=\s*(["'](?!data:|#)|[^"'])""", report)
    assert not re.search(r"url\((?!data:|['\"]data:|#)|@import", report)


def test_the_control_differs_in_unpaired_data_alone():
    run = demo_recipe(quick=False, seed=3)
    control = run.pairs_only()
    assert (control.objective.texts, control.objective.images) == ("off", "off")
    assert (control.objective.weights.t2t, control.objective.weights.unpaired_i2i) == (0, 0)
    same = {name: getattr(run.objective, name) for name in ("texts", "images", "weights")}
    objective = replace(control.objective, **same)
    assert replace(control, objective=objective) == run
    assert run.train.seed == 3
    assert "seed=3" in run.data.pairs


@pytest.mark.parametrize("quick", [False, True])
def test_the_demo_can_be_trained(quick):
    run = demo_recipe(quick=quick, seed=0)
    run.check()
    assert run.data.max_pairs == demo.PAIRS
    scenes = ScenesSource.from_spec(run.data.pairs)
    assert (scenes.level, scenes.split, scenes.captions_each) == (3, "train", demo.CAPTIONS)
    assert run.optim.schedule == "constant"  # it may be stopped anywhere


def test_the_stages_that_come_with_diptych_know_the_scenes():
    scenes = ScenesSource(level=3, split="test", seed=9, count=300)
    tokenizer = ImageTokenizer.from_pretrained(demo.STAGES / "tokenizer")
    decoded = tokenizer.decode(tokenizer.encode(channels_first(scenes.images(range(300), 32))))
    assert image_accuracy(decoded.permute(0, 2, 3, 1).numpy(), scenes.scenes(range(300))).exact > 0.93
    text_encoder = TextEncoder.from_pretrained(demo.STAGES / "text_encoder")
    texts = [text for item in range(300) for text in scenes.captions(item)]
    assert text_encoder.detokenize(text_encoder.tokenize(texts, length=18)[0]) == texts
    files = [file for file in demo.STAGES.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2 * 2**20


def test_from_scratch_takes_no_stage_from_the_package():
    given = demo_recipe(quick=False, seed=0)
    scratch = demo_recipe(quick=False, from_scratch=True, seed=0)
    assert (given.tokenizer, given.text_encoder) == (str(demo.STAGES), str(demo.STAGES))
    assert scratch == replace(given, tokenizer=None, text_encoder=None)


@pytest.mark.slow
def test_the_control_trains_beside_in_a_process_of_its_own(patch, shown, tmp_path):
    """And has learned the same as in this one."""
    run_demo(tmp_path)
    for name in ("paired_only", "itit"):
        weights = [(out / name / "model/model.safetensors").read_bytes() for out in (tmp_path, shown[0])]
        assert weights[0] == weights[1]
