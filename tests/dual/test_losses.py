import math

import pytest
import torch

from diptych.dual.losses import info_nce, multi_view_info_nce, multi_view_nt_xent, nt_xent, sigmoid_loss, similarities

ROWS, WIDTH = 5, 8
SCALE = torch.tensor(7.0)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, WIDTH, generator=generator), dim=-1)


def log_softmax_at(logits: list[float], index: int) -> float:
    return logits[index] - math.log(sum(math.exp(value) for value in logits))


def test_info_nce_equals_loops():
    image, text = vectors(ROWS), vectors(ROWS, seed=1)
    total = 0.0
    for i in range(ROWS):
        total -= log_softmax_at([7 * float(image[i] @ text[j]) for j in range(ROWS)], i)
        total -= log_softmax_at([7 * float(text[i] @ image[j]) for j in range(ROWS)], i)
    assert info_nce(image, text, SCALE).item() == pytest.approx(total / (2 * ROWS), rel=1e-5)


def test_info_nce_of_orthonormal_pairs():
    """Own cosine 1, all others 0: -log e^s / (e^s + B - 1)."""
    unit = torch.eye(WIDTH)[:ROWS]
    assert info_nce(unit, unit, SCALE).item() == pytest.approx(math.log(math.exp(7) + ROWS - 1) - 7, abs=1e-5)
    same = torch.ones(ROWS, WIDTH) / math.sqrt(WIDTH)
    assert info_nce(same, same, SCALE).item() == pytest.approx(math.log(ROWS), rel=1e-5)


def test_multi_view_is_the_mean_over_all_pairs_of_view_and_caption():
    images, texts = vectors(3, ROWS), vectors(2, ROWS, seed=1)
    wanted = sum(info_nce(images[v], texts[m], SCALE) for v in range(3) for m in range(2)) / 6
    torch.testing.assert_close(multi_view_info_nce(images, texts, SCALE), wanted)


def test_nt_xent_equals_loops():
    first, second = vectors(ROWS), vectors(ROWS, seed=1)
    total = 0.0
    for a, b in ((first, second), (second, first)):
        for i in range(ROWS):
            others = [7 * float(a[i] @ a[j]) for j in range(ROWS) if j != i]
            across = [7 * float(a[i] @ b[j]) for j in range(ROWS)]
            total -= log_softmax_at([*across, *others], i)
    assert nt_xent(first, second, SCALE).item() == pytest.approx(total / (2 * ROWS), rel=1e-5)


def test_nt_xent_of_orthonormal_pairs():
    """Own 1; B - 1 zeros in the other view and B - 1 in the same one."""
    unit = torch.eye(WIDTH)[:ROWS]
    wanted = math.log(math.exp(7) + 2 * (ROWS - 1)) - 7
    assert nt_xent(unit, unit, SCALE).item() == pytest.approx(wanted, abs=1e-5)


def test_more_views_are_compared_two_by_two():
    views = vectors(3, ROWS)
    wanted = (
        nt_xent(views[0], views[1], 5.0) + nt_xent(views[0], views[2], 5.0) + nt_xent(views[1], views[2], 5.0)
    ) / 3
    torch.testing.assert_close(multi_view_nt_xent(views, 5.0), wanted)


def test_sigmoid_loss_equals_loops():
    image, text = vectors(ROWS), vectors(ROWS, seed=1)
    total = 0.0
    for i in range(ROWS):
        for j in range(ROWS):
            logit = (1 if i == j else -1) * (7 * float(image[i] @ text[j]) - 3)
            total += math.log(1 + math.exp(-logit))
    assert sigmoid_loss(image, text, SCALE, torch.tensor(-3.0)).item() == pytest.approx(total / ROWS, rel=1e-5)


@pytest.mark.parametrize("loss", [info_nce, nt_xent, lambda a, b, s: sigmoid_loss(a, b, s, torch.tensor(-1.0))])
def test_gradients_reach_both_sides_and_the_scale(loss):
    a, b, scale = vectors(ROWS).requires_grad_(), vectors(ROWS, seed=1).requires_grad_(), SCALE.clone().requires_grad_()
    gradients = torch.autograd.grad(loss(a, b, scale), [a, b, scale])
    assert all(gradient.abs().amax() > 1e-4 for gradient in gradients)
    assert all((gradient.abs().amax(-1) > 0).all() for gradient in gradients[:2])


def test_similarities_are_fp32_under_autocast():
    a, b = vectors(ROWS), vectors(ROWS, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(a, b, SCALE)
    torch.testing.assert_close(found, 7 * a @ b.T, rtol=0, atol=1e-6)
