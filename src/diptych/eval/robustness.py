"""Accuracy of a classifier where the test images are not like those it learned from.

Shapes: B images, H and W pixels, M classifiers.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from diptych.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedSource
from diptych.data.encode import picture_batches
from diptych.data.labelled import Labelled
from diptych.data.skips import Skips

Classify = Callable[[Tensor], Tensor]
"""Pixels uint8 [B 3 H W] to the place [B] of each one's class; or [M B], for M classifiers that share an encoder."""


def corrupted(
    test: Labelled, *, corruptions: Iterable[str] = CORRUPTIONS, severities: Iterable[int] = SEVERITIES, seed: int = 0
) -> dict[str, Labelled]:
    """The same test images under every corruption at every severity, by `corruption/severity`."""
    found = {}
    for name in corruptions:
        for severity in severities:
            source = CorruptedSource(source=test.source, corruption=name, severity=severity, seed=seed)
            found[f"{name}/{severity}"] = replace(test, source=source)
    return found


def accuracies(
    classify: Classify, tests: Mapping[str, Labelled], *, size: int, items: np.ndarray | None = None, workers: int = 2
) -> dict[str, np.floating | np.ndarray]:
    """Share of images classified rightly in each of ``tests``: further test sources, :func:`corrupted` ones, or both.

    A number for each test, or [M].

    Args:
        classify: The classifier; its classes are numbered as those of every test.
        tests: Labelled images by a name for them.
        size: Side of the pixels that ``classify`` is given.
        items: Which items of each test to ask about. Default: all.
        workers: Threads that decode.
    """
    found: dict[str, np.floating | np.ndarray] = {}
    for name, test in tests.items():
        right: np.integer | np.ndarray = np.int64(0)
        count = 0
        chosen = np.arange(len(test.labels_N)) if items is None else items
        for pixels_B3HW, kept in picture_batches(test.source, chosen, size=size, skips=Skips(), workers=workers):
            right = right + (classify(pixels_B3HW).cpu().numpy() == test.labels_N[kept]).sum(-1)
            count += len(kept)
        found[name] = right / count
    return found
