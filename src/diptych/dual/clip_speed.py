"""What we compute differently inside `transformers.CLIPModel`. Weights, their names and results stay CLIP's.

Shapes: B rows, H and W pixels, P numbers of a patch, S tokens, X inner width of an MLP.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, CLIPModel
from transformers.masking_utils import sdpa_mask
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

from diptych.nn.transformer import attention, rounded

_ATTENTION = "diptych"


def quicken(clip: CLIPModel) -> CLIPModel:
    """``clip`` itself, with our attention, first layer and norms before attention."""
    clip.set_attn_implementation(_ATTENTION)
    clip.vision_model.embeddings.patch_embedding.__class__ = _Patches
    for module in clip.modules():
        if isinstance(module, CLIPEncoderLayer):
            module.layer_norm1.__class__ = _RoundingNorm
    return clip


def forget_activations(clip: CLIPModel) -> None:
    """From now on GELU's outputs, the widest tensors of the image tower, are made again on the way back instead of
    kept: a sixth of its memory for a hundredth of the time. (The text tower is much smaller.)"""
    for module in clip.vision_model.modules():
        if isinstance(module, CLIPMLP):
            module.__class__ = _LeanMLP


class _Patches(nn.Conv2d):
    """CLIP's first layer, whose windows do not overlap, as one matrix product: a sixth of the time in bf16 on a CPU.

    Weights and their names are the convolution's.
    """

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        height, width = self.kernel_size
        grid_B3YyXx = pixels_B3HW.unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches_BYXP = grid_B3YyXx.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches_BYXP, self.weight.flatten(1)).permute(0, 3, 1, 2)


class _RoundingNorm(nn.LayerNorm):
    """Before CLIP's three products for queries, keys and values."""

    def forward(self, x_BSW: Tensor) -> Tensor:
        return rounded(super().forward(x_BSW))


class _LeanMLP(CLIPMLP):
    """CLIP's MLP that keeps what enters its GELU and not what leaves it. Only GELU is computed twice: recomputation
    stops where the last tensor that backward needs is there, which is before the second matrix product."""

    def forward(self, x_BSW: Tensor) -> Tensor:
        wide_BSX = self.fc1(x_BSW)
        return checkpoint(self._narrow, wide_BSX, use_reentrant=False, preserve_rng_state=False)

    def _narrow(self, wide_BSX: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(wide_BSX))


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, *,
    is_causal: bool = False, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Our attention inside CLIP: several times as fast as its own in bf16 on a CPU, the same kernel elsewhere."""
    causal = is_causal and attend is None
    return attention(q, k, v, attend=attend, causal=causal).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
