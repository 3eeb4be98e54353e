import pytest
import torch
from torch import nn

from diptych.uml.selection import Best, Score, is_over, select


def scores(*pairs):
    return [Score(step=step, accuracy=a, loss=loss) for step, (a, loss) in enumerate(pairs, 1)]


def test_the_best_accuracy_is_selected_and_the_loss_decides_between_equals():
    assert select(scores((0.5, 1.0), (0.7, 2.0), (0.6, 0.1)), patience=10).step == 2
    assert select(scores((0.5, 1.0), (0.5, 0.8), (0.5, 0.9)), patience=10).step == 2
    assert select([], patience=10) is None


@pytest.mark.parametrize(("patience", "step"), [(1, 1), (2, 1), (3, 4)])
def test_patience_ends_the_search(patience, step):
    rising_late = scores((0.5, 1.0), (0.4, 1.0), (0.4, 1.0), (0.9, 1.0))
    assert select(rising_late, patience=patience).step == step
    assert is_over(rising_late, patience=patience) == (patience < 3)
    assert not is_over(rising_late[:1], patience=patience)


def test_the_weights_of_the_best_step_are_kept(tmp_path):
    network, best = nn.Linear(1, 1), Best(tmp_path, patience=10)
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.5)):
        nn.init.constant_(network.weight, step)
        best.offer(Score(step=step, accuracy=accuracy, loss=1.0), network)
    best.load_into(network)
    assert network.weight.item() == 2
    assert Best(tmp_path, patience=10).score == best.score


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path):
    network, best = nn.Linear(1, 1), Best(tmp_path, patience=10)
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.9)):
        best.offer(Score(step=step, accuracy=accuracy, loss=1.0), network)
    again = Best(tmp_path, patience=10)
    nn.init.constant_(network.weight, 7)
    again.offer(Score(step=2, accuracy=0.8, loss=1.0), network)
    assert [score.step for score in again.scores] == [1, 2]
    again.load_into(other := nn.Linear(1, 1))
    assert torch.equal(other.weight, network.weight)
