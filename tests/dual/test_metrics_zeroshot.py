import pytest
import torch
import torch.nn.functional as F

from diptych.dual.metrics import ENSEMBLE, class_accuracy, class_embeddings
from diptych.errors import UserError


def embed(prompts: list[str]) -> torch.Tensor:
    """A direction for each text, which follows from its letters."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, prompt)))) for prompt in prompts]
    return F.normalize(torch.stack(rows), dim=1)


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts():
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


def test_accuracy_by_hand():
    scores = torch.tensor(
        [[9.0, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 0]]
    )
    found = class_accuracy(scores, torch.tensor([0, 3, 1, 0]))
    assert (found.top1, found.top5) == (0.25, 0.5)
