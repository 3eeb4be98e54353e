"""What a classifier takes an image for.

Shapes: B images, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A class and how probable it is."""

    name: str
    probability: float


def top_predictions(
    probabilities_BC: Float[Tensor, "B C"], names: Sequence[str], *, top: int
) -> list[list[Prediction]]:
    """The ``top`` classes of each image, all if there are fewer, best first."""
    best = probabilities_BC.topk(min(top, len(names)))
    return [
        [Prediction(name=names[c], probability=p) for c, p in zip(classes, probabilities, strict=True)]
        for classes, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
