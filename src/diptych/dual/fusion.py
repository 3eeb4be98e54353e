"""ITO's fusion module: the tokens of an image and of its caption become one vector. It exists in training alone.

Shapes: B rows, S image tokens (CLS first), L text tokens, T = S + L, D width, H heads, E width of one head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diptych.nn.transformer import Block, init_weights, rounded


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
    so the weights of keys and values are multiplied with one vector per head instead of all T tokens. (The bias of the
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
