"""What unpaired data can tell about a shared cause, where it can be computed: linear views with Gaussian noise.

Gupta et al., "Better Together: Leveraging Unpaired Multimodal Data for Stronger Unimodal Models", section 3.

The first part computes information and variance of the estimate of a shared parameter:

    X_i = A_i theta_c + A'_i theta_x + noise,      Y_j = B_j theta_c + B'_j theta_y + noise

where theta is fixed, the designs A and B are known, and no X_i belongs to any Y_j. The information about all parameters
is the sum over samples. The information about theta_c alone, with theta_x and theta_y unknown too, is the Schur
complement

    S = I_cc - I_cp I_pp^-1 I_pc,      Var(theta_c) = S^-1

Departure: the paper takes I_cc^-1, which is the variance if the nuisance parameters are known.

The second part trains linear autoencoders with one trunk for two unpaired modalities, and measures whether the trunk
keeps what both share:

    x = U_c z_c + t U_x z_x + noise,   y = U_c z'_c + t U_y z_y + noise,   all z standard normal, all U orthonormal

In X alone the nuisance directions U_x are stronger than the shared ones U_c (t > 1), so a narrow autoencoder of X keeps
U_x. In the sum of both losses U_c counts twice and each nuisance once, although no x belongs to any y. For the control
the shared directions of Y are not those of X.

Shapes of the first part: N samples of a view, M values of a sample, C shared parameters, P nuisance parameters of a
view, Q = N M values of all samples, R repetitions. Shapes of the second: N samples, D values of a sample, K directions
of each kind, which is also the width of the trunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

_TINY = 1e-9
"""Numbers below this share of the largest count as rounding errors of zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The samples of one modality: their designs and the standard deviation of the noise on every value."""

    shared_NMC: Float[np.ndarray, "N M C"]
    """Designs of theta_c: A_i or B_j."""
    nuisance_NMP: Float[np.ndarray, "N M P"]
    """Designs of the modality's own parameters: A'_i or B'_j."""
    noise: float = 1.0
    """Standard deviation of the noise."""

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The designs of all samples below one another, in units of the noise: [Q C] and [Q P]."""
        shared, nuisance = self.shared_NMC / self.noise, self.nuisance_NMP / self.noise
        return shared.reshape(-1, shared.shape[-1]), nuisance.reshape(-1, nuisance.shape[-1])


def block_information(views: Sequence[View]) -> Float[np.ndarray, "C C"]:
    """I_cc = sum A'A / s_x^2 + sum B'B / s_y^2: the paper's information, with the nuisance parameters known."""
    return np.sum([shared.T @ shared for shared, _ in map(View.rows, views)], axis=0)


def shared_information(views: Sequence[View]) -> Float[np.ndarray, "C C"]:
    """S: the information about theta_c with the nuisance parameters unknown.

    It is the sum over views, because no two views have nuisance parameters in common.
    """
    return np.sum([_schur(*view.rows()) for view in views], axis=0)


def _schur(shared_QC: np.ndarray, nuisance_QP: np.ndarray) -> np.ndarray:
    """A'A - A'P (P'P)^+ P'A, computed as the square of A minus its projection on P, which cannot become negative."""
    fitted_PC = np.linalg.lstsq(nuisance_QP, shared_QC, rcond=None)[0]
    rest_QC = shared_QC - nuisance_QP @ fitted_PC
    rest_QC[np.abs(rest_QC) < _TINY * np.abs(shared_QC).max()] = 0  # rounding is not information
    return rest_QC.T @ rest_QC


def variance_along(information_CC: Float[np.ndarray, "C C"], v_C: Float[np.ndarray, "C"]) -> float:
    """v' S^-1 v, the least variance of an unbiased estimate of v'theta_c; infinite if S has no information about it."""
    values, vectors = np.linalg.eigh(information_CC)
    seen = values > max(values.max(), 0.0) * _TINY
    parts = (vectors.T @ v_C) ** 2
    if parts[~seen].sum() > _TINY * parts.sum():
        return float("inf")
    return float((parts[seen] / values[seen]).sum())


def estimate(
    views: Sequence[View], theta_C: Float[np.ndarray, "C"], *, repetitions: int, rng: np.random.Generator
) -> Float[np.ndarray, "R C"]:
    """Maximum-likelihood estimates of theta_c, each from new noise, by least squares over all parameters at once.

    This checks :func:`shared_information`, so it uses none of its formulas: it simulates observations and fits them.
    Raises ValueError if the observations do not determine all parameters.
    """
    design, sizes = _joint_design(views)
    truth = np.concatenate([theta_C, rng.standard_normal(sum(sizes))])
    observed_QR = (design @ truth)[:, None] + rng.standard_normal((len(design), repetitions))
    fitted, _, rank, _ = np.linalg.lstsq(design, observed_QR, rcond=None)
    if rank < design.shape[1]:
        raise ValueError(f"only {rank} of {design.shape[1]} parameters can be told apart: there is no estimate")
    return fitted[: len(theta_C)].T


def _joint_design(views: Sequence[View]) -> tuple[np.ndarray, list[int]]:
    """The design of all parameters, theta_c first, in units of the noise; and the count of each view's own."""
    rows = [view.rows() for view in views]
    sizes = [nuisance.shape[1] for _, nuisance in rows]
    blocks = []
    for index, (shared, nuisance) in enumerate(rows):
        own = [nuisance if k == index else np.zeros((len(shared), size)) for k, size in enumerate(sizes)]
        blocks.append(np.hstack([shared, *own]))
    return np.vstack(blocks), sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class SubspaceTrial:
    """The settings of one autoencoder and of its data."""

    other: Literal["none", "related", "unrelated"]
    """The second modality Y: none, one with X's shared directions, or one with others."""
    interface: Literal["common", "own"] = "common"
    """``common``: both modalities lie in one space, as features of aligned encoders do, and the whole autoencoder is
    shared. ``own``: each has linear input and output maps, as in self-supervised UML."""
    values: int = 40
    """D, the number of values of a sample."""
    directions: int = 4
    """K, the number of shared directions, of nuisance directions of each modality, and the width of the trunk."""
    samples: int = 100
    """Number of samples of X."""
    other_samples: int = 1000
    """Number of samples of Y."""
    nuisance: float = 1.2
    """t, the standard deviation along nuisance directions. It is 1 along shared ones."""
    noise: float = 0.3
    """Standard deviation of the noise on every value."""
    steps: int = 1500
    """Number of optimizer updates."""


def run_trial(trial: SubspaceTrial, *, seed: int) -> float:
    """Train an autoencoder; return the share of X's shared directions that it keeps: 1 is all, K / D is chance."""
    generator = torch.Generator().manual_seed(seed)
    shared_DK, x_DK, y_DK, foreign_DK = _orthonormal(trial, generator).chunk(4, dim=1)
    data = [_sample(trial.samples, shared_DK, x_DK, trial, generator)]
    if trial.other != "none":
        seen_DK = shared_DK if trial.other == "related" else foreign_DK
        data.append(_sample(trial.other_samples, seen_DK, y_DK, trial, generator))
    encode_DK = _train(data, trial, generator)
    return kept(encode_DK, shared_DK)


def kept(encode_DK: Tensor, shared_DK: Tensor) -> float:
    """The mean squared cosine of the principal angles between the spans of both. ``shared_DK`` is orthonormal."""
    basis_DK = torch.linalg.qr(encode_DK).Q
    return float((basis_DK.T @ shared_DK).square().sum() / shared_DK.shape[1])


def _orthonormal(trial: SubspaceTrial, generator: torch.Generator) -> Tensor:
    """Orthonormal directions [D 4K]: X's shared ones, X's nuisance, Y's nuisance, and unrelated shared ones of Y."""
    return torch.linalg.qr(torch.randn(trial.values, 4 * trial.directions, generator=generator)).Q


def _sample(count: int, shared_DK: Tensor, own_DK: Tensor, trial: SubspaceTrial, generator: torch.Generator) -> Tensor:
    loud_KD = torch.cat([shared_DK, trial.nuisance * own_DK], dim=1).T
    noise_ND = trial.noise * torch.randn(count, trial.values, generator=generator)
    return torch.randn(count, len(loud_KD), generator=generator) @ loud_KD + noise_ND


def _train(data: list[Tensor], trial: SubspaceTrial, generator: torch.Generator) -> Tensor:
    """Minimize the sum of the mean reconstruction errors with Adam; return X's linear encoder [D K]."""

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(0.2 * torch.randn(*shape, generator=generator))

    size = trial.values
    encode_DK, decode_KD = weight(size, trial.directions), weight(trial.directions, size)
    own = [(weight(size, size), weight(size, size)) for _ in data] if trial.interface == "own" else []
    optimizer = torch.optim.Adam([encode_DK, decode_KD, *(w for pair in own for w in pair)], lr=1e-2)
    for _ in range(trial.steps):
        loss = torch.zeros(())
        for index, x_ND in enumerate(data):
            before, after = own[index] if own else (torch.eye(size), torch.eye(size))
            loss = loss + (x_ND @ before @ encode_DK @ decode_KD @ after - x_ND).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ((own[0][0] @ encode_DK) if own else encode_DK).detach()
