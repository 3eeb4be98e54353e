"""Scores of embeddings of images and texts: retrieval, zero-shot classification and the modality gap.

All functions take L2-normalized embeddings, and depend on no model and no data.

Shapes: I images, T texts (several may belong to an image), Q queries, B images to classify, C classes, N pairs,
D width.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.data.class_texts import from_templates
from diptych.errors import UserError
from diptych.eval.probe import fit_linear
from diptych.report.figures import SERIES, STYLE
from diptych.rng import derive_seed

_SCORES = 2**24
"""Number of similarities held at once: 64 MB, and as much again for which of them are right."""
_L2 = 1e-3
"""Weight decay of the classifier that measures the modality gap."""

PLAIN = ("a photo of a {}.",)
"""One prompt for each class."""
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
"""Prompts in the manner of captions. The mean of their embeddings is nearer to the meaning of a name than any one."""


# Retrieval


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """One direction: the share of queries that have a right target among their 1, 5 and 10 best, 0 to 1."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    """Median over queries of the place of the best right target; 1 is best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Recall in both directions."""

    images: int
    texts: int
    image_to_text: Recall
    text_to_image: Recall

    @property
    def mean_r1(self) -> float:
        """The mean of R@1 over both directions."""
        return (self.image_to_text.r1 + self.text_to_image.r1) / 2

    def table(self) -> dict[str, float]:
        """All numbers by flat names such as ``image_to_text/r1``, for reports."""
        sides = {"image_to_text": asdict(self.image_to_text), "text_to_image": asdict(self.text_to_image)}
        found = {f"{side}/{name}": value for side, recall in sides.items() for name, value in recall.items()}
        return {"images": self.images, "texts": self.texts, **found, "mean_r1": self.mean_r1}


def retrieval(
    images_ID: Float[Tensor, "I D"],
    texts_TD: Float[Tensor, "T D"],
    *,
    image_of_T: Int[Tensor, "T"],
    wording_T: Int[Tensor, "T"] | None = None,
) -> Retrieval:
    """Recall by cosine: does an image find its texts among all texts, and a text its image among all images?

    ``image_of_T`` is the row of each text's image. Texts of the same number in ``wording_T`` are equal, and a hit on an
    equal text, or on the image of one, is right: no model can tell them apart. Without it all texts are different.
    """
    right = RightTargets(len(images_ID), image_of_T, wording_T)
    return Retrieval(
        images=len(images_ID),
        texts=len(texts_TD),
        image_to_text=_recall(ranks(images_ID, texts_TD, right=right.texts_of_images)),
        text_to_image=_recall(ranks(texts_TD, images_ID, right=right.images_of_texts)),
    )


class RightTargets:
    """Which texts are right for an image, and which images for a text. Takes the arguments of :func:`retrieval`."""

    def __init__(self, images: int, image_of_T: Int[Tensor, "T"], wording_T: Int[Tensor, "T"] | None = None) -> None:
        self.images, self.image_of_T = images, image_of_T
        every_T = torch.arange(len(image_of_T), device=image_of_T.device)
        self.wording_T = every_T if wording_T is None else wording_T.unique(return_inverse=True)[1]

    def texts_of_images(self, start: int, end: int) -> Bool[Tensor, "Q T"]:
        """For the images from ``start`` to ``end``: the texts that are worded as one of their own."""
        own_T = (self.image_of_T >= start) & (self.image_of_T < end)
        place_T, count = self._places(self.wording_T[own_T])
        # What is worded as none of them has the place `count`, a column that stays False.
        worded_QW = self._table(end - start, count + 1, self.image_of_T[own_T] - start, place_T[own_T])
        return worded_QW[:, place_T]

    def images_of_texts(self, start: int, end: int) -> Bool[Tensor, "Q I"]:
        """For the texts from ``start`` to ``end``: the images that have a text of the same wording."""
        place_T, count = self._places(self.wording_T[start:end])
        worded_WI = self._table(count + 1, self.images, place_T, self.image_of_T)
        return worded_WI[place_T[start:end]]

    def _places(self, wording_N: Int[Tensor, "N"]) -> tuple[Int[Tensor, "T"], int]:
        """The place of each text's wording among the different ones of ``wording_N``, whose number comes second.

        The place of a wording that is not among them is this number.
        """
        found_W = wording_N.unique()
        place_of_wording = torch.full_like(self.wording_T, len(found_W))
        place_of_wording[found_W] = torch.arange(len(found_W), device=found_W.device)
        return place_of_wording[self.wording_T], len(found_W)

    @staticmethod
    def _table(rows: int, columns: int, row_N: Tensor, column_N: Tensor) -> Tensor:
        """A boolean table that is True at the given places."""
        table = torch.zeros(rows, columns, dtype=torch.bool, device=row_N.device)
        table[row_N, column_N] = True
        return table


def ranks(
    queries_QD: Float[Tensor, "Q D"],
    targets_TD: Float[Tensor, "T D"],
    *,
    right: Callable[[int, int], Bool[Tensor, "R T"]],
) -> Int[Tensor, "Q"]:
    """The place of each query's best right target among the wrong ones.

    ``right(start, end)`` tells which targets are right for the queries from ``start`` to ``end``. The first place is 1.
    A wrong target that scores the same as the right one is placed before it, so that a model that embeds everything
    alike finds nothing. Other right targets are not counted. A query without a right target gets the last place.
    """
    found = []
    for start in range(0, len(queries_QD), rows := max(1, _SCORES // max(1, len(targets_TD)))):
        scores_QT = queries_QD[start : start + rows] @ targets_TD.T
        right_QT = right(start, start + len(scores_QT))
        best_Q1 = scores_QT.masked_fill(~right_QT, -torch.inf).amax(1, keepdim=True)
        before_QT = (scores_QT >= best_Q1) & ~right_QT
        found.append(1 + before_QT.sum(1))
    return torch.cat(found)


def _recall(rank_Q: Int[Tensor, "Q"]) -> Recall:
    r1, r5, r10 = ((rank_Q <= k).float().mean().item() for k in (1, 5, 10))
    return Recall(r1=r1, r5=r5, r10=r10, median_rank=rank_Q.float().median().item())


# Zero-shot classification


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAccuracy:
    """Accuracies, from 0 to 1."""

    top1: float
    """Share with the right class as the best."""
    top5: float
    """Share with the right class among the five best: always 1 where there are five classes or fewer."""


def class_embeddings(
    embed: Callable[[list[str]], Tensor], names: Sequence[str], *, templates: Sequence[str] = ENSEMBLE
) -> Float[Tensor, "C D"]:
    """One L2-normalized embedding for each class: the normalized mean over the embeddings of its prompts.

    ``embed`` turns texts into L2-normalized embeddings. Raises UserError for a template without ``{}``, the place of
    the name.
    """
    prompts = [text for texts in from_templates(names, templates) for text in texts]
    mean_CD = embed(prompts).unflatten(0, (len(names), len(templates))).mean(1)
    return F.normalize(mean_CD, dim=-1)


def class_accuracy(scores_BC: Float[Tensor, "B C"], labels_B: Int[Tensor, "B"]) -> ClassAccuracy:
    """Shares of images whose right class is the best, or among the five best; equal scores count as better."""
    right_B1 = scores_BC.gather(1, labels_B[:, None])
    rank_B = (scores_BC >= right_B1).sum(1)
    top1, top5 = ((rank_B <= k).float().mean().item() for k in (1, 5))
    return ClassAccuracy(top1=top1, top5=top5)


# The modality gap


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityGap:
    """Whether images and texts share one region of the space or lie in two separate clouds."""

    distance: float
    """Distance between the mean image and the mean text, from 0 (the same) to 2 (opposite)."""
    accuracy: float
    """Accuracy of a linear classifier that tells images from texts, on pairs it has not seen; 0.5 is chance."""


def modality_gap(images_ND: Float[Tensor, "N D"], texts_ND: Float[Tensor, "N D"], *, seed: int = 0) -> ModalityGap:
    """The gap of pairs of embeddings. Half of the pairs, drawn by ``seed``, trains the classifier, the others test it.

    Raises UserError for fewer than two pairs.
    """
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
    """A PNG with a panel for each model of ``spaces``: UMAP by cosine of its image and text embeddings (both [N D]).

    Only distances within a panel can be compared; positions and axes carry no meaning. Raises UserError where the extra
    ``umap`` is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    umap = import_umap()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns that a seed means one thread, numba of its own deprecations
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
    """The module ``umap``. Raises UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import umap
    except ImportError as error:
        raise UserError(f"the map needs umap-learn ({error}): pip install 'diptych[umap]'") from error
    return umap
