"""Few pairs and many halves: hides the captions of most items of a captioned source, to learn as if they had none."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from diptych.data.batch import derive_seed
from diptych.errors import UserError

Rest = Literal["split", "images", "texts", "unused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Sorted indices of a source, int64. No index is in two of them."""

    pairs: np.ndarray
    """Items that keep image and captions together."""
    images: np.ndarray
    """Items of which only the image is used."""
    texts: np.ndarray
    """Items of which only the captions are used."""


def hold_back(source_len: int, max_pairs: int | None, seed: int, *, rest: Rest = "split") -> Split:
    """``max_pairs`` items stay pairs (all of them when None); ``rest`` says what the others become.

    "split": half of them bare images, the other half bare texts, so that no bare text describes a bare image;
    "images" or "texts": all of them, for when the other side comes from a source of its own; "unused": neither.

    A pure function of its arguments. The order does not depend on ``max_pairs``: the pairs of a smaller number are
    among those of a larger one, so a curve over numbers of pairs compares like with like. Raises UserError.
    """
    if max_pairs is not None and not 0 < max_pairs <= source_len:
        raise UserError(f"--data.max-pairs {max_pairs}: must be from 1 to {source_len}, the number of captioned images")
    count = source_len if max_pairs is None else max_pairs
    # One random number each and a stable sort: the same on every platform and version that has this bit generator.
    draws = np.random.Generator(np.random.PCG64(derive_seed("hold_back", seed))).random(source_len)
    order = np.argsort(draws, kind="stable")
    others = order[count:]
    images = {"split": (len(others) + 1) // 2, "images": len(others), "texts": 0, "unused": 0}[rest]
    texts = len(others) if rest in ("split", "texts") else images
    return Split(pairs=np.sort(order[:count]), images=np.sort(others[:images]), texts=np.sort(others[images:texts]))
