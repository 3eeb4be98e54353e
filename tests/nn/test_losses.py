import math

import pytest
import torch

from diptych.nn.losses import token_loss


def naive(logits, target, counts, label_smoothing):
    rows = []
    for b in range(len(target)):
        losses = []
        for k in range(target.shape[1]):
            if counts[b, k]:
                log_p = logits[b, k].log_softmax(-1)
                losses.append(-(1 - label_smoothing) * log_p[target[b, k]] - label_smoothing * log_p.mean())
        rows.append(torch.stack(losses).mean())
    return torch.stack(rows).mean()


def test_equals_a_naive_loop():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    counts = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    found = token_loss(logits, target, counts, label_smoothing=0.1)
    torch.testing.assert_close(found, naive(logits, target, counts, 0.1))


def test_uniform_logits_cost_log_c():
    counts = torch.ones(2, 3, dtype=torch.bool)
    found = token_loss(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.long), counts, label_smoothing=0.1)
    assert found.item() == pytest.approx(math.log(7))


def test_what_does_not_count_changes_nothing_and_any_split_of_rows_gives_the_same():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    counts = torch.rand(4, 3) > 0.4
    counts[:, 0] = True
    whole = token_loss(logits, target, counts, label_smoothing=0.1)
    torch.testing.assert_close(token_loss(logits + 9 * ~counts[..., None], target, counts, label_smoothing=0.1), whole)
    moved = torch.where(counts[..., None], logits, torch.randn(4, 3, 5))
    torch.testing.assert_close(token_loss(moved, target, counts, label_smoothing=0.1), whole)
    halves = [token_loss(logits[i::2], target[i::2], counts[i::2], label_smoothing=0.1) for i in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, whole)
