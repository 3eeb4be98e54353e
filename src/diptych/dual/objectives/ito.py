"""ITO: several views of an image are aligned with its captions, and, in training alone, fused with them.

To add a loss term, write it as a pure function of embeddings in `dual/losses.py`, add it in
:meth:`ItoObjective.forward`, and give its weight a field of :class:`ItoConfig`.

Shapes: B rows, b rows of a chunk, V image views, M captions, S image tokens, L text tokens, D width.
"""

from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from diptych.data.augment import ViewConfig
from diptych.data.batch import Batch, CaptionedImageExamples
from diptych.dual.fusion import Fusion, FusionConfig
from diptych.dual.losses import multi_view_info_nce, multi_view_nt_xent
from diptych.dual.model import TowerOutput
from diptych.dual.objectives.base import PairsConfig, PairsObjective, Trained, Views, in_chunks, unbind_captions, unit
from diptych.errors import UserError
from diptych.nn.functional import gather_rows
from diptych.train.objective import Losses


@dataclass(kw_only=True, slots=True)
class ItoConfig(PairsConfig):
    """Settings of the multi-view alignment and the fusion. The defaults are the paper's."""

    views: int = 2
    """Number of views of each image in a step; the fusion compares every two of them."""
    augment: ViewConfig = field(default_factory=ViewConfig)
    """The random changes that make a view of an image. The defaults are the paper's."""
    fusion_weight: float = 2.0
    """Weight of the fusion loss, the paper's lambda; 2 is the paper's best value. 0 builds no fusion."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """The fusion module, which is dropped after training."""
    lean: bool = True
    """Recompute the image tower's widest activations in the backward pass instead of keeping them. This saves a sixth
    of its memory for about a hundredth of the time."""

    MEMORY_ONLY = (*PairsConfig.MEMORY_ONLY, "lean")

    @property
    def keeps_tokens(self) -> bool:
        return bool(self.fusion_weight)

    def build(self, model: Trained) -> "ItoObjective":
        return ItoObjective(model, self)


class ItoObjective(PairsObjective[ItoConfig]):
    """L = L_align + lambda L_fusion."""

    def __init__(self, model: Trained, config: ItoConfig) -> None:
        """The weights of the fusion come from torch's global generator.

        Raises UserError where the fusion has no two views to compare, or towers whose widths differ.
        """
        super().__init__(model, config)
        if config.lean:
            model.recompute_image_activations()
        self.fusion: Fusion | None = None
        if config.fusion_weight:
            if config.views < 2:
                raise UserError(
                    "objective.views is 1; the fusion compares views: set 2, or --objective.fusion-weight 0"
                )
            model.text_positions(1)  # raises where they do not fit
            self.fusion = Fusion(config.fusion, width=model.width, image_tokens=model.image_tokens)

    def forward(self, batch: Batch, step: int) -> Losses:
        c = self.config
        pairs: CaptionedImageExamples = batch["pairs"]
        self.model.clamp_scale()
        views = Views(batch, c.augment, views=c.views, size=self.model.image_size, name="view")
        fusing = self.fusion is not None

        def encode(rows: slice) -> tuple[Tensor, ...]:
            captions = unbind_captions(pairs, rows, captions=c.captions)
            images = [self.model.encode_images(view, keep_tokens=fusing) for view in views(rows)]
            texts = [self.model.encode_texts(*text, keep_tokens=fusing) for text in captions]
            fused = (self._fuse(images, texts, [valid for _, valid in captions]),) if fusing else ()
            return unit([i.pooled_BD for i in images]), unit([t.pooled_BD for t in texts]), *fused

        images_VBD, texts_MBD, *fused = map(gather_rows, in_chunks(encode, rows=len(pairs), chunk=c.chunk))
        scale = self.model.scale
        align = multi_view_info_nce(images_VBD, texts_MBD, scale)
        terms, measures = {"align": align}, {"align/scale": scale}
        if not fused:
            return Losses(align, terms, measures)
        fusion = multi_view_nt_xent(fused[0], scale)
        return Losses(align + c.fusion_weight * fusion, terms | {"fusion": fusion}, measures)

    def _fuse(self, images: list[TowerOutput], texts: list[TowerOutput], valid: list[Tensor]) -> Tensor:
        """S_v of every view, [V b D]. View v is fused with caption v; fewer captions than views are used in turn."""
        assert self.fusion is not None
        positions_LD = self.model.text_positions(valid[0].shape[1])
        in_turn = cycle(zip(texts, valid, strict=True))
        return torch.stack(
            [
                self.fusion(image.tokens_BSD, text.tokens_BSD, valid_BL, positions_LD)
                for image, (text, valid_BL) in zip(images, in_turn, strict=False)
            ]
        )
