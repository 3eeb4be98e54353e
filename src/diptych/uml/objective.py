"""Supervised UML: one classifier of several modalities, none of whose rows belong together.

Gupta et al., "Better Together: Leveraging Unpaired Multimodal Data for Stronger Unimodal Models", supervised variant.

Shapes: B rows of a modality, D width of its features, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.data.augment import ViewConfig, draw_view, make_view
from diptych.data.batch import Batch, LabelledImageExamples, LabelledVectorExamples
from diptych.train.objective import Losses, Objective
from diptych.uml.head import SharedHead

Init = Literal["random", "anchor"]


@dataclass(kw_only=True, slots=True)
class UmlConfig:
    aux_weight: float = 1.0
    """Weight of each modality beside the target (lambda); 0 is the control of a target that learns alone."""
    init: Init = "random"
    """How the classifier begins; anchor is each class's mean feature of the anchor, that is, of its texts."""


def uml_loss(
    logits: Mapping[str, Float[Tensor, "_ C"]],
    labels: Mapping[str, Int[Tensor, "_"]],
    weights: Mapping[str, float | Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = sum over modalities m of w_m CE(h(z_m), c_m), and its unweighted parts.

    The target's weight is 1, the others' lambda: CE(h(z_img), c_img) + lambda CE(h(z_txt), c_txt).
    """
    terms = {name: F.cross_entropy(logits[name].float(), labels[name]) for name in logits}
    return torch.stack([weights[name] * loss for name, loss in terms.items()]).sum(), terms


class UmlObjective(Objective):
    """A stream for each modality, drawn independently of the others; whichever is short begins anew.

    Rows are cached features (``vectors_BD``), or pictures of the target where its ``encoder`` learns too.
    """

    # A modality of weight 0 is not read; a tuned encoder may hold what its features do not need, e.g. a mask token.
    may_skip_parameters = True

    def __init__(
        self, head: SharedHead, config: UmlConfig, *, target: str, encoder: nn.Module | None = None,
        view: ViewConfig | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head, self.encoder = head, encoder
        self.config, self.target, self.view = config, target, view
        self.weights = {name: 1.0 if name == target else config.aux_weight for name in head.config.widths}
        self.streams = {name: 1 for name, weight in self.weights.items() if weight > 0}

    def forward(self, batch: Batch, step: int) -> Losses:
        logits, labels = {}, {}
        for name in self.streams:
            items: LabelledVectorExamples | LabelledImageExamples = batch[name]
            labels[name] = items.labels_B
            logits[name] = self.head(self.features(items, batch), name)
        total, terms = uml_loss(logits, labels, self.weights)
        right_B = logits[self.target].argmax(1) == labels[self.target]
        terms[f"{self.target}/accuracy"] = right_B.float().mean()
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def features(self, items: LabelledVectorExamples | LabelledImageExamples, batch: Batch) -> Float[Tensor, "B D"]:
        if isinstance(items, LabelledVectorExamples):
            return items.vectors_BD
        assert self.encoder is not None
        pixels = items.pixels_B3HW
        if self.view is not None:
            drawn = draw_view(batch.rng, "view", len(items))
            pixels = make_view(pixels, drawn, self.view, size=pixels.shape[-1]).clamp(0, 1) * 255
        return self.encoder(pixels)
