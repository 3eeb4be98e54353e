"""Supervised UML: one classifier learns from several modalities whose examples are not paired.

    L = sum over modalities m of w_m CE(h(z_m), c_m)

where h is the shared classifier, z_m the features and c_m the classes of modality m's examples. The weight w of the
target modality is 1, that of the others is lambda.

Gupta et al., "Better Together: Leveraging Unpaired Multimodal Data for Stronger Unimodal Models", supervised variant.

Shapes: B rows of a modality (another number for each), D width of its features, C classes,
H and W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.data.augment import ViewConfig, draw_view, make_view
from diptych.data.batch import Batch, LabelledImageExamples, LabelledVectorExamples
from diptych.encoders import ImageEncoder
from diptych.train.objective import Losses, Objective
from diptych.uml.head import SharedHead

Init = Literal["random", "anchor"]


@dataclass(kw_only=True, slots=True)
class UmlConfig:
    """Settings of supervised UML."""

    aux_weight: float = 1.0
    """Weight of the loss of every modality but the target (lambda); 0 is the control: the target learns alone."""
    init: Init = "random"
    """Initial weights of the classifier; anchor starts each class as the mean feature of its texts."""


def uml_loss(
    logits: Mapping[str, Float[Tensor, "_ C"]],
    labels: Mapping[str, Int[Tensor, "_"]],
    weights: Mapping[str, float | Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """L, and its unweighted term of each modality.

    With images as target it is CE(h(z_img), c_img) + lambda CE(h(z_txt), c_txt).
    """
    terms = {name: F.cross_entropy(logits[name].float(), labels[name]) for name in logits}
    return torch.stack([weights[name] * loss for name, loss in terms.items()]).sum(), terms


class UmlObjective(Objective):
    """The classifier with its loss. Every modality has a stream of its own; short ones begin anew sooner.

    Examples are cached features. Those of the target are images if its ``encoder`` is trained too, each seen in a
    random ``view``.
    """

    # A modality of weight 0 is not read; a tuned encoder may hold what its features do not need, e.g. a mask token.
    may_skip_parameters = True

    def __init__(
        self,
        head: SharedHead,
        config: UmlConfig,
        *,
        target: str,
        encoder: ImageEncoder | None = None,
        view: ViewConfig | None = None,
    ) -> None:
        super().__init__()
        self.head, self.encoder = head, encoder
        self.config, self.target, self.view = config, target, view
        self.weights = {name: 1.0 if name == target else config.aux_weight for name in head.config.widths}
        self.streams = {name: 1 for name, weight in self.weights.items() if weight > 0}

    def forward(self, batch: Batch, step: int) -> Losses:
        logits, labels = {}, {}
        for name in self.streams:
            examples: LabelledVectorExamples | LabelledImageExamples = batch[name]
            labels[name] = examples.labels_B
            logits[name] = self.head(self.features(examples, batch), name)
        total, terms = uml_loss(logits, labels, self.weights)
        right_B = logits[self.target].argmax(1) == labels[self.target]
        measures = {f"{self.target}/accuracy": right_B.float().mean()}
        return Losses(total, {name: term.detach() for name, term in terms.items()}, measures)

    def features(self, examples: LabelledVectorExamples | LabelledImageExamples, batch: Batch) -> Float[Tensor, "B D"]:
        """The cached features, or those that the encoder computes of a random view of the images."""
        if isinstance(examples, LabelledVectorExamples):
            return examples.vectors_BD
        assert self.encoder is not None
        pixels_B3HW: Tensor = examples.pixels_B3HW
        if self.view is not None:
            drawn = draw_view(batch.rng, "view", len(examples))
            view_B3HW = make_view(pixels_B3HW, drawn, self.view, size=pixels_B3HW.shape[-1])
            pixels_B3HW = view_B3HW.clamp(0, 1) * 255
        return self.encoder(pixels_B3HW)
