"""How different two pictures look: distances of features instead of pixels.

Shapes: B pictures, H and W pixels; C channels, h and w positions or N tokens of a layer's features.

Without any network, :func:`edge_distance` compares edges at several scales. With a folder or hub name,
:class:`PerceptualNetwork` compares the layers of a frozen vision model, in the manner of LPIPS without its learned
weights (Zhang et al., 2018).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diptych.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def edge_distance(
    left_B3HW: Float[Tensor, "B 3 H W"], right_B3HW: Float[Tensor, "B 3 H W"], *, scales: int = 3
) -> Float[Tensor, ""]:
    """Mean absolute difference of the horizontal and vertical pixel differences, averaged over ``scales`` halvings.

    A plain L1 loss is content with a blurred outline; this one is not, as a blurred edge has the wrong slope
    everywhere. Costs less than one convolution at full resolution and needs no weights.
    """
    difference = left_B3HW - right_B3HW  # linear, so the difference of edges is the edges of the difference
    total = difference.new_zeros(())
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return total / scales


class PerceptualNetwork(nn.Module):
    """Mean squared difference of channel-normalised features, averaged over the layers of a frozen vision model.

    ``name`` is a folder or hub name of a vision model that ``transformers.AutoModel`` loads: ResNet, ConvNeXt, RegNet,
    Swin and the like take pictures of any size, a ViT only those of its own. Pictures are in [0, 1] and are normalised
    as ImageNet's. (AutoModel and not AutoBackbone: transformers 5 asks the hub for the latter even for a folder.)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str):
        super().__init__()
        from transformers import AutoModel  # heavy

        try:
            model, loading = AutoModel.from_pretrained(
                name, local_files_only=Path(name).is_dir(), output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{name}: no vision model that transformers can load; name another or none") from error
        # A model of two towers, such as CLIP: the picture's.
        self.backbone = getattr(model, "vision_model", model).requires_grad_(False)
        if missing := [key for key in loading["missing_keys"] if "pooler" not in key]:
            raise UserError(f"{name}: weights are missing ({min(missing)}), so it cannot judge pictures; name another")
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> "PerceptualNetwork":
        """Stays in evaluation mode: a frozen judge must not drift with its batch norms."""
        return super().train(False)

    def features(self, picture_B3HW: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """One tensor per layer, [B, C, h, w] of convolutional networks and [B, N, C] of transformers, of length 1."""
        layers = self.backbone((picture_B3HW - self.mean) / self.std, output_hidden_states=True).hidden_states
        return [F.normalize(layer, dim=1 if layer.ndim == 4 else 2, eps=1e-6) for layer in layers]

    def forward(
        self, output_B3HW: Float[Tensor, "B 3 H W"], target_B3HW: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, ""]:
        """The gradient reaches ``output`` only."""
        with torch.no_grad():
            wanted = self.features(target_B3HW)
        pairs = zip(self.features(output_B3HW), wanted, strict=True)
        return torch.stack([_squared(mine, theirs) for mine, theirs in pairs]).mean()


def _squared(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance over channels, averaged over everything else."""
    return (mine - theirs).square().sum(1 if mine.ndim == 4 else 2).mean()
