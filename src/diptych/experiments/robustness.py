"""Robustness: the accuracy of a classifier on test images that are not like those it learned from.

    accuracies                          of a classifier on any number of test sets
    corrupt, CorruptedSource, corrupted test images with artificial corruptions, as the built-in shift

The strengths of the corruptions follow Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations". Their lengths are for images of 224 pixels, and are scaled to the size of the image.

Shapes: B images, H and W pixels, M classifiers.
"""

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from diptych.data.pixels import SkippedItems, image_batches
from diptych.data.sources import Source
from diptych.data.splits import Labelled
from diptych.errors import UserError
from diptych.rng import derive_seed

SEVERITIES = (1, 2, 3, 4, 5)
_THEIR_SIZE = 224
"""Side in pixels of the images that the strengths were chosen for."""

Classify = Callable[[Tensor], Tensor]
"""Pixels uint8 [B 3 H W] to the number [B] of each one's class; or [M B], for M classifiers that share an encoder."""
_Change = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
"""An image as floats in [0, 1], a strength, and random numbers, to an image of floats that may leave [0, 1]."""


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
    """Share of the images of each test set that are classified rightly: a number, or [M] for M classifiers.

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
