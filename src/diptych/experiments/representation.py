"""What training with texts changes: how many texts an image is worth, and how classes lie in the space of features.

The exchange rate fits accuracy as a plane over the shots of images and of texts:

    accuracy = a + b f(images) + c f(texts),     exchange rate = b / c

With f the identity, as in the paper, b / c more texts of each class help as much as one more image of each class. With
f the binary logarithm, b / c is the number of doublings of the texts that help as much as doubling the images. Accuracy
flattens with more of either, so this second plane fits better over a wide grid.

Departure: the paper gives no uncertainty. The interval of a ratio of two estimates is not symmetric, and is unbounded
if the denominator cannot be told from zero. Fieller's interval has both properties.

The geometry of a space of features is measured by how far its classes lie apart (:func:`class_margin`) and by how
compact they are (:func:`silhouette`).

Shapes: P points of the grid, those of all seeds; N items, D width of the features, C classes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import UserError

_Z = 1.959964
"""Standard errors from the estimate to either end of a 95 % interval."""
_ROWS = 1024
"""Items whose distances to all others are in memory at once."""

Scale = Literal["linear", "log2"]
"""The f of the plane: the identity or the binary logarithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A fitted plane and its exchange rate, the ratio of its slopes, with a 95 % interval."""

    scale: Scale
    intercept: float
    image_slope: float
    image_error: float
    """Standard error of the image slope."""
    text_slope: float
    text_error: float
    """Standard error of the text slope."""
    explained: float
    """Share of the variance of accuracy that the plane explains (R squared)."""
    ratio: float
    """Image slope divided by text slope."""
    low: float
    high: float
    """Ends of the ratio's interval, infinite if the text slope cannot be told from zero."""

    def __str__(self) -> str:
        image = f"{self.image_slope:.4f} +- {self.image_error:.4f} for images"
        slopes = f"(slopes {image}, {self.text_slope:.4f} +- {self.text_error:.4f} for texts)"
        if math.isinf(self.high):
            return f"texts do not help measurably, so an image has no price in texts {slopes}"
        what = "texts per image" if self.scale == "linear" else "doublings of the texts per doubling of the images"
        return f"{self.ratio:.3g} {what}, 95 % interval {self.low:.3g} to {self.high:.3g} {slopes}"


def fit_exchange(
    images_P: Float[np.ndarray, "P"],
    texts_P: Float[np.ndarray, "P"],
    accuracy_P: Float[np.ndarray, "P"],
    *,
    scale: Scale = "linear",
) -> Exchange:
    """Fit the plane by least squares over all points: shots of images, shots of texts, and accuracy in [0, 1].

    Raises UserError for points that determine no plane, and for 0 shots on the scale "log2".
    """
    if scale == "log2":
        if min(images_P.min(), texts_P.min()) <= 0:
            raise UserError("0 shots have no logarithm: leave points without images or texts out, or fit linearly")
        images_P, texts_P = np.log2(images_P), np.log2(texts_P)
    design_P3 = np.stack([np.ones_like(images_P), images_P, texts_P], axis=1)
    points = len(accuracy_P)
    if points < 4 or np.linalg.matrix_rank(design_P3) < 3:
        raise UserError(f"{points} points fix no plane: vary images and texts independently, over four points or more")
    plane = np.linalg.lstsq(design_P3, accuracy_P, rcond=None)[0]
    squares = float(np.square(accuracy_P - design_P3 @ plane).sum())
    covariance = np.linalg.inv(design_P3.T @ design_P3) * squares / (points - 3)
    low, high = fieller(plane[1], plane[2], covariance[1:, 1:])
    total = float(np.square(accuracy_P - accuracy_P.mean()).sum())
    return Exchange(
        scale=scale,
        intercept=float(plane[0]),
        image_slope=float(plane[1]),
        image_error=math.sqrt(covariance[1, 1]),
        text_slope=float(plane[2]),
        text_error=math.sqrt(covariance[2, 2]),
        explained=1 - squares / total,
        ratio=float(plane[1] / plane[2]),
        low=low,
        high=high,
    )


def fieller(top: float, bottom: float, covariance: Float[np.ndarray, "2 2"], *, z: float = _Z) -> tuple[float, float]:
    """Fieller's interval of the ratio top / bottom of two estimates: all r with

        (top - r bottom)^2 <= z^2 (V_tt - 2 r V_tb + r^2 V_bb)

    where V is the covariance of (top, bottom). These are the r for which top - r bottom cannot be told from zero. The
    interval is infinite if bottom cannot be told from zero.
    """
    v_tt, v_tb, v_bb = z * z * covariance[0, 0], z * z * covariance[0, 1], z * z * covariance[1, 1]
    a, b, c = bottom**2 - v_bb, top * bottom - v_tb, top**2 - v_tt
    if a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(b * b - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def margins(scores_NC: Float[Tensor, "N C"], labels_N: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Score of an item's own class minus the best score of another; negative for an item that is classified wrongly."""
    own_N = scores_NC.gather(1, labels_N[:, None])[:, 0]
    others_NC = scores_NC.scatter(1, labels_N[:, None], -torch.inf)
    return own_N - others_NC.max(1).values


def class_margin(features_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, "N"]) -> float:
    """The mean of :func:`margins` with, as scores, the cosines to the mean features of the classes.

    The mean of an item's own class leaves the item out, which would pull it towards itself. Items that are alone in
    their class are left out of the result.
    """
    unit_ND = F.normalize(features_ND.double(), dim=1)
    one_hot_NC = F.one_hot(labels_N).double()
    count_C, sum_CD = one_hot_NC.sum(0), one_hot_NC.T @ unit_ND
    scores_NC = unit_ND @ F.normalize(sum_CD, dim=1).T
    without_ND = sum_CD[labels_N] - unit_ND
    own_N = (unit_ND * F.normalize(without_ND, dim=1)).sum(1)
    scores_NC = scores_NC.scatter(1, labels_N[:, None], own_N[:, None])
    scores_NC[:, count_C == 0] = -torch.inf
    return float(margins(scores_NC, labels_N)[count_C[labels_N] > 1].mean())


def silhouette(features_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, "N"]) -> float:
    """Rousseeuw (1987): the mean of (b - a) / max(a, b).

    For each item, a is its mean distance to the others of its class, and b its mean distance to the items of the
    nearest other class. An item that is alone in its class counts 0.
    """
    features_ND = features_ND.double()
    one_hot_NC = F.one_hot(labels_N).double()
    count_C = one_hot_NC.sum(0)
    found = []
    for rows in torch.arange(len(features_ND)).split(_ROWS):
        total_NC = torch.cdist(features_ND[rows], features_ND) @ one_hot_NC
        own_N1 = labels_N[rows, None]
        a_N = (total_NC.gather(1, own_N1) / (count_C[own_N1] - 1).clamp_min(1))[:, 0]
        mean_NC = torch.where(count_C > 0, total_NC / count_C, torch.inf).scatter(1, own_N1, torch.inf)
        b_N = mean_NC.min(1).values
        value_N = (b_N - a_N) / torch.maximum(a_N, b_N).clamp_min(torch.finfo(torch.float64).tiny)
        found.append(value_N.where(count_C[labels_N[rows]] > 1, 0.0))
    return float(torch.cat(found).mean())
