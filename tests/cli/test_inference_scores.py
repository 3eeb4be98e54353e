import json

import pytest

from diptych.run_folder import write_config
from diptych.tokenizers.recipes import vqgan_tiny

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


@pytest.mark.filterwarnings("ignore:Covariance")
def test_evaluate_a_tokenizer(call, tokenizer, photo, tmp_path, mistaken):
    run = tmp_path / "vqgan"
    tokenizer.save_pretrained(run / "tokenizer")
    write_config(run, recipe="vqgan-tiny", run=vqgan_tiny())
    status, out, err = call("evaluate", run, "--data", TEST, "--limit", 4)
    assert (status, err) == (0, "")
    assert "PSNR" in out
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["metrics.json", "sheet.png"]
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    assert metrics["images"] == 4
    assert {"psnr", "used", "perplexity", "rfd"} <= metrics.keys()
    write_config(run, recipe="text-encoder-tiny", run=vqgan_tiny())
    mistaken(call("evaluate", run, "--data", TEST), run, "text encoder")
    write_config(run, recipe="newer-than-this", run=vqgan_tiny())
    mistaken(call("evaluate", run, "--data", TEST), run, "newer-than-this")


def test_evaluate_a_dual_encoder(call, dual_run):
    status, out, err = call("evaluate", dual_run, "--data", TEST, "--train", "scenes:?count=40")
    assert (status, err) == (0, "")
    assert "retrieval/mean_r1" in out
    metrics = json.loads((dual_run / "evaluation/metrics.json").read_text())
    assert metrics["images"] == 8
    assert {"zero_shot/top1", "linear_probe/accuracy", "modality/accuracy"} <= metrics.keys()
