"""ITO: Liu et al., 2026, "ITO: Images and Texts as One via Synergizing Multiple Alignment and Training-Time Fusion".

Image views and captions are aligned by InfoNCE; during training a small transformer also fuses each view with a
caption. To add a loss term, write it as a pure function of embeddings in `dual/objective.py`, add it in
:meth:`ItoObjective.forward`, and give its weight a field of :class:`ItoConfig`.

Shapes: B rows, b rows of a chunk, V image views, M captions, S image tokens (CLS first), L text tokens, T = S + L,
D width, H heads, E width of one head.
"""

import math
from dataclasses import dataclass, field
from itertools import cycle

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.data.augment import ViewConfig
from diptych.data.batch import Batch, CaptionedImageExamples, CaptionedStateExamples
from diptych.dual.model import TowerOutput
from diptych.dual.objective import (
    Learner,
    PairsConfig,
    PairsObjective,
    Views,
    gather_rows,
    in_chunks,
    multi_view_info_nce,
    multi_view_nt_xent,
    unbind_captions,
    unit,
)
from diptych.errors import UserError
from diptych.nn.transformer import Block, init_weights, rounded
from diptych.train.objective import Losses


@dataclass(kw_only=True, slots=True)
class FusionConfig:
    """Size of the fusion module; its width is that of the text tower."""

    depth: int = 2
    """Number of transformer blocks."""
    head_width: int = 64
    """Width of an attention head; the paper has 8 heads at a width of 512."""


class Fusion(nn.Module):
    """[image tokens + sin-cos positions | text tokens + text positions] -> pre-norm blocks -> LayerNorm -> position 0.

    The last block computes position 0 alone, as the others are not used; see :func:`first_position`.
    """

    positions_SD: Tensor

    def __init__(self, config: FusionConfig, *, width: int, image_tokens: int) -> None:
        super().__init__()
        heads = max(1, width // config.head_width)
        *early, self.last = (Block(width, heads=heads) for _ in range(config.depth))
        self.early = nn.ModuleList(early)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions_SD", sin_cos_table(image_tokens, width), persistent=False)
        self.apply(init_weights)

    def forward(
        self,
        image_BSD: Float[Tensor, "B S D"],
        text_BLD: Float[Tensor, "B L D"],
        valid_BL: Bool[Tensor, "B L"],
        positions_LD: Float[Tensor, "L D"],
    ) -> Float[Tensor, "B D"]:
        """The fused vectors, L2-normalized, fp32. Invalid text tokens are not attended to.

        ``positions_LD`` are the text tower's learned positions, projected to this width.
        """
        x_BTD = torch.cat([image_BSD + self.positions_SD, text_BLD + positions_LD], dim=1)
        seen_BS = valid_BL.new_ones(image_BSD.shape[:2])
        attend_B11T = torch.cat([seen_BS, valid_BL], dim=1)[:, None, None]
        for block in self.early:
            x_BTD = block(x_BTD, attend=attend_B11T)
        first_BD = first_position(self.last, x_BTD, attend_B11T)
        return F.normalize(self.norm(first_BD).float(), dim=-1)


def first_position(block: Block, x_BTD: Tensor, attend_B11T: Tensor) -> Tensor:
    """Position 0 of ``block(x_BTD, attend=...)``, at a small part of its cost.

    One query per head needs no keys and values: q (x W_k)' = (q W_k') x' and sum_t a_t (x_t W_v) = (sum_t a_t x_t) W_v,
    so the weights of keys and values are multiplied with one vector per head instead of all T tokens. Here x are the
    normed tokens, q the query of position 0, W_k and W_v the weights of keys and values, ' is transposition and a_t the
    weight of attention to token t. (The bias of the
    keys adds the same to all scores of a query, which softmax ignores; the bias of the values is added as it is, since
    the weights of attention sum to 1.)
    """
    attention = block.attention
    normed_BTD = rounded(block.norm_attention(x_BTD))
    query_weight, key_weight_HED, value_weight_HED = (
        part.unflatten(0, (attention.heads, -1)) for part in attention.qkv.weight.chunk(3)
    )
    query_bias, _, value_bias = attention.qkv.bias.chunk(3)
    q_BHE = F.linear(normed_BTD[:, 0], query_weight.flatten(0, 1), query_bias).unflatten(-1, (attention.heads, -1))
    q_BHE = q_BHE * q_BHE.shape[-1] ** -0.5
    asked_BHD = torch.einsum("bhe,hed->bhd", q_BHE, key_weight_HED)
    scores_BHT = asked_BHD @ normed_BTD.transpose(1, 2)
    weights_BHT = scores_BHT.masked_fill(~attend_B11T[:, 0], -torch.inf).softmax(-1, dtype=torch.float32)
    mixed_BHD = weights_BHT @ normed_BTD
    mixed_BHE = torch.einsum("bhd,hed->bhe", mixed_BHD, value_weight_HED) + value_bias.view(attention.heads, -1)
    first_BD = x_BTD[:, 0] + attention.out(mixed_BHE.flatten(1))
    return first_BD + block.mlp(block.norm_mlp(first_BD))


def sin_cos_table(tokens: int, width: int) -> Float[Tensor, "S D"]:
    """Fixed 2-D positions: a quarter of the width each for sin and cos of the row and the column; zero for CLS.

    Raises ValueError where the patches form no square or the width is no multiple of 4.
    """
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1 or width % 4:
        raise ValueError(
            f"no square grid of {tokens - 1} patches in a width of {width}: make the width a multiple of 4"
        )
    rates = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    across, down = waves.repeat(side, 1), waves.repeat_interleave(side, 0)
    return torch.cat([torch.zeros(1, width), torch.cat([across, down], dim=1)])


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

    def build(self, model: Learner) -> "ItoObjective":
        return ItoObjective(model, self)


class ItoObjective(PairsObjective[ItoConfig]):
    """L = L_align + lambda L_fusion, the InfoNCE of views and captions and the NT-Xent of fused views."""

    def __init__(self, model: Learner, config: ItoConfig) -> None:
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
        pairs: CaptionedImageExamples | CaptionedStateExamples = batch["pairs"]
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
        """The fused vector of every view, [V b D]. View v is fused with caption v; where there are fewer captions than
        views, they are repeated cyclically."""
        assert self.fusion is not None
        positions_LD = self.model.text_positions(valid[0].shape[1])
        repeated = cycle(zip(texts, valid, strict=True))
        return torch.stack(
            [
                self.fusion(image.tokens_BSD, text.tokens_BSD, valid_BL, positions_LD)
                for image, (text, valid_BL) in zip(images, repeated, strict=False)
            ]
        )
