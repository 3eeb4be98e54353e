"""Do images and texts live in one space, or in two clouds side by side?

Shapes: N pairs, D width.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from diptych.data.batch import derive_seed
from diptych.errors import UserError
from diptych.eval.probe import fit_linear
from diptych.report.figures import SERIES, STYLE

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
