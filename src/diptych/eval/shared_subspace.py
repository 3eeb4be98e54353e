"""Linear autoencoders with one trunk for two unpaired Gaussian modalities: does the trunk keep what both share?

    x = U_c z_c + t U_x z_x + noise,   y = U_c z'_c + t U_y z_y + noise,   all z standard normal, all U orthonormal

In X alone the nuisance directions U_x are the stronger ones (t > 1), so a narrow autoencoder of X keeps those. In the
sum of both losses U_c counts twice and each nuisance once, although no x belongs to any y. For the control the shared
directions of Y are others than those of X.

Shapes: N samples, D values of a sample, K directions of each kind and width of the trunk.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceTrial:
    """One autoencoder and what it is given."""

    other: Literal["none", "related", "unrelated"]
    """The second modality."""
    interface: Literal["common", "own"] = "common"
    """``common``: both modalities lie in one space, as features of aligned encoders do, and the whole autoencoder is
    shared. ``own``: each has linear input and output maps, as in UML's self-supervised variant."""
    values: int = 40
    directions: int = 4
    samples: int = 100
    """Of X."""
    other_samples: int = 1000
    """Of Y."""
    nuisance: float = 1.2
    """t, the standard deviation along nuisance directions; 1 along shared ones."""
    noise: float = 0.3
    steps: int = 1500


def run_trial(trial: SubspaceTrial, *, seed: int) -> float:
    """Train; return the share of X's shared directions that its code keeps: 1 is all, K / D is chance."""
    generator = torch.Generator().manual_seed(seed)
    shared_DK, x_DK, y_DK, foreign_DK = _orthonormal(trial, generator).chunk(4, dim=1)
    data = [_sample(trial.samples, shared_DK, x_DK, trial, generator)]
    if trial.other != "none":
        seen_DK = shared_DK if trial.other == "related" else foreign_DK
        data.append(_sample(trial.other_samples, seen_DK, y_DK, trial, generator))
    encode_DK = _train(data, trial, generator)
    return kept(encode_DK, shared_DK)


def kept(encode_DK: Tensor, shared_DK: Tensor) -> float:
    """Mean squared cosine of the principal angles between the spans of both (``shared_DK`` is orthonormal)."""
    basis_DK = torch.linalg.qr(encode_DK).Q
    return float((basis_DK.T @ shared_DK).square().sum() / shared_DK.shape[1])


def _orthonormal(trial: SubspaceTrial, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(trial.values, 4 * trial.directions, generator=generator)).Q


def _sample(count: int, shared_DK: Tensor, own_DK: Tensor, trial: SubspaceTrial, generator: torch.Generator) -> Tensor:
    loud_KD = torch.cat([shared_DK, trial.nuisance * own_DK], dim=1).T
    noise_ND = trial.noise * torch.randn(count, trial.values, generator=generator)
    return torch.randn(count, len(loud_KD), generator=generator) @ loud_KD + noise_ND


def _train(data: list[Tensor], trial: SubspaceTrial, generator: torch.Generator) -> Tensor:
    """Minimise the sum of the mean reconstruction errors with Adam; return X's linear encoder."""

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(0.2 * torch.randn(*shape, generator=generator))

    size = trial.values
    encode_DK, decode_KD = weight(size, trial.directions), weight(trial.directions, size)
    own = [(weight(size, size), weight(size, size)) for _ in data] if trial.interface == "own" else []
    optimiser = torch.optim.Adam([encode_DK, decode_KD, *(w for pair in own for w in pair)], lr=1e-2)
    for _ in range(trial.steps):
        loss = torch.zeros(())
        for index, x_ND in enumerate(data):
            before, after = own[index] if own else (torch.eye(size), torch.eye(size))
            loss = loss + (x_ND @ before @ encode_DK @ decode_KD @ after - x_ND).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return ((own[0][0] @ encode_DK) if own else encode_DK).detach()
