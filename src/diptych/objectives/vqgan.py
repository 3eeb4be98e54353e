"""VQGAN: train an image tokenizer (Esser et al., 2021), with the losses of Muse's appendix.

    L = |x - x̂|₁ + λ_s |x - x̂|² + λ_p d(x, x̂) + |sg(z) - e|² + β |z - sg(e)|² - λ_a D(x̂)
    L_D = max(0, 1 - D(x)) + max(0, 1 + D(sg(x̂)))

where x̂ decodes the codes e nearest to the latents z of x, d is a perceptual distance, D the discriminator.

Both are one sum and one optimiser step: the generator's term goes through a discriminator whose weights are detached,
the discriminator's through detached reconstructions, so every parameter gets the gradient of its own loss only.

Shapes: B pictures, H and W pixels, E width of a code, h and w tokens down and across.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from diptych.data.batch import Batch
from diptych.models.discriminator import PatchDiscriminator
from diptych.models.image_tokenizer import ImageTokenizer
from diptych.models.perceptual import PerceptualNetwork, edge_distance
from diptych.objectives.base import Losses
from diptych.objectives.codebook import Codebook, CodebookConfig


@dataclass(kw_only=True, slots=True)
class VQGANConfig:
    squared_weight: float = 0.0
    """λ_s, for small flat pictures: an absolute error alone is content with the background, their median colour."""
    perceptual: str | None = None
    """Folder or hub name of a vision model that judges likeness; none compares edges at three scales instead."""
    perceptual_weight: float = 1.0
    """λ_p."""
    commitment_weight: float = 0.25
    """β."""
    adversarial_weight: float = 0.1
    """λ_a; 0 leaves the discriminator out."""
    adversarial_start: int = 10_000
    """Step at which the discriminator begins to learn and to judge."""
    adversarial_balance: Literal["fixed", "adaptive"] = "fixed"
    """adaptive scales λ_a so that at the reconstruction its gradient is as long as that of the other losses."""
    discriminator_width: int = 64
    """Channels after the discriminator's first convolution."""
    discriminator_layers: int = 3
    """Each doubles the discriminator's field of view."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """How codes are seeded and revived."""


class VQGAN(nn.Module):
    """Reads ``batch.images.pixels_B3HW``; trains ``tokenizer`` in place."""

    def __init__(self, tokenizer: ImageTokenizer, config: VQGANConfig, *, seed: int = 0):
        super().__init__()
        self.streams = {"images": 1}
        self.config = config
        self.tokenizer = tokenizer
        self.codebook = Codebook(config.codebook, codes=tokenizer.codes)
        self.perceptual = PerceptualNetwork(config.perceptual) if config.perceptual else None
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.discriminator = PatchDiscriminator(
                    width=config.discriminator_width, layers=config.discriminator_layers
                )

    def forward(self, batch: Batch, step: int) -> Losses:
        assert batch.images is not None
        assert batch.images.pixels_B3HW is not None
        real = self.tokenizer.pixels_to_input(batch.images.pixels_B3HW)
        latents_BEhw = self.tokenizer.latents(real)
        quantised = self.codebook(latents_BEhw, self.tokenizer.codebook, draws=batch.draws, step=step)
        fake = self.tokenizer.reconstruct(quantised.latents_BEhw).float()
        pixel, perceptual = F.l1_loss(fake, real), self._look(fake, real)
        squared = F.mse_loss(fake, real)
        likeness = pixel + self.config.squared_weight * squared + self.config.perceptual_weight * perceptual
        total = likeness + quantised.codebook + self.config.commitment_weight * quantised.commitment
        terms = {
            "pixel": pixel,
            "perceptual": perceptual,
            "codebook": quantised.codebook,
            "psnr": psnr(squared, peak=1.0 if self.tokenizer.unit_range else 2.0),
            "perplexity": quantised.perplexity,
        }
        if self.discriminator is not None and step >= self.config.adversarial_start:
            generator, discriminator, scale = self._adversarial(fake, real, likeness)
            total = total + self.config.adversarial_weight * scale * generator + discriminator
            terms |= {"adversarial": generator, "discriminator": discriminator}
        return Losses(total, {name: value.detach() for name, value in terms.items()})

    def _look(self, fake: Tensor, real: Tensor) -> Tensor:
        if self.perceptual is None:
            return edge_distance(fake, real)
        if not self.tokenizer.unit_range:
            fake, real = (fake + 1) / 2, (real + 1) / 2
        return self.perceptual(fake, real)

    def _adversarial(self, fake: Tensor, real: Tensor, likeness: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """The generator's loss, the discriminator's, and the balance of the first against ``likeness``."""
        assert self.discriminator is not None
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        generator = -functional_call(self.discriminator, frozen, (fake,)).mean()
        discriminator = hinge(self.discriminator(real), self.discriminator(fake.detach()))
        if self.config.adversarial_balance == "fixed" or not torch.is_grad_enabled():
            return generator, discriminator, 1.0
        # taming-transformers measures both at the last layer's weights; at the picture itself it is cheaper.
        wanted, other = (torch.autograd.grad(loss, fake, retain_graph=True)[0].norm() for loss in (likeness, generator))
        return generator, discriminator, (wanted / (other + 1e-6)).clamp(max=1e4)


def hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 - D(x)) + max(0, 1 + D(x̂)), averaged; 2 for a discriminator that knows nothing."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def psnr(squared_error: Tensor, *, peak: float) -> Tensor:
    """Peak signal-to-noise ratio in decibels of a mean squared error of pictures that range over ``peak``."""
    return -10 * torch.log10(squared_error.clamp_min(1e-10) / peak**2)
