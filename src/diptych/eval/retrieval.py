"""Does a picture find its captions among all texts, and a text its picture among all pictures?

Shapes: I images, T texts (several may belong to an image), Q queries, D width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SCORES = 2**24
"""Similarities held at once: 64 MB, and as much again for what belongs together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Of one direction: the share of queries with a right answer among the first 1, 5 and 10."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    """1 is best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Both directions."""

    images: int
    texts: int
    image_to_text: Recall
    text_to_image: Recall

    @property
    def mean_r1(self) -> float:
        return (self.image_to_text.r1 + self.text_to_image.r1) / 2

    def table(self) -> dict[str, float]:
        """Flat, for reports."""
        sides = (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image))
        found = {f"{name}/{key}": getattr(side, key) for name, side in sides for key in side.__dataclass_fields__}
        return {"images": self.images, "texts": self.texts, **found, "mean_r1": self.mean_r1}


def retrieval(
    images_ID: Float[Tensor, "I D"], texts_TD: Float[Tensor, "T D"], *, image_of_T: Int[Tensor, "T"]
) -> Retrieval:
    """Recall by cosine; embeddings are L2-normalised and ``image_of_T`` is the row of each text's image."""
    own_I = torch.arange(len(images_ID), device=images_ID.device)
    return Retrieval(
        images=len(images_ID),
        texts=len(texts_TD),
        image_to_text=_recall(ranks(images_ID, texts_TD, group_Q=own_I, group_T=image_of_T)),
        text_to_image=_recall(ranks(texts_TD, images_ID, group_Q=image_of_T, group_T=own_I)),
    )


def ranks(
    queries_QD: Float[Tensor, "Q D"], targets_TD: Float[Tensor, "T D"], *,
    group_Q: Int[Tensor, "Q"], group_T: Int[Tensor, "T"],
) -> Int[Tensor, "Q"]:  # fmt: skip
    """Place of the best right target of each query; a target is right when it is of the query's group.

    The first place is 1. A wrong target that scores the same stands before the right one: a model that gives
    everything the same embedding finds nothing. Right targets do not stand in each other's way. A query without any
    right target comes last.
    """
    found = []
    for start in range(0, len(queries_QD), rows := max(1, _SCORES // max(1, len(targets_TD)))):
        scores_QT = queries_QD[start : start + rows] @ targets_TD.T
        right_QT = group_Q[start : start + rows, None] == group_T
        best_Q1 = scores_QT.masked_fill(~right_QT, -torch.inf).amax(1, keepdim=True)
        before_QT = (scores_QT >= best_Q1) & ~right_QT
        found.append(1 + before_QT.sum(1))
    return torch.cat(found)


def _recall(rank_Q: Int[Tensor, "Q"]) -> Recall:
    r1, r5, r10 = ((rank_Q <= k).float().mean().item() for k in (1, 5, 10))
    return Recall(r1=r1, r5=r5, r10=r10, median_rank=rank_Q.float().median().item())
