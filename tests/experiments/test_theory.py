import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diptych.experiments.theory import (
    SubspaceTrial,
    View,
    block_information,
    estimate,
    kept,
    run_trial,
    shared_information,
    variance_along,
)


def view(seed: int, *, count: int = 6, axes: int = 5, shared: int = 3, nuisance: int = 2, noise: float = 0.7) -> View:
    rng = np.random.default_rng(seed)
    return View(
        shared_NMC=rng.standard_normal((count, axes, shared)),
        nuisance_NMP=rng.standard_normal((count, axes, nuisance)),
        noise=noise,
    )


def full_information(views: list[View]) -> np.ndarray:
    """Information about all parameters, sample by sample."""
    shared = views[0].shared_NMC.shape[-1]
    sizes = [v.nuisance_NMP.shape[-1] for v in views]
    total = np.zeros((shared + sum(sizes),) * 2)
    for index, v in enumerate(views):
        start = shared + sum(sizes[:index])
        for design_c, design_p in zip(v.shared_NMC, v.nuisance_NMP, strict=True):
            row = np.zeros((len(design_c), len(total)))
            row[:, :shared] = design_c
            row[:, start : start + sizes[index]] = design_p
            total += row.T @ row / v.noise**2
    return total


def test_the_shared_information_is_the_inverse_of_the_block_of_the_inverse() -> None:
    views = [view(0), view(1, axes=4, nuisance=3, noise=0.2)]
    whole = np.linalg.inv(full_information(views))[:3, :3]
    np.testing.assert_allclose(np.linalg.inv(shared_information(views)), whole, rtol=1e-9)
    np.testing.assert_allclose(block_information(views), full_information(views)[:3, :3], rtol=1e-12)


def test_by_hand() -> None:
    """Two values, one shared and one nuisance parameter that both show in the first value, noise 2."""
    one = View(shared_NMC=np.array([[[1.0], [3.0]]]), nuisance_NMP=np.array([[[1.0], [0.0]]]), noise=2.0)
    assert block_information([one]).item() == pytest.approx((1 + 9) / 4)
    assert shared_information([one]).item() == pytest.approx(9 / 4)
    assert variance_along(shared_information([one]), np.array([2.0])) == pytest.approx(4 * 4 / 9)


def test_an_invertible_nuisance_design_hides_everything() -> None:
    rng = np.random.default_rng(0)
    shared, own = rng.standard_normal((4, 3)), rng.standard_normal((4, 4))
    blind = View(shared_NMC=np.stack([shared] * 9), nuisance_NMP=np.stack([own] * 9))
    assert np.trace(block_information([blind])) > 9
    np.testing.assert_allclose(shared_information([blind]), 0, atol=1e-12)
    assert variance_along(shared_information([blind]), np.ones(3)) == math.inf
    with pytest.raises(ValueError, match="no estimate"):
        estimate([blind], np.ones(3), repetitions=2, rng=rng)


def test_variance_is_infinite_exactly_where_nothing_is_seen() -> None:
    flat = np.diag([4.0, 1.0, 0.0])
    assert variance_along(flat, np.array([1.0, 1.0, 0.0])) == pytest.approx(1.25)
    assert variance_along(flat, np.array([1.0, 0.0, 1e-3])) == math.inf


def test_maximum_likelihood_estimates_vary_as_the_formula_says() -> None:
    views = [view(0), view(1, axes=4, noise=0.2)]
    theta = np.array([1.0, -2.0, 3.0])
    predictions = estimate(views, theta, repetitions=20_000, rng=np.random.default_rng(0))
    expected = np.linalg.inv(shared_information(views))
    np.testing.assert_allclose(predictions.mean(0), theta, atol=5 * np.sqrt(expected.diagonal().max() / 20_000))
    np.testing.assert_allclose(predictions.var(0), expected.diagonal(), rtol=0.05)


TRIAL = SubspaceTrial(other="none", values=16, directions=2, samples=60, other_samples=400, steps=400)


def test_kept_directions_by_hand() -> None:
    """A plane at 60 degrees to the second axis: cos^2 = 1 and 1/4."""
    shared_DK = torch.eye(4)[:, :2]
    tilted_DK = torch.tensor([[1.0, 5.0], [0.0, 0.5], [0.0, 0.75**0.5], [0.0, 0.0]])  # the 5 does not change the span
    assert kept(tilted_DK, shared_DK) == pytest.approx(0.625)
    assert kept(shared_DK @ torch.randn(2, 2), shared_DK) == pytest.approx(1.0, abs=1e-5)
    assert kept(torch.eye(4)[:, 2:], shared_DK) == pytest.approx(0.0, abs=1e-6)


def test_related_data_helps_and_unrelated_data_does_not() -> None:
    alone, related, unrelated = (run_trial(replace(TRIAL, other=o), seed=0) for o in ("none", "related", "unrelated"))
    assert related > alone + 0.2
    assert unrelated < related - 0.2


def test_linear_maps_of_their_own_undo_the_sharing() -> None:
    """Whatever the trunk keeps, X's own maps can turn it to X's loudest directions: then Y changes nothing."""
    own = replace(TRIAL, interface="own")
    assert run_trial(replace(own, other="related"), seed=0) == pytest.approx(run_trial(own, seed=0), abs=0.02)


def test_a_trial_is_a_function_of_its_seed() -> None:
    short = replace(TRIAL, steps=20)
    assert run_trial(short, seed=1) == run_trial(short, seed=1)
    assert run_trial(short, seed=1) != run_trial(short, seed=2)
