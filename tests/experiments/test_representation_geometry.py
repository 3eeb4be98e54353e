import pytest
import torch

from diptych.experiments import representation as geometry
from diptych.experiments.representation import class_margin, margins, silhouette


@pytest.fixture
def cloud() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.tensor([0, 0, 0, 2, 2, 3, 0, 2, 3, 3, 3, 4])  # no item of class 1, one of class 4
    centres_CD = torch.randn(5, 4, generator=generator)
    return centres_CD[labels_N] + 0.7 * torch.randn(12, 4, generator=generator), labels_N


def naive_silhouette(features, labels) -> float:
    values = []
    for i, (x, own) in enumerate(zip(features, labels, strict=True)):
        distances = {}
        for j, (y, other) in enumerate(zip(features, labels, strict=True)):
            if i != j:
                distances.setdefault(int(other), []).append(float((x - y).norm()))
        means = {c: sum(d) / len(d) for c, d in distances.items()}
        if int(own) not in means:
            values.append(0.0)
            continue
        a, b = means[int(own)], min(mean for c, mean in means.items() if c != int(own))
        values.append((b - a) / max(a, b))
    return sum(values) / len(values)


def naive_margin(features, labels) -> float:
    def cosine(x, rows) -> float:
        mean = torch.stack([row / row.norm() for row in rows]).mean(0)
        return float(x @ mean / x.norm() / mean.norm())

    values = []
    for i, own in enumerate(labels.tolist()):
        mates = [features[j] for j in range(len(labels)) if j != i and labels[j] == own]
        if mates:
            others = [cosine(features[i], features[labels == c]) for c in set(labels.tolist()) - {own}]
            values.append(cosine(features[i], mates) - max(others))
    return sum(values) / len(values)


@pytest.mark.parametrize("rows", [1024, 5])
def test_silhouette_equals_a_naive_loop(cloud, rows, monkeypatch):
    monkeypatch.setattr(geometry, "_ROWS", rows)
    assert silhouette(*cloud) == pytest.approx(naive_silhouette(*cloud), abs=1e-6)


def test_silhouette_by_hand():
    """On a line: 0 and 1 against 4. For 0: a = 1, b = 4; for 1: a = 1, b = 3; 4 is alone."""
    found = silhouette(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1]))
    assert found == pytest.approx((3 / 4 + 2 / 3 + 0) / 3)


def test_the_class_margin_equals_a_naive_loop(cloud):
    assert class_margin(*cloud) == pytest.approx(naive_margin(*cloud), abs=1e-6)


def test_margins_by_hand():
    scores_NC = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 7.0]])
    assert margins(scores_NC, torch.tensor([0, 1])).tolist() == [1.0, -2.0]


def test_both_grow_as_classes_move_apart(cloud):
    features_ND, labels_N = cloud
    apart_ND = features_ND + 5 * torch.nn.functional.one_hot(labels_N)[:, :4]
    assert silhouette(apart_ND, labels_N) > silhouette(features_ND, labels_N) + 0.1
    assert class_margin(apart_ND, labels_N) > class_margin(features_ND, labels_N) + 0.1
