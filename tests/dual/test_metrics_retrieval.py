import pytest
import torch
import torch.nn.functional as F

from diptych.dual import metrics as module
from diptych.dual.metrics import ranks, retrieval

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
    monkeypatch.setattr(module, "_SCORES", held)
    images, texts = embeddings()
    own = torch.arange(7)
    found = ranks(images, texts, group_Q=own, group_T=IMAGE_OF)
    expected = [naive_rank((texts @ images[i]).tolist(), (i == IMAGE_OF).tolist()) for i in range(7)]
    assert found.tolist() == expected
    assert len(set(expected)) > 1
    found = ranks(texts, images, group_Q=IMAGE_OF, group_T=own)
    assert found.tolist() == [
        naive_rank((images @ texts[t]).tolist(), (own == IMAGE_OF[t]).tolist()) for t in range(11)
    ]


def test_by_hand():
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
    found = ranks(images, texts[:3], group_Q=torch.arange(7), group_T=IMAGE_OF[:3])
    assert found[1] == 4


def test_captions_of_one_image_do_not_compete():
    images, _ = embeddings()
    texts = images.repeat_interleave(12, 0)
    found = retrieval(images, texts, image_of_T=torch.arange(7).repeat_interleave(12))
    assert found.image_to_text.r1 == found.text_to_image.r1 == 1
