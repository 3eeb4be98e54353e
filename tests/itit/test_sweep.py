import json

import pytest

from diptych.data.sources import open_source
from diptych.errors import UserError
from diptych.itit import sweep
from diptych.itit.evaluation import EvaluateConfig, evaluate
from diptych.itit.generation import ImageGenerationConfig
from diptych.itit.pipeline import Diptych
from diptych.itit.sweep import SweepConfig, sweep_run

SPEC = "scenes:?count=6"
GRID = SweepConfig(guidance=(0.0, 2.0), temperature=(1.0,), beams=(1, 2), length_power=(0.0, 1.0), limit=6)


def run_sweep(run, out, config=GRID, spec=SPEC):
    return sweep_run(run, spec, open_source(spec), config, features=None, out=out, device="cpu")


@pytest.fixture
def run(save_itit_run, tmp_path):
    return save_itit_run(tmp_path / "run", steps=2)


def test_cells_have_the_scores_of_evaluate_and_the_best_is_told(run, tmp_path, capsys):
    cells = run_sweep(run, tmp_path / "out")
    told = capsys.readouterr()
    assert [(c["temperature"], c["guidance"]) for c in cells if c["side"] == "images"] == [(1.0, 0.0), (1.0, 2.0)]
    assert [(c["beams"], c["length_power"]) for c in cells[2:]] == [(1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0)]
    diptych = Diptych.from_pretrained(run, device="cpu")
    settings = ImageGenerationConfig(steps=2, guidance=2.0, temperature=1.0)
    expected = evaluate(diptych, open_source(SPEC), EvaluateConfig(image_generation=settings, beams=1)).metrics
    assert cells[1]["frechet/random-conv-0"] == pytest.approx(expected["frechet/random-conv-0"])
    assert cells[2]["cider"] == cells[3]["cider"] == pytest.approx(expected["cider"])
    found = json.loads((tmp_path / "out/sweep.json").read_text())
    assert found["cells"] == cells
    assert found["best"]["images"] == min(cells[:2], key=lambda cell: cell["frechet/random-conv-0"])
    assert found["best"]["captions"]["cider"] == max(cell["cider"] for cell in cells[2:])
    assert "best for images: temperature 1, guidance" in told.out
    assert told.err == ""
    for side in ("images", "captions"):
        assert b"<svg" in (tmp_path / f"out/{side}.svg").read_bytes()


def test_a_sweep_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    whole = run_sweep(run, tmp_path / "whole")
    counted = []
    imagine = Diptych.imagine_pixels

    def stop(self, *given, **options):
        if counted:
            raise KeyboardInterrupt
        counted.append(1)
        return imagine(self, *given, **options)

    monkeypatch.setattr(Diptych, "imagine_pixels", stop)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(run, tmp_path / "out")
    assert len((tmp_path / "out" / sweep.CELLS).read_text().splitlines()) == 1
    counted.clear()  # one more image setting may be scored: the second
    assert run_sweep(run, tmp_path / "out") == whole
    monkeypatch.setattr(Diptych, "imagine_pixels", None)
    assert run_sweep(run, tmp_path / "out") == whole  # nothing is computed again


def test_another_sweep_in_the_folder_is_refused_and_a_test_split_is_told(run, tmp_path, capsys):
    captions = SweepConfig(guidance=(), beams=(1,), length_power=(0.0,), limit=4)
    run_sweep(run, tmp_path / "out", captions, "scenes:?count=6&split=test")
    assert "names the split test" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds a sweep of other source"):
        run_sweep(run, tmp_path / "out", captions)
