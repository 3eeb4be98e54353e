import math

import pytest
import torch

from diptych.nn.functional import gather_rows, scale_gradient, straight_through_embedding, token_loss

# Cross-entropy


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


# Gradients


def test_scale_gradient_keeps_the_value_and_scales_the_gradient():
    z = torch.randn(3, 4, requires_grad=True)
    out = scale_gradient(z, 0.1)
    torch.testing.assert_close(out, z)
    out.sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, 0.1))


def dense(logits, table):
    """The definition: hard + (soft - soft.detach()), times the table."""
    soft = logits.softmax(-1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return (hard + (soft - soft.detach())) @ table


def test_straight_through_embedding_equals_the_dense_product():
    torch.manual_seed(0)
    logits, table = torch.randn(2, 5, 7), torch.randn(7, 3)
    ours = [logits.clone().requires_grad_(), table.clone().requires_grad_()]
    plain = [logits.clone().requires_grad_(), table.clone().requires_grad_()]
    weight = torch.randn(2, 5, 3)
    out, expected = straight_through_embedding(*ours), dense(*plain)
    torch.testing.assert_close(out, expected)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours[0].grad, plain[0].grad, atol=1e-7, rtol=1e-5)
    # The dense product's table sees the soft part too; its value is zero, so its gradient is the hard rows alone.
    torch.testing.assert_close(ours[1].grad, plain[1].grad, atol=1e-6, rtol=1e-5)


def test_no_gradient_for_a_frozen_table():
    logits, table = torch.randn(4, 7, requires_grad=True), torch.randn(7, 3)
    straight_through_embedding(logits, table).sum().backward()
    assert logits.grad is not None
    assert table.grad is None


def test_impossible_entries_are_never_taken_and_give_no_nan():
    logits = torch.randn(4, 7)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    table = torch.eye(7)
    out = straight_through_embedding(logits, table)
    assert (out[:, 2] == 0).all()
    (out * torch.randn(4, 7)).sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 2] == 0).all()


def test_one_process_gets_its_own_rows_back():
    """With two, every objective is compared in tests/dual/test_objectives.py."""
    rows = torch.randn(2, 3, 4)
    assert gather_rows(rows) is rows
