import json

import numpy as np
import pytest

from diptych.report.html import Section, Text
from diptych.report.run_report import _curves, closing_line, outcome, told, write_run_report
from diptych.report.sheet import save_png
from diptych.run_folder import write_config
from diptych.tokenizers.recipes import vqgan_tiny


@pytest.fixture
def run(tmp_path):
    write_config(tmp_path / "run", recipe="vqgan-tiny", run=vqgan_tiny())
    return tmp_path / "run"


def write_metrics(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_report_of_whatever_is_there(run):
    """Nothing has been trained yet; then a stage; then the run itself."""
    write_run_report(run)
    assert ">Settings</h2>" in (run / "report.html").read_text()
    write_metrics(run / "stages/text_encoder", {"step": 1, "loss": 3.0, "seconds": 0.1})
    write_run_report(run, state="step 1 of 9")
    page = (run / "report.html").read_text()
    assert ">Stage: text encoder</h2>" in page
    assert "run: step 1 of 9" in page
    write_metrics(run, {"step": 1, "loss": 3.0, "loss/pixel": 1.0}, {"step": 1, "valid/psnr": 20.0})
    save_png(run / "samples/step-00000001.png", np.zeros((4, 4, 3), np.uint8))
    write_run_report(run)
    page = (run / "report.html").read_text()
    for title in ("Samples", "Curves", "Validation", "Stage: text encoder", "Settings"):
        assert f">{title}</h2>" in page
    assert "stage.train.steps = 2000" in page
    assert "The newest samples: step 1." in page
    write_run_report(run, samples=[Section("Mine", [Text("of my own")])])
    page = (run / "report.html").read_text()
    assert "The newest samples" not in page
    assert "of my own" in page


def test_the_last_line_has_score_report_and_next_command(run):
    write_metrics(run, {"step": 1, "loss": 3.0}, {"step": 1, "valid/cider": 7.0}, {"step": 2, "loss": 2.0})
    score = outcome(run, step=1, select="cider", source="dev.tar")
    assert score == "best after step 1, cider 7 on dev.tar"
    line = closing_line(run, "itit", score=score)
    assert line == f"{run}: {score}; report: {run}/report.html; next: diptych evaluate {run} --data TEST"
    assert outcome(run) == "loss 2, nothing was scored"


def test_scores_in_one_line():
    numbers = {"valid/rouge_l": 0.2, "valid/cider": 12.0, "valid/mean_r1": 0.05, "lr": 1.0}
    assert told(numbers) == "cider 12, mean_r1 5.0 %"
    assert told(numbers, best="rouge_l") == "rouge_l 20.0 %, cider 12, mean_r1 5.0 %"
    assert told({"lr": 1.0}) == ""


def test_measures_stand_among_the_curves_of_training():
    curves, validation = _curves("run", [{"step": 1, "loss": 3.0, "measure/psnr": 9.0}, {"step": 1, "valid/psnr": 2.0}])
    assert [curves.title, validation.title] == ["Curves", "Validation"]
    assert len(curves.blocks[0].images) == 2  # the loss and the measure
    assert len(validation.blocks[0].images) == 1
