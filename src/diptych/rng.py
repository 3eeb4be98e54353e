"""Random numbers that follow from (seed, step, name) alone, whatever process, thread or device asks for them."""

import hashlib
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from jaxtyping import UInt64
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""Step of the counter that SplitMix64 (Steele, Lea and Flood, 2014) hashes, modulo 2^64."""
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MIXES, _SHIFTS = np.array([_MIX_1, _MIX_2], np.uint64), np.array([30, 27, 31], np.uint64)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and names, e.g. ``derive_seed(seed, "split", 3)``; equal parts, equal seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix64(x: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The finalizer of SplitMix64: a permutation of the 64-bit numbers in which each bit of x moves all bits."""
    shifted = x >> _SHIFTS[0]
    x = x ^ shifted  # a copy; the rest is in place, as rows of a batch are few and each call of NumPy costs
    x *= _MIXES[0]
    x ^= np.right_shift(x, _SHIFTS[1], out=shifted)
    x *= _MIXES[1]
    x ^= np.right_shift(x, _SHIFTS[2], out=shifted)
    return x


@dataclass(frozen=True, slots=True)
class StepRNG:
    """The random numbers of one step for the rows of one process, the same however rows are split over processes.

    Number e of row r of a stream is a function of (seed, step, name, r, e), where r counts the rows of all processes.
    So a process computes the numbers of its own rows only.
    """

    seed: int
    step: int
    rank: int = 0
    world: int = 1

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator that is the same on all processes, for what they must draw alike."""
        return torch.Generator(device).manual_seed(derive_seed(self.seed, self.step, name))

    def uniform(self, name: str, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), fp32 multiples of 2^-24, of shape [rows, *shape].

        ``rows`` counts the rows of this process. The bits do not depend on the device.
        """
        count = rows * prod(shape)
        key = derive_seed(self.seed, self.step, name)
        return hashed_uniform(key, self.rank * count, count, device=device).view(rows, *shape)

    def gumbel(self, name: str, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard Gumbel numbers of shape [rows, *shape], fp32: lower precisions have too few distinct values."""
        noise = self.uniform(name, rows, *shape, device=device)
        noise.clamp_(min=1e-20).log_().neg_()
        return noise.clamp_(min=1e-20).log_().neg_()  # neither end of [0, 1) may give infinity


@dataclass(frozen=True, slots=True)
class RowRNG(StepRNG):
    """Random numbers of rows that have seeds of their own: those of a row do not depend on the other rows."""

    row_seeds: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    """Where given, what each row has in the place of ``seed``."""

    def uniform(self, name: str, rows: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """As :meth:`StepRNG.uniform`; ``rows`` must be the number of seeds."""
        assert rows == len(self.row_seeds)
        seeds = zip(self.seeds or (self.seed,) * rows, self.row_seeds, strict=True)
        keys_R = torch.tensor([derive_seed(seed, self.step, name, each) for seed, each in seeds], device=device)
        count_C = torch.arange(1, prod(shape) + 1, device=device).mul_(_signed(GOLDEN))
        return (_hash(count_C + keys_R[:, None]) * 2.0**-24).view(rows, *shape)


def hashed_uniform(key: int, first: int, count: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Numbers ``first`` to ``first + count`` of the uniform sequence of ``key``: [count], fp32 in [0, 1).

    Number n is the upper 24 bits of output n of SplitMix64 with seed ``key``. That generator hashes a counter, so any
    part of its sequence can be computed without the part before it. This is :func:`mix64` on any device, in place and
    without the last xor-shift, which changes the lower bits only.
    """
    out = torch.empty(count, device=device)
    # The integers take 16 bytes a number for a while: a part at a time, on a CPU as large as its cache.
    part = 2**16 if out.device.type == "cpu" else 2**24
    for start in range(0, count, part):
        end = min(start + part, count)
        x = (
            torch.arange(first + start + 1, first + end + 1, device=device).mul_(_signed(GOLDEN)).add_(key)
        )  # modulo 2^64
        torch.mul(_hash(x), 2.0**-24, out=out[start:end])
    return out


def _hash(x: Tensor) -> Tensor:
    """The upper 24 bits of SplitMix64's hash of the counters ``x``, int64, which are overwritten."""
    x.bitwise_xor_((x >> 30).bitwise_and_(2**34 - 1)).mul_(_signed(_MIX_1))  # the mask makes `>>` shift in zeros
    x.bitwise_xor_((x >> 27).bitwise_and_(2**37 - 1)).mul_(_signed(_MIX_2))
    return (x >> 40).bitwise_and_(2**24 - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of the unsigned ``word``."""
    return word - 2**64 if word >= 2**63 else word
