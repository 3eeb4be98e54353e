"""PatchGAN: tells real pictures from reconstructions, one verdict per overlapping patch.

Shapes: B pictures, H and W pixels, h and w verdicts down and across.

Departures from pix2pix: group norms instead of batch norms, so that a verdict depends on one picture only and the
discriminator has no running statistics; losses are then the same for any split of the rows.
"""

from jaxtyping import Float
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """``layers`` convolutions of stride 2, each doubling the width up to eight times, then one verdict per position.

    A verdict sees 16, 34 or 70 pixels a side for 1, 2 or 3 layers.
    """

    def __init__(self, *, width: int = 64, layers: int = 3):
        super().__init__()
        stages: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        inner = width
        for layer in range(1, layers + 1):
            outer = width * min(2**layer, 8)
            # The last of them keeps the resolution.
            stages.append(nn.Conv2d(inner, outer, 4, stride=2 if layer < layers else 1, padding=1, bias=False))
            stages += [nn.GroupNorm(min(8, outer), outer), nn.LeakyReLU(0.2)]
            inner = outer
        self.stages = nn.Sequential(*stages, nn.Conv2d(inner, 1, 4, padding=1))
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions N(0, 0.02), biases 0, norms 1 and 0, as in pix2pix."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, picture_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """Logits, positive for real."""
        return self.stages(picture_B3HW)
