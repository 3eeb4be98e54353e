"""Random numbers that follow from (seed, step, name) alone, whatever process or thread asks for them."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and names, e.g. ``derive_seed(seed, "split", 3)``; equal parts, equal seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class StepRNG:
    """The random numbers of one step, the same however its rows are split over processes.

    Every draw is made for all ``global_rows`` rows of a stream from (seed, step, name) and cut to the rows of this
    process. That is free on one process; on many it buys losses that do not depend on their number.
    """

    seed: int
    step: int
    rank: int = 0
    world: int = 1

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(derive_seed(self.seed, self.step, name))

    def uniform(self, name: str, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1) of shape [rows, *shape], where ``rows`` counts this process's rows."""
        noise = torch.rand(rows * self.world, *shape, generator=self.generator(name, device), device=device)
        return noise[self.rank * rows : (self.rank + 1) * rows]

    def gumbel(self, name: str, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard Gumbel numbers, fp32: lower precisions have too few distinct values."""
        exponential = -torch.log(self.uniform(name, rows, *shape, device=device).clamp_min(1e-20))
        return -torch.log(exponential.clamp_min(1e-20))  # neither end of [0, 1) may give infinity
