from dataclasses import replace

import pytest
import torch

from diptych.experiments.theory import SubspaceTrial, kept, run_trial

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
