"""CLIP and SigLIP, with any augmentation and any number of views and captions; SLIP, which adds SimCLR.

Shapes: B rows, V image views, M captions, W width of the image tower, D width.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.data.augment import ViewConfig
from diptych.data.batch import Batch, CaptionedImageExamples
from diptych.dual.losses import multi_view_info_nce, multi_view_nt_xent, sigmoid_loss
from diptych.dual.objective import PairsConfig, PairsObjective, Trained, Views, in_chunks, unbind_captions, unit
from diptych.nn.functional import gather_rows
from diptych.nn.transformer import init_weights
from diptych.train.objective import Losses


@dataclass(kw_only=True, slots=True)
class ClipConfig(PairsConfig):
    """Settings of CLIP and SigLIP, which differ in their loss alone."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Contrastive loss: softmax is CLIP's, sigmoid is SigLIP's."""

    def build(self, model: Trained) -> "ClipObjective":
        return ClipObjective(model, self)


class ClipObjective(PairsObjective[ClipConfig]):
    """L = mean of the loss over all pairs of an image view and a caption."""

    def __init__(self, model: Trained, config: ClipConfig) -> None:
        super().__init__(model, config)
        if config.loss == "sigmoid":
            # SigLIP starts at scale 10 and bias -10, as nearly all combinations of an image and a text do not match.
            nn.init.constant_(model.logit_scale, torch.tensor(10.0).log().item())
            self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, batch: Batch, step: int) -> Losses:
        c = self.config
        pairs: CaptionedImageExamples = batch["pairs"]
        self.model.clamp_scale()
        views = Views(batch, c.augment, views=c.views, size=self.model.image_size, name="view")

        def encode(rows: slice) -> tuple[Tensor, Tensor]:
            images = [self.model.encode_images(view).pooled_BD for view in views(rows)]
            captions = unbind_captions(pairs, rows, captions=c.captions)
            texts = [self.model.encode_texts(*caption).pooled_BD for caption in captions]
            return unit(images), unit(texts)

        images_VBD, texts_MBD = map(gather_rows, in_chunks(encode, rows=len(pairs), chunk=c.chunk))
        scale = self.model.scale
        if c.loss == "sigmoid":
            each = [sigmoid_loss(image, text, scale, self.bias) for image in images_VBD for text in texts_MBD]
            loss = torch.stack(each).mean()
        else:
            loss = multi_view_info_nce(images_VBD, texts_MBD, scale)
        return Losses(loss, {"align": loss}, {"align/scale": scale})


@dataclass(kw_only=True, slots=True)
class SlipConfig(PairsConfig):
    """``views`` and ``augment`` are for CLIP's part of the loss."""

    strong: ViewConfig = field(default_factory=ViewConfig)
    """The random changes that make SimCLR's two views. The defaults are ITO's, so that both methods see alike."""
    simclr_weight: float = 1.0
    """Weight of SimCLR's loss."""
    temperature: float = 0.1
    """SimCLR's temperature, by which cosines are divided."""
    hidden: int = 4096
    """Width of the projector's hidden layers."""
    projected: int = 256
    """Width of the projector's output, which SimCLR compares."""

    def view_configs(self) -> list[ViewConfig]:
        return [self.augment] * self.views + [self.strong] * 2

    def build(self, model: Trained) -> "SlipObjective":
        return SlipObjective(model, self)


class SlipObjective(PairsObjective[SlipConfig]):
    """L = L_CLIP + L_SimCLR, where L_SimCLR reads the image tower before its projection.

    Where the tower is frozen, its output does not learn, and L_SimCLR reads what the projection makes of it.

    Departure: the projector has LayerNorm where SLIP has BatchNorm, whose statistics depend on how the rows are split
    over processes and chunks.
    """

    def __init__(self, model: Trained, config: SlipConfig) -> None:
        """The weights of the projector come from torch's global generator."""
        super().__init__(model, config)
        widths = (model.image_tower_width if model.learned_images else model.width, config.hidden, config.hidden)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(config.hidden, config.projected))
        self.projector.apply(init_weights)

    def forward(self, batch: Batch, step: int) -> Losses:
        c, size = self.config, self.model.image_size
        pairs: CaptionedImageExamples = batch["pairs"]
        self.model.clamp_scale()
        weak = Views(batch, c.augment, views=c.views, size=size, name="view")
        strong = Views(batch, c.strong, views=2, size=size, name="strong", first=c.views)

        def encode(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            images = [self.model.encode_images(view).pooled_BD for view in weak(rows)]
            captions = unbind_captions(pairs, rows, captions=c.captions)
            texts = [self.model.encode_texts(*caption).pooled_BD for caption in captions]
            outputs = [self.model.encode_images(view) for view in strong(rows)]
            learned = self.model.learned_images
            projected = [self.projector(each.state_BW if learned else each.pooled_BD) for each in outputs]
            return unit(images), unit(texts), unit(projected)

        images_VBD, texts_MBD, strong_2BD = map(gather_rows, in_chunks(encode, rows=len(pairs), chunk=c.chunk))
        scale = self.model.scale
        align = multi_view_info_nce(images_VBD, texts_MBD, scale)
        simclr = multi_view_nt_xent(strong_2BD, 1 / c.temperature)
        total = align + c.simclr_weight * simclr
        return Losses(total, {"align": align, "simclr": simclr}, {"align/scale": scale})
