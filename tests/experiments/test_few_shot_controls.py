import math
import statistics

import pytest

from diptych.experiments.few_shot import CONTROLS, FewShotResult, gain, spread, table


def outcomes(differences, *, shots=(1, 2)):
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
    found = gain(outcomes(differences), "UML", "image only")
    assert found.mean == pytest.approx(0.02)
    assert found.error == pytest.approx(statistics.stdev(differences) / 2)
    assert found.pairs == 4
    assert found.is_real
    assert str(found) == "UML against image only: +2.00 ± 0.41 points over 4 pairs, a gain beyond the noise"
    assert gain(outcomes(differences), "UML", "image only", shots=1).mean == pytest.approx(0.015)
    assert "a loss beyond" in str(gain(outcomes(differences), "image only", "UML"))


def test_noise_is_called_noise():
    found = gain(outcomes([0.02, -0.03, 0.01, -0.01]), "UML", "image only")
    assert not found.is_real
    assert str(found).endswith("within the noise")


def test_the_table_has_a_row_for_each_control_and_never_drops_one():
    found = outcomes([0.02, 0.03, 0.01, 0.02])
    rows = table(found)
    assert [row[0] for row in rows] == ["", *CONTROLS]
    assert rows[0][1:] == ["1 shot", "2 shots", "mean"]
    mean, deviation = spread(found, "image only", 1)
    assert (mean, deviation) == (pytest.approx(0.4), pytest.approx(0.2 / math.sqrt(2)))
    assert rows[1][1] == "40.00 ± 14.14"
    with pytest.raises(statistics.StatisticsError):
        table([each for each in found if each.control != "unrelated text"])
