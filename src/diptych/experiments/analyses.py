"""What training with texts changes: how many texts an image is worth, how classes lie in the space of features, and how
accurate a classifier stays on test images that are unlike those it learned from.

    fit_exchange, Exchange              the exchange rate
    margins, class_margin, silhouette   the geometry of classes
    corrupt, corrupted, accuracies      test images with artificial corruptions, and accuracies on any test sets

The exchange rate fits accuracy as a plane over the shots of images and of texts:

    accuracy = a + b f(images) + c f(texts),     exchange rate = b / c

With f the identity, as in the paper, b / c more texts of each class help as much as one more image of each class. With
f the binary logarithm, b / c is the number of doublings of the texts that help as much as doubling the images. Accuracy
flattens with more of either, so this second plane fits better over a wide grid.

Departure: the paper gives no uncertainty. The interval of a ratio of two estimates is not symmetric, and is unbounded
if the denominator cannot be told from zero. Fieller's interval has both properties.

The strengths of the corruptions follow Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations". Their lengths are for images of 224 pixels, and are scaled to the size of the image.

Shapes: P points of the grid, those of all seeds; N items, D width of the features, C classes; B images, H and W pixels,
M classifiers.
"""

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from diptych.data.pixels import SkippedItems, image_batches
from diptych.data.sources import Source
from diptych.data.splits import Labelled
from diptych.errors import UserError
from diptych.rng import derive_seed

_Z = 1.959964
"""Standard errors from the estimate to either end of a 95 % interval."""
_ROWS = 1024
"""Items whose distances to all others are in memory at once."""

Scale = Literal["linear", "log2"]
"""The f of the plane: the identity or the binary logarithm."""
SEVERITIES = (1, 2, 3, 4, 5)
_THEIR_SIZE = 224
"""Side in pixels of the images that the strengths were chosen for."""

Classify = Callable[[Tensor], Tensor]
"""Pixels uint8 [B 3 H W] to the number [B] of each one's class; or [M B], for M classifiers that share an encoder."""
_Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""An image as floats in [0, 1], a strength, and random numbers, to an image of floats that may leave [0, 1]."""


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


# Corrupted test images


def _noise(x_HW3: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    return x_HW3 + std * rng.standard_normal(x_HW3.shape)


def _blur(x_HW3: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    return _by_pillow(x_HW3, lambda image: image.filter(ImageFilter.GaussianBlur(radius * len(x_HW3) / _THEIR_SIZE)))


def _contrast(x_HW3: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    mean = x_HW3.mean((0, 1), keepdims=True)
    return (x_HW3 - mean) * share + mean


def _brightness(x_HW3: np.ndarray, more: float, rng: np.random.Generator) -> np.ndarray:
    return x_HW3 + more


def _jpeg(x_HW3: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    def through(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(quality))
        return Image.open(file)

    return _by_pillow(x_HW3, through)


def _pixelate(x_HW3: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    height, width = x_HW3.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))

    def through(image: Image.Image) -> Image.Image:
        box = image.resize(small, Image.Resampling.BOX)
        return box.resize((width, height), Image.Resampling.NEAREST)

    return _by_pillow(x_HW3, through)


def _by_pillow(x_HW3: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.asarray(change(Image.fromarray(_to_bytes(x_HW3)))) / 255


def _to_bytes(x_HW3: np.ndarray) -> np.ndarray:
    return np.round(x_HW3.clip(0, 1) * 255).astype(np.uint8)


_CHANGES: dict[str, tuple[_Change, tuple[float, ...]]] = {
    "gaussian_noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": (_blur, (1, 2, 3, 4, 6)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
}
"""Each corruption with its strengths at the five severities."""
CORRUPTIONS = tuple(_CHANGES)


def corrupt(
    image_HW3: UInt8[np.ndarray, "H W 3"], name: str, severity: int, *, seed: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The image, changed by one of ``CORRUPTIONS`` with a severity of 1 to 5. Noise follows from ``seed``.

    Raises UserError for another name or severity.
    """
    if name not in _CHANGES:
        raise UserError(f"no corruption {name!r}: choose {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"a severity of {severity}: choose 1 to {SEVERITIES[-1]}")
    change, strengths = _CHANGES[name]
    return _to_bytes(change(image_HW3 / 255, strengths[severity - 1], np.random.default_rng(seed)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptedSource:
    """Another source with every image corrupted. The noise of an image follows from ``seed`` and the image's key."""

    source: Source
    corruption: str
    severity: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.source.name} ({self.corruption} {self.severity})"

    @property
    def has_images(self) -> bool:
        return self.source.has_images

    @property
    def has_captions(self) -> bool:
        return self.source.has_captions

    def __len__(self) -> int:
        return len(self.source)

    def key(self, i: int) -> str:
        return self.source.key(i)

    def captions(self, i: int) -> list[str]:
        return self.source.captions(i)

    def image(self, i: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """The corrupted image. It is resized to ``size`` first, so that strengths are relative to that size."""
        own = derive_seed(self.seed, self.corruption, self.severity, self.source.key(i))
        return corrupt(self.source.image(i, size), self.corruption, self.severity, seed=own)

    def label(self, i: int) -> str | None:
        return self.source.label(i)


def corrupted(
    test: Labelled, *, corruptions: Iterable[str] = CORRUPTIONS, severities: Iterable[int] = SEVERITIES, seed: int = 0
) -> dict[str, Labelled]:
    """The test images under every corruption at every severity, by the name `corruption/severity`."""
    found = {}
    for name in corruptions:
        for severity in severities:
            source = CorruptedSource(source=test.source, corruption=name, severity=severity, seed=seed)
            found[f"{name}/{severity}"] = replace(test, source=source)
    return found


def accuracies(
    classify: Classify, tests: Mapping[str, Labelled], *, size: int, items: np.ndarray | None = None, workers: int = 2
) -> dict[str, np.floating | np.ndarray]:
    """Share of the images of each test set that are classified correctly: a number, or [M] for M classifiers.

    Args:
        classify: The classifier, or several; they number classes as every test set does.
        tests: Test sets by name: other sources of the same classes, :func:`corrupted` ones, or both.
        size: Side in pixels of the images that ``classify`` is given.
        items: Which items of each test set to classify. Default: all.
        workers: Number of threads that decode images.

    Unreadable images are left out; UserError is raised for too many of them.
    """
    found: dict[str, np.floating | np.ndarray] = {}
    for name, test in tests.items():
        right: np.integer | np.ndarray = np.int64(0)
        count = 0
        chosen = np.arange(len(test.labels_N)) if items is None else items
        readable = image_batches(test.source, chosen, size=size, skipped=SkippedItems(), workers=workers)
        for pixels_B3HW, kept in readable:
            right = right + (classify(pixels_B3HW).cpu().numpy() == test.labels_N[kept]).sum(-1)
            count += len(kept)
        found[name] = right / count
    return found
