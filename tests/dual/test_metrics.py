import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diptych.dual import metrics
from diptych.dual.metrics import (
    ENSEMBLE,
    RightTargets,
    class_accuracy,
    class_embeddings,
    modality_gap,
    modality_map,
    ranks,
    retrieval,
)
from diptych.errors import UserError

# Retrieval

IMAGE_OF = torch.tensor([0, 0, 2, 1, 1, 1, 3, 4, 6, 5, 5])


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(7, 8, generator=draw), dim=1)
    texts = F.normalize(images[IMAGE_OF] + 0.8 * torch.randn(len(IMAGE_OF), 8, generator=draw), dim=1)
    return images, texts


def naive_rank(scores: list[float], right: list[bool]) -> int:
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    return 1 + sum(score >= best and not is_right for score, is_right in zip(scores, right, strict=True))


@pytest.mark.parametrize("held", [1, 20, 2**24])
def test_ranks_equal_a_naive_loop(monkeypatch, held):
    monkeypatch.setattr(metrics, "_SCORES", held)
    images, texts = embeddings()
    for wording in (list(range(11)), [7, 3, 7, 0, 4, 1, 2, 0, 5, 6, 7]):
        right = RightTargets(7, IMAGE_OF, torch.tensor(wording))
        own = [{word for word, image in zip(wording, IMAGE_OF.tolist(), strict=True) if image == i} for i in range(7)]
        found = ranks(images, texts, right=right.texts_of_images)
        expected = [naive_rank((texts @ images[i]).tolist(), [word in own[i] for word in wording]) for i in range(7)]
        assert found.tolist() == expected
        assert len(set(expected)) > 1
        found = ranks(texts, images, right=right.images_of_texts)
        assert found.tolist() == [
            naive_rank((images @ texts[t]).tolist(), [wording[t] in own[i] for i in range(7)]) for t in range(11)
        ]


def test_a_hit_on_an_equal_text_is_right():
    """Two images share a caption; nothing can tell the two copies of its embedding apart."""
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    strict = retrieval(images, texts, image_of_T=torch.arange(3))
    assert (strict.image_to_text.r1, strict.text_to_image.r1) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    shared = retrieval(images, texts, image_of_T=torch.arange(3), wording_T=torch.tensor([4, 4, 9]))
    assert (shared.image_to_text.r1, shared.text_to_image.r1) == (pytest.approx(2 / 3), 1.0)


def test_retrieval_by_hand():
    """Image 0 finds its second caption first; image 1 has a foreign text before its own."""
    images = torch.eye(2)
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    found = retrieval(images, texts, image_of_T=torch.tensor([0, 0, 1]))
    assert (found.images, found.texts) == (2, 3)
    assert (found.image_to_text.r1, found.image_to_text.r5) == (0.5, 1.0)
    assert found.text_to_image.r1 == pytest.approx(2 / 3)
    assert found.mean_r1 == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found.table()["text_to_image/r1"] == found.text_to_image.r1


def test_equal_scores_are_no_find():
    same = torch.ones(20, 4) / 2
    found = retrieval(same, same, image_of_T=torch.arange(20))
    assert found.image_to_text.r10 == found.text_to_image.r10 == 0
    assert found.image_to_text.median_rank == 20


def test_without_a_right_target_a_query_is_last():
    images, texts = embeddings()
    found = ranks(images, texts[:3], right=RightTargets(7, IMAGE_OF[:3]).texts_of_images)
    assert found[1] == 4


def test_captions_of_one_image_do_not_compete():
    images, _ = embeddings()
    texts = images.repeat_interleave(12, 0)
    found = retrieval(images, texts, image_of_T=torch.arange(7).repeat_interleave(12))
    assert found.image_to_text.r1 == found.text_to_image.r1 == 1


# Zero-shot classification


def embed(prompts: list[str]) -> torch.Tensor:
    """A direction for each text, which follows from its letters."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, prompt)))) for prompt in prompts]
    return F.normalize(torch.stack(rows), dim=1)


def test_a_class_is_the_normalized_mean_of_its_normalized_prompts():
    found = class_embeddings(embed, ["cat", "dog"], templates=["a {}.", "the {} of {}"])
    for row, name in zip(found, ["cat", "dog"], strict=True):
        mean = embed([f"a {name}.", f"the {name} of {name}"]).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())


def test_the_ensemble_is_whole():
    assert len(set(ENSEMBLE)) == len(ENSEMBLE)
    assert class_embeddings(embed, ["cat"]).shape == (1, 6)


def test_a_template_without_a_place_for_the_name():
    with pytest.raises(UserError, match=r"'a photo' has no \{\}"):
        class_embeddings(embed, ["cat"], templates=["a {}", "a photo"])


def test_a_brace_in_a_name_is_a_letter():
    torch.testing.assert_close(class_embeddings(embed, ["{0}"], templates=["a {}"]), embed(["a {0}"]))


def test_class_accuracy_by_hand():
    scores = torch.tensor(
        [[9.0, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 0]]
    )
    found = class_accuracy(scores, torch.tensor([0, 3, 1, 0]))
    assert (found.top1, found.top5) == (0.25, 0.5)


# The modality gap


def cloud(seed: int, *, shift: float = 0.0) -> torch.Tensor:
    points = torch.randn(400, 16, generator=torch.Generator().manual_seed(seed))
    points[:, 0] += shift
    return F.normalize(points, dim=1)


def test_modality_gap_of_two_clouds_and_of_one():
    apart = modality_gap(cloud(0, shift=8), cloud(1, shift=-8))
    assert 1.5 < apart.distance <= 2
    assert apart.accuracy == 1
    together = modality_gap(cloud(0), cloud(1))
    assert together.distance < 0.2
    assert 0.35 < together.accuracy < 0.65


def test_modality_gap_by_hand():
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
