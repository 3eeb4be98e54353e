"""Does a picture find its captions among all texts, and a text its picture among all pictures?

Shapes: I images, T texts (several may belong to an image), Q queries, D width.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from diptych.data.class_texts import from_templates
from diptych.errors import UserError
from diptych.eval.probe import fit_linear
from diptych.report.figures import SERIES, STYLE
from diptych.rng import derive_seed

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


# JOINED eval.zeroshot
#| Classes told by their names alone: the class whose text lies nearest to the picture.
#|
#| Shapes: B pictures, C classes, D width.


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


# JOINED eval.modality
#| Do images and texts live in one space, or in two clouds side by side?
#|
#| Shapes: N pairs, D width.


_L2 = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityGap:
    """How far apart the two kinds of embeddings are."""

    distance: float
    """Between the mean image and the mean text; embeddings have length 1, so that 0 is together and 2 opposite."""
    accuracy: float
    """Of a linear classifier that tells images from texts, on pairs it has not seen; 0.5 is intertwined."""


def modality_gap(images_ND: Float[Tensor, "N D"], texts_ND: Float[Tensor, "N D"], *, seed: int = 0) -> ModalityGap:
    """Of L2-normalised pairs: half of them, drawn by ``seed``, trains the classifier and the other half tests it."""
    pairs = len(images_ND)
    if pairs < 2:
        raise UserError(f"a modality gap needs two pairs or more, not {pairs}")
    order_N = torch.randperm(pairs, generator=torch.Generator().manual_seed(derive_seed(seed, "modality")))
    train, test = order_N.to(images_ND.device).tensor_split(2)
    both = [torch.cat([images_ND[half], texts_ND[half]]) for half in (train, test)]
    kind = [torch.arange(2, device=images_ND.device).repeat_interleave(len(half)) for half in (train, test)]
    classifier = fit_linear(both[0], kind[0], classes=2, l2=_L2)
    distance = (images_ND.mean(0) - texts_ND.mean(0)).norm().item()
    return ModalityGap(distance=distance, accuracy=classifier.accuracy(both[1], kind[1]))


def modality_map(spaces: dict[str, tuple[Tensor, Tensor]], *, seed: int = 0) -> bytes:
    """A PNG with a panel for each model: UMAP of its image and text embeddings (both [N D]), by cosine.

    Distances within a panel mean something, places and axes nothing. Raises UserError without the extra ``umap``.
    """
    umap = import_umap()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one seed means one thread, and what numba deprecates in itself
        flat = {
            name: umap.UMAP(metric="cosine", random_state=seed).fit_transform(torch.cat(sides).cpu().numpy())
            for name, sides in spaces.items()
        }
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(4.2 * len(flat), 4.2), layout="constrained")
        for axes, (name, points_N2) in zip(figure.subplots(1, len(flat), squeeze=False)[0], flat.items(), strict=True):
            kinds = zip(("images", "texts"), np.split(points_N2, [len(spaces[name][0])]), SERIES, strict=False)
            for label, some_N2, colour in kinds:
                axes.scatter(*some_N2.T, s=3, color=colour, alpha=0.5, linewidths=0, label=label)
            axes.set(title=name, xticks=[], yticks=[])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=4)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def import_umap() -> Any:
    """The module. Raises UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import umap
    except ImportError as error:
        raise UserError(f"the map needs umap-learn ({error}): pip install 'diptych[umap]'") from error
    return umap
