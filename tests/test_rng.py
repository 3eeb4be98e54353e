import math

import numpy as np
import pytest
import torch

from diptych.rng import GOLDEN, RowRNG, StepRNG, derive_seed, hashed_uniform, mix64


def test_derive_seed_tells_everything_apart():
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed("0"),
        derive_seed(0, 0),
    }
    assert len(seeds) == 6
    assert derive_seed(3, "x") == derive_seed(3, "x")
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_draws_depend_on_seed_step_and_name_alone():
    base = StepRNG(0, 5).uniform("a", 4, 3)
    assert torch.equal(base, StepRNG(0, 5).uniform("a", 4, 3))
    for other in (StepRNG(1, 5).uniform("a", 4, 3), StepRNG(0, 6).uniform("a", 4, 3), StepRNG(0, 5).uniform("b", 4, 3)):
        assert not torch.equal(base, other)


def test_rows_keep_their_numbers_on_any_number_of_processes():
    whole = StepRNG(0, 0).gumbel("g", 6, 2)
    for world in (2, 3):
        parts = [StepRNG(0, 0, rank, world).gumbel("g", 6 // world, 2) for rank in range(world)]
        assert torch.equal(torch.cat(parts), whole)


def test_rows_with_seeds_of_their_own_ignore_the_others():
    whole = RowRNG(3, 0, row_seeds=(7, 8, 9)).gumbel("g", 3, 5, 2)
    assert torch.equal(RowRNG(3, 0, row_seeds=(9, 7)).gumbel("g", 2, 5, 2), whole[[2, 0]])
    key = derive_seed(3, 0, "g", 8)
    expected = hashed_uniform(key, 0, 10).view(5, 2)
    assert torch.equal(RowRNG(3, 0, row_seeds=(7, 8, 9)).uniform("g", 3, 5, 2)[1], expected)
    assert not torch.equal(RowRNG(4, 0, row_seeds=(7,)).uniform("g", 1, 5, 2)[0], whole[0])
    both = RowRNG(0, 0, row_seeds=(7, 8), seeds=(4, 3)).uniform("g", 2, 5, 2)
    assert torch.equal(both[0], RowRNG(4, 0, row_seeds=(7,)).uniform("g", 1, 5, 2)[0])
    assert torch.equal(both[1], expected)


def test_gumbel_is_standard_and_finite():
    noise = StepRNG(0, 0).gumbel("g", 1000, 1000)
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - 1.6449) < 0.02


def test_gumbel_stays_finite_at_the_ends_of_its_uniform(monkeypatch):
    edge = torch.tensor([[0.0, 1.0 - 2**-24]])
    monkeypatch.setattr(StepRNG, "uniform", lambda *_, **__: edge)
    assert StepRNG(0, 0).gumbel("g", 1, 2).isfinite().all()


def splitmix64(key: int, number: int) -> float:
    """Output ``number`` of SplitMix64 in Python's integers, as a uniform number of 24 bits."""
    x = (key + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) >> 40) / 2**24


def test_the_hash_is_splitmix64_at_any_place_of_its_sequence():
    assert splitmix64(0, 0) == (0xE220A8397B1DCDAF >> 40) / 2**24  # the published first output for seed 0
    for key in (0, 1, 2**62 + 12345, derive_seed("x")):
        for first in (0, 7, 2**33 - 3, 2**45):
            expected = torch.tensor([splitmix64(key, first + n) for n in range(6)])
            assert torch.equal(hashed_uniform(key, first, 6), expected)


def test_the_finalizer_is_splitmix64s():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the first outputs for seed 0
    counter = np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)
    assert mix64(counter).tolist() == published


def test_parts_of_a_long_draw_join():
    """A draw is computed some 2^16 numbers at a time."""
    whole = hashed_uniform(5, 0, 150_000)
    assert torch.equal(torch.cat([hashed_uniform(5, n, 50_000) for n in (0, 50_000, 100_000)]), whole)
    assert hashed_uniform(5, 3, 0).shape == (0,)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
@pytest.mark.parametrize(("world", "parts"), [(1, 1), (4, 1), (2, 3), (1, 12)])
def test_a_row_keeps_its_numbers_in_any_split(shape, world, parts):
    """Over processes and over their micro-batches, which are ranks of a larger world."""
    whole = StepRNG(3, 9).uniform("x", 12, *shape)
    assert whole.shape == (12, *shape)
    ranks = world * parts
    cut = [StepRNG(3, 9, rank, ranks).uniform("x", 12 // ranks, *shape) for rank in range(ranks)]
    assert torch.equal(torch.cat(cut), whole)


@pytest.mark.gpu
def test_a_gpu_has_the_same_numbers():
    assert torch.equal(StepRNG(0, 0).uniform("x", 8, 99, device="cuda").cpu(), StepRNG(0, 0).uniform("x", 8, 99))


def kolmogorov_smirnov(sample: torch.Tensor, cdf) -> float:
    """sqrt(n) times the largest distance between the empirical distribution and ``cdf``: above 1.95 once in 1000."""
    n, expected = sample.numel(), cdf(sample.double().flatten().sort().values)
    ranks = torch.arange(n, dtype=torch.float64)
    return max((expected - ranks / n).max().item(), ((ranks + 1) / n - expected).max().item()) * math.sqrt(n)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("shape", [(100_000,), (2000, 50), (50, 40, 50)])
def test_uniform_numbers_are_uniform(seed, shape):
    sample = StepRNG(seed, 7).uniform("noise", *shape)
    assert sample.dtype == torch.float32
    assert 0 <= sample.min() < 1e-4
    assert 1 - 1e-4 < sample.max() < 1
    n = sample.numel()
    assert abs(sample.mean().item() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(sample.var().item() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert kolmogorov_smirnov(sample, lambda x: x) < 1.95
    lowest = torch.bincount((sample.flatten() * 2**24).long() % 16, minlength=16)  # the lowest of the 24 bits, too
    assert ((lowest - n / 16).square() / (n / 16)).sum() < 37.7  # chi-square of 15 degrees, once in 1000


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gumbel_numbers_are_those_of_the_distribution(seed):
    sample = StepRNG(seed, 7).gumbel("noise", 400, 250)
    assert abs(sample.mean().item() - 0.577216) < 4 * math.sqrt(math.pi**2 / 6 / 1e5)
    assert abs(sample.var().item() - math.pi**2 / 6) < 0.05
    assert kolmogorov_smirnov(sample, lambda x: torch.exp(-torch.exp(-x))) < 1.95


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation times the square root of the count: standard normal where there is none."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item() * math.sqrt(a.numel())


def test_neighbours_are_not_correlated():
    """Neither elements nor rows of a draw, nor draws of neighbouring steps, seeds and names."""
    base = StepRNG(0, 5).uniform("view0", 500, 200)
    others = {
        "elements": (base[:, 1:], base[:, :-1]),
        "rows": (base[1:], base[:-1]),
        "step": (base, StepRNG(0, 6).uniform("view0", 500, 200)),
        "seed": (base, StepRNG(1, 5).uniform("view0", 500, 200)),
        "name": (base, StepRNG(0, 5).uniform("view1", 500, 200)),
    }
    found = {name: correlation(*pair) for name, pair in others.items()}
    assert all(abs(value) < 3.5 for value in found.values()), found


def test_first_numbers_of_many_steps_are_uniform_and_independent():
    """Each step has a sequence of its own: what one element sees over steps must be random, too."""
    first = torch.stack([StepRNG(0, step).uniform("x", 1, 2)[0] for step in range(4000)])
    assert kolmogorov_smirnov(first[:, 0], lambda x: x) < 1.95
    assert abs(correlation(first[1:, 0], first[:-1, 0])) < 3.5
    assert abs(correlation(first[:, 0], first[:, 1])) < 3.5
