"""The commands that score finished runs: what they print and write, and how mistakes end."""

import json

import pytest

from diptych.run_folder import read_config, write_config, write_json
from diptych.tokenizers.recipes import text_encoder_tiny, vqgan_tiny

TEST = "scenes:?split=test&count=8"


@pytest.mark.filterwarnings("ignore:Covariance")
def test_evaluate(call, run, tmp_path):
    status, out, err = call("evaluate", run, "--data", TEST, "--beams", 1)
    assert (status, err) == (0, "")
    assert "caption_accuracy" in out
    folder = run / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["captions.jsonl", "metrics.json", "sheet.png"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["images"] == 8
    assert {"cider", "caption_accuracy", "image_accuracy"} <= metrics.keys()
    assert len((folder / "captions.jsonl").read_text().splitlines()) == 8
    call("evaluate", run, "--data", TEST, "--limit", 3, "--out", tmp_path / "three")
    assert json.loads((tmp_path / "three/metrics.json").read_text())["images"] == 3


def test_evaluate_captions_only(call, run, mistaken, monkeypatch):
    monkeypatch.setattr("diptych.itit.pipeline.Diptych.imagine_pixels", None)  # no image is generated
    status, _, _ = call("evaluate", run, "--data", TEST, "--beams", 1, "--captions-only")
    assert status == 0
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    assert "cider" in metrics
    assert not any(name.startswith(("image_", "frechet")) for name in metrics)
    assert (run / "evaluation/sheet.png").is_file()
    assert "visible" not in metrics
    call("evaluate", run, "--data", TEST, "--beams", 1, "--captions-only", "--visible", 0.5, "--limit", 2)
    assert json.loads((run / "evaluation-2/metrics.json").read_text())["visible"] == 0.5
    mistaken(call("evaluate", run, "--data", TEST, "--visible", -1), "--visible -1")
    mistaken(call("evaluate", run, "--data", TEST, "--captions-only", "--steps", 4), "--captions-only", "images")
    mistaken(call("evaluate", run, "--data", TEST, "--captions-only", "--features", "x"), "--captions-only", "images")


@pytest.mark.filterwarnings("ignore:Covariance")
def test_a_second_evaluation_leaves_the_first_as_it_was(call, mistaken, run, tmp_path):
    few = ["evaluate", run, "--data", TEST, "--beams", 1, "--limit"]
    call(*few, 2)
    first = (run / "evaluation/metrics.json").read_bytes()
    _, out, _ = call(*few, 3)
    assert f"written to {run}/evaluation-2" in out
    assert json.loads((run / "evaluation-2/metrics.json").read_text())["images"] == 3
    call(*few, 4)
    assert (run / "evaluation-3/metrics.json").is_file()
    mistaken(call(*few, 5, "--out", run / "evaluation"), run / "evaluation", "earlier evaluation")
    assert (run / "evaluation/metrics.json").read_bytes() == first


@pytest.mark.filterwarnings("ignore:Covariance")
def test_evaluate_a_tokenizer(call, tokenizer, photo, tmp_path, mistaken):
    run = tmp_path / "vqgan"
    tokenizer.save_pretrained(run / "tokenizer")
    write_config(run, recipe="vqgan-tiny", run=vqgan_tiny())
    status, out, err = call("evaluate", run, "--data", TEST, "--limit", 4)
    assert (status, err) == (0, "")
    assert "psnr" in out
    assert "higher" in out
    assert "lower" in out
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["metrics.json", "sheet.png"]
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    assert metrics["images"] == 4
    assert {"psnr", "used", "perplexity", "rfd"} <= metrics.keys()
    mistaken(call("evaluate", run, "--data", TEST, "--classes", run / "names.txt"), run, "--classes", "'tokenizer'")
    write_config(run, recipe="text-encoder-tiny", run=text_encoder_tiny())
    mistaken(call("evaluate", run, "--data", TEST), run, "text encoder")
    write_json(run / "config.json", read_config(run) | {"kind": "newer than this"})
    mistaken(call("evaluate", run, "--data", TEST), run, "newer than this")
    write_json(run / "config.json", {"recipe": "vqgan-tiny"})
    mistaken(call("evaluate", run, "--data", TEST), run / "config.json", '"kind"', '"tokenizer"')


def test_evaluate_a_dual_encoder(call, dual_run):
    status, out, err = call("evaluate", dual_run, "--data", TEST, "--train", "scenes:?count=40")
    assert (status, err) == (0, "")
    recall = next(line for line in out.splitlines() if "retrieval/mean_r1" in line)
    assert "%" in recall
    assert "higher" in recall
    metrics = json.loads((dual_run / "evaluation/metrics.json").read_text())
    assert metrics["images"] == 8
    assert {"zero_shot/top1", "linear_probe/accuracy", "modality/accuracy"} <= metrics.keys()


@pytest.mark.filterwarnings("ignore:Covariance")
def test_protocols_cycles_and_sweeps(call, run, dual_run, tmp_path, mistaken):
    status, out, err = call("evaluate", run, "--data", TEST, "--protocol", "coco-fid30k", "--steps", 1)
    assert (status, err) == (0, "")
    assert "1 steps, guidance 0" in out
    assert f"source: {TEST}\n  split: test\n" in out
    assert "DEPARTS: 8 images, not 30,000" in out
    assert f"DEPARTS: {TEST} names the split test: the protocol has captions of the training split" in out
    status, out, err = call("evaluate", run, "--data", "scenes:?count=3", "--cycles", 1, "--out", tmp_path / "cycles")
    assert (status, err) == (0, "")
    assert (
        "from_text/image_attributes"
        in json.loads((tmp_path / "cycles/metrics.json").read_text())["cycles"][str(run)][0]
    )
    few = ["--guidance", 0, "--temperature", 1, "--beams", 1, "--length-power", 0, "--limit", 3]
    status, out, err = call("sweep", run, "scenes:?count=3", "--out", tmp_path / "sweep", *few)
    assert (status, err) == (0, "")
    assert "best for captions: beams 1, length_power 0" in out
    mistaken(call("sweep", run, TEST, "--out", tmp_path / "one", "--limit", 1), "--limit 1")
    mistaken(call("evaluate", run, "--data", TEST, "--against", run), "--against", "--cycles")
    mistaken(call("evaluate", run, "--data", TEST, "--cycles", 1, "--beams", 2), "--cycles", "--beams")
    mistaken(call("evaluate", dual_run, "--data", TEST, "--protocol", "coco-karpathy"), dual_run, "itit recipe")
