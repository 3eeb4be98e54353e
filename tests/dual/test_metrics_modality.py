import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diptych.dual.metrics import modality_gap, modality_map
from diptych.errors import UserError


def cloud(seed: int, *, shift: float = 0.0) -> torch.Tensor:
    points = torch.randn(400, 16, generator=torch.Generator().manual_seed(seed))
    points[:, 0] += shift
    return F.normalize(points, dim=1)


def test_two_clouds_and_one():
    apart = modality_gap(cloud(0, shift=8), cloud(1, shift=-8))
    assert 1.5 < apart.distance <= 2
    assert apart.accuracy == 1
    together = modality_gap(cloud(0), cloud(1))
    assert together.distance < 0.2
    assert 0.35 < together.accuracy < 0.65


def test_by_hand():
    images, texts = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[-1.0, 0], [0, 1]])
    assert modality_gap(images, texts).distance == 1
    with pytest.raises(UserError, match="two pairs or more, not 1"):
        modality_gap(images[:1], texts[:1])


def test_the_classifier_is_tested_on_pairs_it_has_not_seen():
    """With more coordinates than pairs everything can be learnt by heart."""
    draw = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(60, 500, generator=draw), dim=1) for _ in range(2))
    assert modality_gap(images, texts).accuracy < 0.75


class Flat:
    """In place of UMAP: the first two coordinates."""

    def __init__(self, **settings: object) -> None:
        assert settings == {"metric": "cosine", "random_state": 3}

    def fit_transform(self, points: np.ndarray) -> np.ndarray:
        return points[:, :2]


def test_the_map_has_a_panel_for_each_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Flat))
    one, two = (
        np.asarray(Image.open(io.BytesIO(modality_map(spaces, seed=3))))
        for spaces in (
            {"CLIP": (cloud(0), cloud(1))},
            {"CLIP": (cloud(0), cloud(1)), "ITO": (cloud(0), cloud(1))},
        )
    )
    assert two.shape[1] == 2 * one.shape[1]
    assert len(np.unique(one.reshape(-1, one.shape[-1]), axis=0)) > 50  # two colours over each other on white


def test_without_umap_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # importing it fails
    with pytest.raises(UserError, match=r"pip install 'diptych\[umap\]'"):
        modality_map({"CLIP": (cloud(0), cloud(1))})
