import pytest
import torch
import torch.nn.functional as F

from diptych.errors import UserError
from diptych.eval.probe import caption_fits, fit_linear, left_out_predictions, linear_probe


def clouds(seed: int, *, items: int = 300, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes whose first two coordinates tell them apart, among coordinates of other scales."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (items,), generator=draw)
    noise = torch.randn(items, 6, generator=draw)
    centres = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    features = torch.cat([centres[labels] + spread * noise[:, :2], noise[:, 2:] * torch.tensor([100.0, 1, 0.01, 0])], 1)
    return features, labels


@pytest.mark.parametrize("l2", [1.0, 0.01])
@pytest.mark.parametrize("wide", [False, True])
def test_the_fit_is_the_minimum(l2, wide):
    """Also where there are more features than items."""
    features, labels = clouds(0)
    start = None
    if wide:
        more = torch.randn(300, 74, generator=torch.Generator().manual_seed(2))
        features, labels = torch.cat([features, more], 1)[:20], labels[:20]
        start = fit_linear(features + more[:20, :1], labels, classes=3, l2=1.0)
    found = fit_linear(features, labels, classes=3, l2=l2, start=start)
    weight, bias = found.weight_DC.double().requires_grad_(), found.bias_C.double().requires_grad_()
    normal = ((features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-6)).double()
    loss = F.cross_entropy(normal @ weight + bias, labels) + l2 / 2 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-4, rtol=0)


def test_where_it_starts_does_not_matter():
    features, labels = clouds(0)
    strong = fit_linear(features, labels, classes=3, l2=1)
    cold, warm = (fit_linear(features, labels, classes=3, l2=0.1, start=start) for start in (None, strong))
    torch.testing.assert_close(cold.weight_DC, warm.weight_DC, atol=1e-3, rtol=0)
    assert not torch.allclose(cold.weight_DC, strong.weight_DC, atol=1e-2)


def test_reads_what_is_there_and_nothing_where_nothing_is():
    train, test = clouds(0), clouds(1)
    assert linear_probe(*train, *test).accuracy > 0.9
    wrong = test[1][torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(train[0], train[1].roll(1), test[0], wrong).accuracy < 0.5


def test_scale_and_shift_of_the_features_do_not_matter():
    train, test = clouds(0, spread=1.0), clouds(1, spread=1.0)
    other = linear_probe(train[0] * 1000 + 5, train[1], test[0] * 1000 + 5, test[1])
    assert other.accuracy == pytest.approx(linear_probe(*train, *test).accuracy, abs=0.01)


def test_the_test_items_choose_nothing():
    """Another test set changes neither the l2 nor the validation accuracy."""
    train, test = clouds(0, spread=1.5), clouds(1, spread=1.5)
    one = linear_probe(*train, *test)
    other = linear_probe(*train, test[0][:3] * 50, (test[1][:3] + 1) % 3)
    assert (one.l2, one.validation_accuracy) == (other.l2, other.validation_accuracy)


def test_the_l2_is_the_one_that_the_given_validation_items_like():
    """Noise in many coordinates, few training items: weak l2 learns the noise by heart."""
    draw = torch.Generator().manual_seed(0)

    def noisy(items: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(items) % 2
        features = torch.randn(items, 100, generator=draw)
        features[:, 0] += 3.0 * labels
        return features, labels

    train, validation, test = noisy(40), noisy(400), noisy(400)
    chosen = linear_probe(*train, *test, validation=validation)
    scores = {
        l2: fit_linear(*train, classes=2, l2=l2).accuracy(*validation)
        for l2 in (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
    }
    assert scores[chosen.l2] == pytest.approx(max(scores.values()), abs=0.01)
    assert max(scores.values()) > min(scores.values())


def test_a_class_that_only_the_test_has_and_too_few_items():
    train, test = clouds(0), clouds(1)
    assert linear_probe(train[0], train[1].clamp(max=1), *test).accuracy < 0.8
    with pytest.raises(UserError, match="two training items or more, not 1"):
        linear_probe(train[0][:1], train[1][:1], *test)


def test_what_is_left_out_is_as_if_it_had_never_been_there():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=draw).double(), torch.randn(30, 3, generator=draw).double()
    queries, rows = torch.randn(40, 5, generator=draw).double(), torch.randint(30, (40,), generator=draw)
    found = left_out_predictions(x, y, queries_QX=queries, row_of_Q=rows)
    penalties = [s * torch.linalg.eigvalsh(x.T @ x).mean() for s in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)]

    def without(i, penalty):
        kept = torch.arange(30) != i
        return torch.linalg.solve(x[kept].T @ x[kept] + penalty * torch.eye(5), x[kept].T @ y[kept])

    errors = [sum((y[i] - x[i] @ without(i, p)).square().sum() for i in range(30)) for p in penalties]
    best = penalties[int(torch.stack(errors).argmin())]
    expected = torch.stack([q @ without(i, best) for q, i in zip(queries, rows, strict=True)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("each", [1, 3])
def test_captions_of_other_images_fit_worst(each):
    draw = torch.Generator().manual_seed(1)
    meaning = torch.randn(200, 8, generator=draw)
    images = meaning @ torch.randn(8, 20, generator=draw) + 0.3 * torch.randn(200, 20, generator=draw)
    of_text = torch.arange(200).repeat_interleave(each)
    texts = meaning[of_text] @ torch.randn(8, 12, generator=draw) + 0.3 * torch.randn(200 * each, 12, generator=draw)
    wrong = torch.randperm(len(texts), generator=draw)[: len(texts) // 10]
    texts[wrong] = texts[wrong.roll(1)]
    fits = caption_fits(images, texts, of_text)
    assert fits.shape == (200 * each,)
    worst = set(fits.argsort()[: len(wrong)].tolist())
    assert len(worst & set(wrong.tolist())) >= 0.85 * len(wrong)
    torch.testing.assert_close(caption_fits(5 * images + 1, texts, of_text), fits, atol=1e-3, rtol=0)
