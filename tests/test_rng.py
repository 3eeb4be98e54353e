import torch

from diptych.rng import StepRNG, derive_seed


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


def test_gumbel_is_standard_and_finite():
    noise = StepRNG(0, 0).gumbel("g", 1000, 1000)
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - 1.6449) < 0.02


def test_gumbel_stays_finite_at_the_ends_of_its_uniform(monkeypatch):
    edge = torch.tensor([[0.0, 1.0 - 2**-24]])
    monkeypatch.setattr(StepRNG, "uniform", lambda *_, **__: edge)
    assert StepRNG(0, 0).gumbel("g", 1, 2).isfinite().all()
