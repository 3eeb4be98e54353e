"""Quantizing latents with a codebook that is being learned and must not collapse.

A code that is never the nearest one gets no gradient and stays dead. Two cures prevent that, and both give the same
codes on every process. The codebook starts as a k-means of the encoder's outputs, and a code that has gone unused is
moved onto a latent of the current batch.

Shapes: B images, h and w positions, M = B·h·w latents, K codes, E width of a code.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diptych.errors import UserError
from diptych.rng import StepRNG
from diptych.tokenizers.image_tokenizer import nearest_codes


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
