"""Supervised UML: one classifier learns from several modalities whose examples are not paired.

    L = sum over modalities m of w_m CE(h(z_m), c_m)

where h is the shared classifier, z_m the features and c_m the classes of modality m's examples. The weight w of the
target modality is 1, that of the others is lambda.

Gupta et al., "Better Together: Leveraging Unpaired Multimodal Data for Stronger Unimodal Models", supervised variant.

Shapes: B rows of a modality (another number for each), T texts (rows of the anchor), D width of a modality's features,
W shared width, C classes, H and W pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.data.augment import ViewConfig, draw_view, make_view
from diptych.data.batch import Batch, LabelledImageExamples, LabelledVectorExamples
from diptych.encoders import ImageEncoder
from diptych.errors import UserError
from diptych.train.objective import Losses, Objective


@dataclass(kw_only=True, slots=True)
class SharedHeadConfig:
    """Architecture of the classifier that all modalities share."""

    widths: dict[str, int] = field(default_factory=dict)
    """Width of each modality's features, by its name; follows from the encoders."""
    anchor: str = "text"
    """Name of the modality whose features enter the head as they are; the others are projected to its width."""
    classes: int = 0
    """Number of classes to tell apart; follows from the data."""
    features: Literal["raw", "unit", "centred", "standard"] = "centred"
    """Preparation of the features: raw leaves them, unit scales them to length one, centred first subtracts the mean
    of the training features, standard also divides by their standard deviation."""
    projection: Literal["zero", "random", "identity"] = "zero"
    """Initial weights of the projections. random is the paper's, whose noise stays in few-shot classifiers; identity
    is for encoders that already share one space, such as the two towers of a dual encoder."""
    logit_scale: float = 16.0
    """Factor on the logits of every modality."""
    learn_scale: bool = False
    """Whether that factor is learned, one for each modality."""


class SharedHead(nn.Module, PyTorchModelHubMixin, library_name="diptych", tags=["uml"]):
    """Logits s_m W P_m z_m of the features z_m of modality m.

    All modalities share the classifier W; the scale s_m and the projection P_m are the modality's own, and P_m is the
    identity for the anchor. W starts with random orthogonal rows of length one, which is the length of those of
    :meth:`init_from_anchor`, or with orthogonal columns if there are more classes than its width. Random weights of P_m
    are normal with the variance 1 / input width, which keeps the length of features.

    Departure: the paper's W starts with independent random rows, or with the mean features of texts as they are. P_m
    learns through W, so it would learn the classes at the unequal rates of W W^T, and images alone would stay below
    logistic regression on the same features (docs/log.md).

    Raises UserError for an anchor that is no modality, and for an identity projection between unequal widths.
    """

    def __init__(self, config: SharedHeadConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.anchor not in c.widths:
            raise UserError(f"anchor is {c.anchor!r}, which is none of the modalities {', '.join(c.widths)}")
        self.width = c.widths[c.anchor]
        self.head = nn.Linear(self.width, c.classes, bias=False)
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, self.width, bias=False) for name, width in c.widths.items() if name != c.anchor}
        )
        self.log_scales = nn.ParameterDict({name: torch.empty(()) for name in c.widths} if c.learn_scale else {})
        for name, width in c.widths.items():
            self.register_buffer(f"centre_{name}", torch.zeros(width))
            self.register_buffer(f"spread_{name}", torch.ones(width))
        self.init_weights()

    def init_weights(self) -> None:
        """Start anew, with the distributions named above."""
        nn.init.orthogonal_(self.head.weight, gain=max(1.0, self.config.classes / self.width) ** 0.5)
        for name, projection in self.projections.items():
            assert isinstance(projection, nn.Linear)
            width = projection.in_features
            if self.config.projection == "zero":
                nn.init.zeros_(projection.weight)
            elif self.config.projection == "random":
                nn.init.normal_(projection.weight, std=width**-0.5)
            elif width == self.width:
                nn.init.eye_(projection.weight)
            else:
                raise UserError(f"projection identity: {name} features are {width} wide, the anchor's {self.width}")
        for scale in self.log_scales.values():
            nn.init.constant_(scale, math.log(self.config.logit_scale))

    def forward(self, features_BD: Float[Tensor, "B D"], modality: str) -> Float[Tensor, "B C"]:
        """Logits of one modality's features."""
        learned = self.config.learn_scale
        scale = self.log_scales[modality].exp() if learned else self.config.logit_scale
        return scale * self.head(self.project(self.prepared(features_BD, modality), modality))

    def project(self, features_BD: Float[Tensor, "B D"], modality: str) -> Float[Tensor, "B W"]:
        """Prepared features in the shared space; those of the anchor as they are."""
        return self.projections[modality](features_BD) if modality in self.projections else features_BD

    def prepared(self, features_BD: Float[Tensor, "B D"], modality: str) -> Float[Tensor, "B D"]:
        """Features as they enter the projection: see ``SharedHeadConfig.features``."""
        if self.config.features == "raw":
            return features_BD
        centre_D, spread_D = self.get_buffer(f"centre_{modality}"), self.get_buffer(f"spread_{modality}")
        return F.normalize((features_BD - centre_D) / spread_D, dim=-1)

    @torch.no_grad()
    def fit_statistics(self, features_ND: Float[Tensor, "N D"], modality: str) -> None:
        """Store the mean and standard deviation of the training features that their preparation needs."""
        if self.config.features in ("centred", "standard"):
            self.get_buffer(f"centre_{modality}").copy_(features_ND.mean(0))
        if self.config.features == "standard":
            spread_D = features_ND.std(0, correction=0)
            # A feature that is constant in training is not divided, so it stays near zero after centring.
            self.get_buffer(f"spread_{modality}").copy_(spread_D.where(spread_D > 1e-6, torch.ones_like(spread_D)))

    @torch.no_grad()
    def init_from_anchor(self, features_TD: Float[Tensor, "T D"], labels_T: Int[Tensor, "T"]) -> None:
        """Start each class near the mean prepared feature of its texts, with a weight of length one.

        With the projection "identity" it is that mean: a zero-shot classifier. Else the matrix of the means has its
        singular values replaced by their square roots: classes whose texts are alike keep alike weights, and images
        learn to tell them apart at rates that differ less.
        """
        prepared_TW = self.prepared(features_TD, self.config.anchor)
        sums_CW = torch.zeros_like(self.head.weight).index_add_(0, labels_T, prepared_TW)
        weight_CW = F.normalize(sums_CW, dim=-1)
        if self.config.projection != "identity":
            left_CK, values_K, right_KW = torch.linalg.svd(weight_CW, full_matrices=False)
            weight_CW = F.normalize(left_CK * values_K.sqrt() @ right_KW, dim=-1)
        self.head.weight.copy_(weight_CW)


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
