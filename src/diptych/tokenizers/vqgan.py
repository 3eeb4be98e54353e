"""VQGAN: the training objective of an image tokenizer (Esser et al., 2021), with the losses of Muse's appendix.

    L = |x - x̂|₁ + λ_s |x - x̂|² + λ_p d(x, x̂) + |sg(z) - e|² + β |z - sg(e)|² - λ_a D(x̂)
    L_D = max(0, 1 - D(x)) + max(0, 1 + D(sg(x̂)))

where x̂ decodes the codes e nearest to the latents z of the image x, d is a perceptual distance and D the discriminator,
a PatchGAN (Isola et al., 2017). By default d compares edges at three scales and needs no network. Given a vision model,
d compares its features as LPIPS does, without LPIPS's learned weights (Zhang et al., 2018).

L and L_D are one sum and take one optimizer step. The generator's term of L goes through a discriminator whose weights
are detached, and L_D reads detached reconstructions, so every parameter gets the gradient of its own loss only.

The codebook must not collapse while it is being learned: a code that is never the nearest one gets no gradient and
stays dead. Two cures prevent that, and both give the same codes on every process. The codebook starts as a k-means of
the encoder's outputs, and a code that has gone unused is moved onto a latent of the current batch.

Departure: the discriminator of pix2pix has batch norms, this one has group norms. A verdict then depends on one image
only, there are no running statistics, and losses are the same for any split of the rows over processes.

Shapes: B images, H and W pixels, M = B·h·w latents, K codes, E width of a code, h and w tokens of an image or verdicts
of the discriminator down and across, C channels and N tokens of a vision model's layer.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from diptych.data.batch import Batch, ImageExamples
from diptych.encoders.image import HubImageEncoder, folded, open_image_encoder
from diptych.errors import UserError, first_line
from diptych.io import weights_digest
from diptych.rng import StepRNG
from diptych.tokenizers.image_tokenizer import ImageTokenizer, nearest_codes
from diptych.train.objective import Losses, Objective

_LAYERS = 4
"""Number of layers that are compared of a model whose layers all have the same resolution."""
_CAN_JUDGE = "name a ResNet, EfficientNet, ConvNeXt, ViT or the like, or leave --stage.objective.perceptual away"


@dataclass(kw_only=True, slots=True)
class CodebookConfig:
    """How codes are seeded and how unused ones are revived."""

    start: float = 0.0
    """Share of the steps, 0 to 1, after which the codebook is seeded from the encoder's outputs and quantization
    begins; until then latents pass unchanged. -1 keeps the codebook that the tokenizer brings, for fine-tuning."""
    reset_every: int = 20
    """Number of steps between two searches for dead codes; 0 never searches."""
    reset_until: float = 1.0
    """Share of the steps, 0 to 1, after which dead codes are left alone, so that the last steps train a codebook that
    stands still."""
    dead_below: float = 0.05
    """Share of the average use 1/K below which a code counts as dead."""
    usage_decay: float = 0.95
    """Decay per step of the running mean of every code's use."""
    seeding_rounds: int = 10
    """Number of k-means rounds that seed the codebook."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Latents after quantization, with the losses that it adds."""

    latents_BEhw: Tensor
    """Codes in the forward pass. In the backward pass the gradient goes straight through to the encoder."""
    codebook: Tensor
    """The loss |sg(z) - e|², which moves codes to latents."""
    commitment: Tensor
    """The loss |z - sg(e)|², which holds latents to their codes."""
    perplexity: Tensor
    """exp of the entropy of the codes in this batch: how many codes are in effective use."""


class Codebook(nn.Module):
    """Quantizes latents, seeds the codes of a tokenizer and revives dead ones.

    The codes themselves belong to the tokenizer. This module keeps the running mean of each code's use.
    """

    usage_K: Tensor

    def __init__(self, config: CodebookConfig, *, codebook_size: int, steps: int):
        """``steps``: number of steps of the training. Raises UserError for a share that is none."""
        super().__init__()
        self.config = config
        self.start = -1 if config.start == -1 else min(step_at("start", config.start, steps), steps - 1)
        """Step at which quantization begins; -1 if the codes are there already."""
        self.reset_until = step_at("reset-until", config.reset_until, steps)
        """Step from which dead codes are left alone."""
        # A buffer that is saved: a resumed run must find the same codes dead.
        self.register_buffer("usage_K", torch.full((codebook_size,), 1 / codebook_size))

    def forward(
        self, latents_BEhw: Float[Tensor, "B E h w"], codes_KE: Float[Tensor, "K E"], *, rng: StepRNG, step: int
    ) -> Quantized:
        """The nearest code of each latent, and the losses. In training mode ``codes_KE`` may be changed in place."""
        rows, _, height, width = latents_BEhw.shape
        latents_ME = latents_BEhw.permute(0, 2, 3, 1).flatten(0, 2).float()
        if step < self.start:
            zero = latents_ME.new_zeros(())
            return Quantized(latents_BEhw, zero, zero, zero)
        self._maintain(latents_ME.detach(), codes_KE.detach(), rng, step)
        tokens_M = nearest_codes(latents_ME.detach(), codes_KE.detach())
        share_K = self._count(tokens_M)
        chosen_ME = F.embedding(tokens_M, codes_KE)
        through_ME = latents_ME + (chosen_ME - latents_ME).detach()
        return Quantized(
            latents_BEhw=through_ME.view(rows, height, width, -1).permute(0, 3, 1, 2).to(latents_BEhw.dtype),
            codebook=F.mse_loss(chosen_ME, latents_ME.detach()),
            commitment=F.mse_loss(latents_ME, chosen_ME.detach()),
            perplexity=torch.special.entr(share_K).sum().exp(),
        )

    @torch.no_grad()
    def _count(self, tokens_M: Int[Tensor, "M"]) -> Float[Tensor, "K"]:
        share_K = _mean_over_processes(torch.bincount(tokens_M, minlength=len(self.usage_K)) / len(tokens_M))
        if self.training:
            self.usage_K.lerp_(share_K, 1 - self.config.usage_decay)
        return share_K

    @torch.no_grad()
    def _maintain(self, latents_ME: Tensor, codes_KE: Tensor, rng: StepRNG, step: int) -> None:
        """Seeds the codebook at its first step and revives dead codes later, in place."""
        config = self.config
        if not self.training:
            return
        if step == self.start:
            latents_of_all_ME = _gather_rows(latents_ME)
            codes_KE.copy_(k_means(latents_of_all_ME, len(codes_KE), config.seeding_rounds, rng.generator("codebook")))
            self.usage_K.fill_(1 / len(codes_KE))
        elif config.reset_every and step % config.reset_every == 0 and self.start < step < self.reset_until:
            dead_K = self.usage_K * len(codes_KE) < config.dead_below
            fresh_KE = sample_rows(_gather_rows(latents_ME), len(codes_KE), rng.generator("codebook"))
            codes_KE.copy_(torch.where(dead_K[:, None], fresh_KE, codes_KE))
            self.usage_K.masked_fill_(dead_K, 1 / len(codes_KE))  # time to be found before the next search


def step_at(name: str, share: float, steps: int) -> int:
    """The step at a share of all. Raises UserError for what is no share, such as a number of steps."""
    if not 0 <= share <= 1:
        raise UserError(f"{name} is {share:g}; it is a share of the steps, from 0 to 1")
    return round(share * steps)


def sample_rows(latents_ME: Float[Tensor, "M E"], rows: int, generator: torch.Generator) -> Float[Tensor, "rows E"]:
    """``rows`` random latents, all different while there are enough of them, else with repetitions."""
    order = torch.randperm(len(latents_ME), generator=generator)
    return latents_ME[order.repeat(-(-rows // len(order)))[:rows].to(latents_ME.device)]


def k_means(
    latents_ME: Float[Tensor, "M E"], codebook_size: int, rounds: int, generator: torch.Generator
) -> Float[Tensor, "K E"]:
    """Lloyd's algorithm from random rows. A centre that loses all its rows stays where it is."""
    centres_KE = sample_rows(latents_ME, codebook_size, generator)
    for _ in range(rounds):
        nearest_M = nearest_codes(latents_ME, centres_KE)
        count_K1 = torch.bincount(nearest_M, minlength=codebook_size)[:, None]
        sums_KE = torch.zeros_like(centres_KE).index_add_(0, nearest_M, latents_ME)
        centres_KE = torch.where(count_K1 > 0, sums_KE / count_K1.clamp_min(1), centres_KE)
    return centres_KE


def _gather_rows(latents_ME: Tensor) -> Tensor:
    """The latents of all processes in rank order, so that each process changes its copy of the codes alike."""
    if not (dist.is_available() and dist.is_initialized()):
        return latents_ME
    pieces = [torch.empty_like(latents_ME) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, latents_ME.contiguous())
    return torch.cat(pieces)


def _mean_over_processes(share_K: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(share_K)
        share_K /= dist.get_world_size()
    return share_K


@dataclass(kw_only=True, slots=True)
class VQGANConfig:
    """Weights of the losses of a VQGAN, its discriminator and its codebook."""

    squared_weight: float = 0.0
    """Weight λ_s of the squared error. Small flat images need it: the absolute error alone is small for a plain
    background, which is their median colour."""
    perceptual: str | None = None
    """Vision model that gives the perceptual distance: a folder, hub name or package such as
    `package:efficientnet-lite0`. None compares edges instead."""
    perceptual_weight: float = 1.0
    """Weight λ_p of the perceptual distance."""
    commitment_weight: float = 0.25
    """Weight β of the commitment loss, which holds the latents to their codes."""
    adversarial_weight: float = 0.1
    """Weight λ_a of the discriminator's verdict in the tokenizer's loss; 0 trains without a discriminator."""
    adversarial_start: float = 0.1
    """Share of the steps, 0 to 1, after which the discriminator learns and its verdict counts."""
    adversarial_balance: Literal["fixed", "adaptive"] = "fixed"
    """Scale of λ_a: fixed takes it as it is; adaptive scales it at every step so that the gradients of verdict and
    reconstruction losses at the reconstructed image are equally long."""
    discriminator_width: int = 64
    """Number of channels after the discriminator's first convolution."""
    discriminator_layers: int = 3
    """Number of the discriminator's convolutions before its verdict. 1, 2 or 3 see 16, 34 or 70 pixels a side."""
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    """How codes are seeded and how unused ones are revived."""


class VQGAN(Objective):
    """Trains ``tokenizer`` in place on the stream ``images`` of pixels.

    The terms are ``pixel``, ``perceptual``, ``codebook`` and, from ``adversarial_start`` on, ``adversarial`` and
    ``discriminator``; the measures are ``psnr`` in decibels and the ``perplexity`` of the codes in the batch. ``seed``
    decides the weights of the discriminator. Raises UserError for a perceptual model that cannot be loaded.
    """

    may_skip_parameters = True  # the discriminator joins at `adversarial_start`

    def __init__(self, tokenizer: ImageTokenizer, config: VQGANConfig, *, steps: int, seed: int = 0):
        super().__init__()
        self.streams = {"images": 1}
        self.config = config
        self.tokenizer = tokenizer
        self.codebook = Codebook(config.codebook, codebook_size=tokenizer.codebook_size, steps=steps)
        self.adversarial_start = step_at("adversarial-start", config.adversarial_start, steps)
        self.perceptual: PerceptualNetwork | None = None
        if config.perceptual:
            self.perceptual = PerceptualNetwork(config.perceptual, image_size=tokenizer.image_size)
        self.discriminator: PatchDiscriminator | None = None
        if config.adversarial_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.discriminator = PatchDiscriminator(
                    width=config.discriminator_width, layers=config.discriminator_layers
                )

    def forward(self, batch: Batch, step: int) -> Losses:
        images: ImageExamples = batch["images"]
        real = self.tokenizer.pixels_to_input(images.pixels_B3HW)
        latents_BEhw = self.tokenizer.latents(real)
        quantized = self.codebook(latents_BEhw, self.tokenizer.codebook, rng=batch.rng, step=step)
        fake = self.tokenizer.reconstruct(quantized.latents_BEhw).float()
        pixel = F.l1_loss(fake, real)
        perceptual = self._perceptual_distance(fake, real) if self.config.perceptual_weight else pixel.new_zeros(())
        squared = F.mse_loss(fake, real)
        reconstruction = pixel + self.config.squared_weight * squared + self.config.perceptual_weight * perceptual
        total = reconstruction + quantized.codebook + self.config.commitment_weight * quantized.commitment
        terms = {"pixel": pixel, "perceptual": perceptual, "codebook": quantized.codebook}
        measures = {
            "psnr": psnr(squared.detach(), peak=1.0 if self.tokenizer.unit_range else 2.0),
            "perplexity": quantized.perplexity,
        }
        if self.discriminator is not None and step >= self.adversarial_start:
            generator, discriminator, scale = self._adversarial(fake, real, reconstruction)
            total = total + self.config.adversarial_weight * scale * generator + discriminator
            terms |= {"adversarial": generator, "discriminator": discriminator}
        return Losses(total, {name: value.detach() for name, value in terms.items()}, measures)

    def written_in_forward(self) -> list[nn.Parameter]:
        """The codes, which are seeded and revived in the step."""
        return [p for p in self.tokenizer.parameters() if p is self.tokenizer.codebook]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state without the perceptual network, which never changes."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in [name for name in state if name.startswith(f"{prefix}perceptual.")]:
            del state[name]
        return state

    def _perceptual_distance(self, fake: Tensor, real: Tensor) -> Tensor:
        if self.perceptual is None:
            return edge_distance(fake, real)
        if not self.tokenizer.unit_range:
            fake, real = (fake + 1) / 2, (real + 1) / 2
        return self.perceptual(fake, real)

    def _adversarial(self, fake: Tensor, real: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """The loss of the generator, the loss of the discriminator, and the scale of the first of them.

        The scale is that of ``adversarial_balance`` against the loss ``reconstruction``.
        """
        assert self.discriminator is not None
        frozen = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        generator = -functional_call(self.discriminator, frozen, (fake,)).mean()
        discriminator = hinge(self.discriminator(real), self.discriminator(fake.detach()))
        if self.config.adversarial_balance == "fixed" or not torch.is_grad_enabled():
            return generator, discriminator, 1.0
        # taming-transformers measures both gradients at the weights of the last layer; at the image it is cheaper.
        wanted, other = (
            torch.autograd.grad(loss, fake, retain_graph=True)[0].norm() for loss in (reconstruction, generator)
        )
        return generator, discriminator, (wanted / (other + 1e-6)).clamp(max=1e4)


def hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 - D(x)) + max(0, 1 + D(x̂)), averaged. A discriminator that gives 0 for everything has a loss of 2."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def psnr(squared_error: Tensor, *, peak: float) -> Tensor:
    """Peak signal-to-noise ratio in decibels of a mean squared error of images whose values range over ``peak``."""
    return -10 * torch.log10(squared_error.clamp_min(1e-10) / peak**2)


class PatchDiscriminator(nn.Module):
    """Tells real images from reconstructions, with one verdict for each of many overlapping patches.

    After a first convolution of ``width`` channels come ``layers`` more, each of twice the channels up to eight times
    ``width``. All have stride 2 but the last. A verdict sees 16, 34 or 70 pixels a side for 1, 2 or 3 layers.
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

    def forward(self, image_B3HW: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """Logits, positive where the patch is taken for real."""
        return self.stages(image_B3HW)


def edge_distance(
    left_B3HW: Float[Tensor, "B 3 H W"], right_B3HW: Float[Tensor, "B 3 H W"], *, scales: int = 3
) -> Float[Tensor, ""]:
    """Mean absolute difference of the horizontal and vertical pixel differences, averaged over ``scales`` halvings.

    An absolute error of pixels hardly notices a blurred outline. This distance does, as a blurred edge has the wrong
    slope everywhere. It costs less than one convolution at full resolution and needs no weights.
    """
    difference = left_B3HW - right_B3HW  # linear, so the difference of edges is the edges of the difference
    total = difference.new_zeros(())
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return total / scales


class PerceptualNetwork(nn.Module):
    """Squared distance of the features that a frozen vision model has of two images, averaged over some of its layers.

    The features of a place have unit length over the channels, as in LPIPS. The comparison takes the last layer of
    every resolution or, of a model with one resolution such as a ViT, four layers at equal distances. Images are scaled
    and normalized as the model was trained to see them. A convolutional network gets them as large as they are, a model
    with tokens (ViT, Swin) in the size that it was trained for. Batch norms are folded into the convolutions.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *, image_size: int):
        """The model of a folder, hub name, package or run, for images of ``image_size`` pixels a side.

        Raises UserError where it cannot be loaded, where weights of it are missing, and where it gives no features of
        single places.
        """
        super().__init__()
        encoder = open_image_encoder(name)
        if not isinstance(encoder, HubImageEncoder):
            raise UserError(f"{name}: an ITIT run sees tokens, through which no gradient comes; {_CAN_JUDGE}")
        self.digest = weights_digest(encoder.network)
        self.network: nn.Module = encoder.network.requires_grad_(False)
        self.input_size = encoder.image_size
        to_input = 255 * encoder.scale
        self.register_buffer("mean", encoder.image_mean / to_input, persistent=False)
        self.register_buffer("std", encoder.image_std / to_input, persistent=False)
        self.train(False)
        self.layers = self._choose_layers(name, image_size)
        self.network = folded(encoder.network).requires_grad_(False)  # what passed above can be folded

    @torch.no_grad()
    def _choose_layers(self, name: str, image_size: int) -> list[int]:
        """Numbers of the layers that are compared. Decides the size of the input too."""
        found: tuple[Tensor, ...] = ()
        reason = "it has no hidden states of places"
        for size in (image_size, self.input_size):
            try:
                found = self._layers(torch.zeros(1, 3, size, size))
            except Exception as error:  # each model refuses a size, or pixels at all, by an error of its own
                found, reason = (), first_line(error)
            if found and all(layer.ndim == 4 for layer in found):
                self.input_size = size
                break
        if not found or any(layer.ndim not in (3, 4) for layer in found):
            raise UserError(f"{name}: gives no features of single places of an image ({reason}); {_CAN_JUDGE}")
        resolutions = [tuple(layer.shape[2:] if layer.ndim == 4 else layer.shape[1:2]) for layer in found]
        last = sorted({resolution: number for number, resolution in enumerate(resolutions)}.values())
        if len(last) > 1:
            return last
        deepest = len(found) - 1
        return sorted({max(1, round(deepest * part / _LAYERS)) for part in range(1, _LAYERS + 1)}) if deepest else [0]

    def train(self, mode: bool = True) -> "PerceptualNetwork":
        """Stays in evaluation mode: dropout and the statistics of batch norms would change a frozen network."""
        return super().train(False)

    def _layers(self, image_B3HW: Tensor) -> tuple[Tensor, ...]:
        normal_B3HW = ((image_B3HW - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        output = self.network(pixel_values=normal_B3HW, output_hidden_states=True)
        return tuple(getattr(output, "hidden_states", None) or ())

    def features(self, image_B3HW: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The features of the chosen layers, [B, C, h, w] or [B, N, C], with unit length over the channels.

        Images lie in [0, 1].
        """
        size = (self.input_size, self.input_size)
        if image_B3HW.shape[2:] != size:
            image_B3HW = F.interpolate(image_B3HW, size, mode="bilinear", antialias=True, align_corners=False)
        layers = self._layers(image_B3HW)
        chosen = [layers[number] for number in self.layers]
        return [F.normalize(layer, dim=1 if layer.ndim == 4 else 2, eps=1e-6) for layer in chosen]

    def forward(
        self, output_B3HW: Float[Tensor, "B 3 H W"], target_B3HW: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, ""]:
        """The distance of two batches of images. The gradient reaches ``output_B3HW`` only."""
        with torch.no_grad():
            wanted = self.features(target_B3HW)
        pairs = zip(self.features(output_B3HW), wanted, strict=True)
        return torch.stack([_squared_distance(output, target) for output, target in pairs]).mean()


def _squared_distance(output: Tensor, target: Tensor) -> Tensor:
    """Squared distance over channels, averaged over everything else."""
    return (output - target).square().sum(1 if output.ndim == 4 else 2).mean()
