"""CLIP and SigLIP, with any augmentation and any number of views and captions.

Shapes: B rows, V image views, M captions, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.data.batch import Batch, CaptionedImageExamples
from diptych.dual.losses import multi_view_info_nce, sigmoid_loss
from diptych.dual.objectives.base import PairsConfig, PairsObjective, Trained, Views, in_chunks, unbind_captions, unit
from diptych.nn.functional import gather_rows
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
