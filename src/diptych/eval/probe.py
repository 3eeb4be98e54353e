"""Linear probe: how well a linear classifier of frozen features tells classes apart.

Shapes: N items, M test items, V validation items, D width, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diptych.errors import UserError
from diptych.rng import derive_seed

L2_GRID = tuple(10.0**-power for power in range(7))
"""Strengths of the l2 penalty, strong to weak: each fit begins where the one before it ended."""
_VALIDATION = 0.2
_ITERATIONS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear classifier of features, which it standardizes."""

    mean_D: Float[Tensor, "D"]
    std_D: Float[Tensor, "D"]
    weight_DC: Float[Tensor, "D C"]
    bias_C: Float[Tensor, "C"]

    def __call__(self, features_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Logits."""
        return (features_ND - self.mean_D) / self.std_D @ self.weight_DC + self.bias_C

    def accuracy(self, features_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, "N"]) -> float:
        """Share of the items whose most probable class is their label."""
        return (self(features_ND).argmax(1) == labels_N).float().mean().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The result of a linear probe."""

    accuracy: float
    """Share of the test items that are classified correctly."""
    validation_accuracy: float
    """The same of the validation items, by the classifier that was fitted without them."""
    l2: float
    """Strength of the l2 penalty with the best validation accuracy."""


def linear_probe(
    train_ND: Float[Tensor, "N D"],
    labels_N: Int[Tensor, "N"],
    test_MD: Float[Tensor, "M D"],
    labels_M: Int[Tensor, "M"],
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    grid: Sequence[float] = L2_GRID,
    seed: int = 0,
) -> Probe:
    """Multinomial logistic regression with the l2 of ``grid`` that does best on validation items.

    The validation items are ``validation``, features [V D] and labels [V], or else a fifth of the training items drawn
    by ``seed``. The classifier that is scored on the test items is fitted to training and validation items together.
    Raises UserError where there are fewer than two training items to draw from.
    """
    if validation is None:
        if len(train_ND) < 2:
            raise UserError(f"a linear probe needs two training items or more, not {len(train_ND)}")
        order_N = torch.randperm(len(train_ND), generator=torch.Generator().manual_seed(derive_seed(seed, "probe")))
        held, kept = order_N.to(labels_N.device).split(
            [n := max(1, round(_VALIDATION * len(order_N))), len(order_N) - n]
        )
        validation, (train_ND, labels_N) = (train_ND[held], labels_N[held]), (train_ND[kept], labels_N[kept])
    classes = 1 + int(torch.cat([labels_N, labels_M, validation[1]]).max())
    chosen = select_linear(train_ND, labels_N, validation=validation, classes=classes, grid=grid)
    both = torch.cat([train_ND, validation[0]]), torch.cat([labels_N, validation[1]])
    final = fit_linear(*both, classes=classes, l2=chosen.l2)
    return Probe(
        accuracy=final.accuracy(test_MD, labels_M), validation_accuracy=chosen.validation_accuracy, l2=chosen.l2
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The classifier of the l2 penalty that does best on validation items, which it was not fitted to."""

    linear: Linear
    l2: float
    validation_accuracy: float


def select_linear(
    train_ND: Float[Tensor, "N D"],
    labels_N: Int[Tensor, "N"],
    *,
    validation: tuple[Tensor, Tensor],
    classes: int,
    grid: Sequence[float] = L2_GRID,
) -> Selected:
    """Multinomial logistic regression with the l2 of ``grid`` that does best on ``validation``: [V D] and labels [V].

    Of equals it is the first of ``grid``.
    """
    found: Linear | None = None
    best: Selected | None = None
    for l2 in grid:
        found = fit_linear(train_ND, labels_N, classes=classes, l2=l2, start=found)
        accuracy = found.accuracy(*validation)
        if best is None or accuracy > best.validation_accuracy:
            best = Selected(linear=found, l2=l2, validation_accuracy=accuracy)
    assert best is not None
    return best


def fit_linear(
    features_ND: Float[Tensor, "N D"],
    labels_N: Int[Tensor, "N"],
    *,
    classes: int,
    l2: float,
    start: Linear | None = None,
) -> Linear:
    """The minimum of mean cross-entropy + l2/2 ||W||^2, by L-BFGS.

    The problem is convex, so ``start``, where the search begins, changes the time and not the result.

    Features are standardized by their own mean and deviation, so that ``l2`` means the same for any encoder.
    """
    mean_D, std_D = features_ND.mean(0), features_ND.std(0, correction=0).clamp_min(1e-6)
    normal_ND = (features_ND - mean_D) / std_D
    weight_DC = start.weight_DC.clone() if start else features_ND.new_zeros(features_ND.shape[1], classes)
    bias_C = start.bias_C.clone() if start else features_ND.new_zeros(classes)
    parameters = [weight_DC.requires_grad_(), bias_C.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(normal_ND @ weight_DC + bias_C, labels_N) + l2 / 2 * weight_DC.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Linear(mean_D=mean_D, std_D=std_D, weight_DC=weight_DC.detach(), bias_C=bias_C.detach())
