import torch

from diptych.nn.gradients import gather_rows, scale_gradient, straight_through_embedding


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
