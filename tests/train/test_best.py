import pytest
import torch
from torch import nn

from diptych.train.best import BestWeights, Score, patience_is_over, select_best


def scores(*pairs):
    return [Score(step=step, value=a, tie_break=-loss) for step, (a, loss) in enumerate(pairs, 1)]


def test_the_best_accuracy_is_selected_and_the_loss_decides_between_equals():
    assert select_best(scores((0.5, 1.0), (0.7, 2.0), (0.6, 0.1)), patience=10).step == 2
    assert select_best(scores((0.5, 1.0), (0.5, 0.8), (0.5, 0.9)), patience=10).step == 2
    assert select_best([], patience=10) is None


@pytest.mark.parametrize(("patience", "step"), [(1, 1), (2, 1), (3, 4)])
def test_patience_ends_the_search(patience, step):
    rising_late = scores((0.5, 1.0), (0.4, 1.0), (0.4, 1.0), (0.9, 1.0))
    assert select_best(rising_late, patience=patience).step == step
    assert patience_is_over(rising_late, patience=patience) == (patience < 3)
    assert not patience_is_over(rising_late[:1], patience=patience)


def test_the_weights_of_the_best_step_are_kept(tmp_path):
    network, best = nn.Linear(1, 1), BestWeights(tmp_path, patience=10)
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.5)):
        nn.init.constant_(network.weight, step)
        best.offer(Score(step=step, value=accuracy), network)
    best.load_into(network)
    assert network.weight.item() == 2
    assert BestWeights(tmp_path, patience=10).score == best.score


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    network, best = nn.Linear(1, 1), BestWeights(tmp_path, patience=10)
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.9)):
        best.offer(Score(step=step, value=accuracy), network)
    again = BestWeights(tmp_path, patience=10)
    nn.init.constant_(network.weight, 7)
    again.offer(Score(step=2, value=0.8), network)
    assert [score.step for score in again.scores] == [1, 2]
    again.load_into(other := nn.Linear(1, 1))
    assert torch.equal(other.weight, network.weight)
