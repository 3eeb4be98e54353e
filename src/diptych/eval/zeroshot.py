"""Classes told by their names alone: the class whose text lies nearest to the picture.

Shapes: B pictures, C classes, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.data.class_texts import from_templates

PLAIN = ("a photo of a {}.",)
ENSEMBLE = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a cropped photo of a {}.",
    "a drawing of a {}.",
    "a {} in the background.",
    "there is a {} in the picture.",
    "{}",
)
"""Ways in which captions speak of a thing. One prompt is one point; their mean lies nearer to the meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAccuracy:
    """Shares of pictures."""

    top1: float
    top5: float
    """The right class is among the five best: no skill where there are five classes or fewer."""


def class_embeddings(
    embed: Callable[[list[str]], Tensor], names: Sequence[str], *, templates: Sequence[str] = ENSEMBLE
) -> Float[Tensor, "C D"]:
    """One L2-normalised embedding a class: the mean over the normalised embeddings of its prompts.

    ``embed`` gives L2-normalised embeddings. Raises UserError for a template without the place ``{}`` of the name.
    """
    prompts = [text for texts in from_templates(names, templates) for text in texts]
    mean_CD = embed(prompts).unflatten(0, (len(names), len(templates))).mean(1)
    return F.normalize(mean_CD, dim=-1)


def class_accuracy(scores_BC: Float[Tensor, "B C"], labels_B: Int[Tensor, "B"]) -> ClassAccuracy:
    """A class that scores the same as the right one counts as better."""
    right_B1 = scores_BC.gather(1, labels_B[:, None])
    rank_B = (scores_BC >= right_B1).sum(1)
    top1, top5 = ((rank_B <= k).float().mean().item() for k in (1, 5))
    return ClassAccuracy(top1=top1, top5=top5)
