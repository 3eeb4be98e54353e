"""The mechanism at its smallest: classes are pairs of attributes, texts tell which classes share one, images are noisy.

With few images, a classifier cannot tell attributes from chance. Texts about the classes say how classes hang together;
texts about other classes say it wrongly.
"""

import math
import statistics

import numpy as np
import pytest

from diptych.data.splits import draw_episode
from diptych.experiments.few_shot import (
    CONTROLS,
    REGRESSION,
    FewShotConfig,
    FewShotResult,
    accuracy_figure,
    after_refit,
    as_json,
    few_shot,
    gain,
    regression,
    show,
    spread,
    table,
)
from diptych.uml.data import LabelledFeatures
from diptych.uml.objective import SharedHeadConfig

COLOURS, SHAPES = 4, 4
CLASSES = COLOURS * SHAPES


def features(labels: np.ndarray, *, width: int, noise: float, seed: int) -> LabelledFeatures:
    """A direction for each colour and one for each shape, and noise."""
    generator = np.random.default_rng(seed)
    colours, shapes = generator.normal(size=(COLOURS, width)), generator.normal(size=(SHAPES, width))
    vectors = colours[labels // SHAPES] + shapes[labels % SHAPES]
    vectors += noise * generator.normal(size=vectors.shape)
    return LabelledFeatures(vectors_ND=vectors.astype(np.float32), labels_N=labels)


@pytest.fixture(scope="module")
def results():
    images = features(np.arange(60 * CLASSES) % CLASSES, width=24, noise=2.0, seed=0)
    texts = features(np.arange(6 * CLASSES) % CLASSES, width=16, noise=0.3, seed=1)
    config = FewShotConfig(
        shots=(1, 2),
        seeds=(1, 2, 3),
        lrs=(1e-2,),
        aux_weights=(1.0,),
        steps=200,
        eval_every=40,
        after_selection="refit",
        head=SharedHeadConfig(logit_scale=4.0),
    )
    episodes = {
        (shots, seed): draw_episode(images.labels_N[: 16 * CLASSES], shots, seed=seed)
        for shots in config.shots
        for seed in config.seeds
    }
    test = np.arange(16 * CLASSES, 60 * CLASSES)
    return few_shot(images, texts, episodes, test, config) + regression(images, episodes, test, config)


def test_every_control_is_tried_on_every_episode(results):
    tried = {(each.control, each.shots, each.seed) for each in results}
    assert tried == {(name, shots, seed) for name in (*CONTROLS, REGRESSION) for shots in (1, 2) for seed in (1, 2, 3)}
    assert len(results) == len(tried)
    without = {"image only", "init only"}
    grid = [each for each in results if each.control != REGRESSION]
    assert all((each.chosen["aux_weight"] == 0) == (each.control in without) for each in grid)


def test_a_refit_learns_from_twice_the_images_at_these_shots(results):
    refitted = after_refit(results)
    assert len(refitted) == len(results)
    for control in ("image only", REGRESSION):
        for shots in (1, 2):
            assert spread(refitted, control, shots)[0] > spread(results, control, shots)[0] + 0.02
    assert after_refit(made_up([0.1])) == []


def test_the_head_is_no_worse_than_logistic_regression(results):
    for each in (results, after_refit(results)):
        assert gain(each, "image only", REGRESSION).mean > -0.01


def test_related_texts_help_and_unrelated_ones_do_not(results):
    start = gain(results, "UML init", "image only")
    assert start.is_real
    assert start.mean > 0.05, start
    for related, unrelated in (("UML", "unrelated text"), ("UML init", "unrelated init")):
        found = gain(results, related, unrelated)
        assert found.is_real
        assert found.mean > 0.03, found
        assert gain(results, unrelated, "image only").mean < 0.01


def test_the_report_has_table_sentences_figure_and_numbers(results, capsys):
    show(results, title="attributes")
    told = capsys.readouterr().out
    for name in (*CONTROLS, REGRESSION):
        assert name in told
    assert "UML against image only: " in told
    assert b"<svg" in accuracy_figure(results, title="attributes")
    found = as_json(results)
    assert len(found["outcomes"]) == 42
    assert {each["shots"] for each in found["gains"]} == {"all", 1, 2}


def test_fewer_texts_can_be_asked_for():
    images = features(np.arange(10 * CLASSES) % CLASSES, width=6, noise=1.0, seed=0)
    texts = features(np.arange(6 * CLASSES) % CLASSES, width=5, noise=0.3, seed=1)
    config = FewShotConfig(shots=(1,), seeds=(1,), lrs=(1e-2,), steps=10, eval_every=5, text_shots=2)
    episodes = {(1, 1): draw_episode(images.labels_N, 1, seed=1)}
    assert len(few_shot(images, texts, episodes, np.arange(CLASSES), config)) == len(CONTROLS)


def made_up(differences, *, shots=(1, 2)):
    """UML better than image only by ``differences``, one for each (shots, seed)."""
    found = []
    for number, difference in enumerate(differences):
        for control in CONTROLS:
            accuracy = 0.3 + 0.1 * number + difference * (control == "UML")
            settings = {"valid_accuracy": 0.5, "chosen": {}}
            where = {"shots": shots[number % len(shots)], "seed": number // len(shots)}
            found.append(FewShotResult(control=control, accuracy=accuracy, **where, **settings))
    return found


def test_all_controls_are_there():
    assert list(CONTROLS) == ["image only", "init only", "unrelated text", "unrelated init", "UML", "UML init"]
    by_texts = {name: control.texts for name, control in CONTROLS.items()}
    assert by_texts["image only"] == by_texts["init only"] == "none"
    assert by_texts["unrelated text"] == "permuted"


def test_a_gain_is_paired_so_that_seeds_and_shots_cancel():
    differences = [0.02, 0.03, 0.01, 0.02]
    found = gain(made_up(differences), "UML", "image only")
    assert found.mean == pytest.approx(0.02)
    assert found.error == pytest.approx(statistics.stdev(differences) / 2)
    assert found.pairs == 4
    assert found.is_real
    assert str(found) == "UML against image only: +2.00 ± 0.41 points over 4 pairs, a gain beyond the noise"
    assert gain(made_up(differences), "UML", "image only", shots=1).mean == pytest.approx(0.015)
    assert "a loss beyond" in str(gain(made_up(differences), "image only", "UML"))


def test_noise_is_called_noise():
    found = gain(made_up([0.02, -0.03, 0.01, -0.01]), "UML", "image only")
    assert not found.is_real
    assert str(found).endswith("within the noise")


def test_the_table_has_a_row_for_each_control_and_never_drops_one():
    found = made_up([0.02, 0.03, 0.01, 0.02])
    rows = table(found)
    assert [row[0] for row in rows] == ["", *CONTROLS]
    assert rows[0][1:] == ["1 shot", "2 shots", "mean"]
    mean, deviation = spread(found, "image only", 1)
    assert (mean, deviation) == (pytest.approx(0.4), pytest.approx(0.2 / math.sqrt(2)))
    assert rows[1][1] == "40.00 ± 14.14"
    with pytest.raises(statistics.StatisticsError):
        table([each for each in found if each.control != "unrelated text"])
