"""How classes lie in a space of features: how far apart, and how compact.

Shapes: N items, D width of the features, C classes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_ROWS = 1024


def margins(scores_NC: Float[Tensor, "N C"], labels_N: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Score of an item's class less the best score of another: negative where the item is taken for another class."""
    own_N = scores_NC.gather(1, labels_N[:, None])[:, 0]
    others_NC = scores_NC.scatter(1, labels_N[:, None], -torch.inf)
    return own_N - others_NC.max(1).values


def class_margin(features_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, "N"]) -> float:
    """Mean :func:`margins` of the cosines to the mean features of the classes.

    An item does not count in the mean of its own class, which it would pull towards itself; items that are alone in
    their class are left out.
    """
    unit_ND = F.normalize(features_ND.double(), dim=1)
    one_hot_NC = F.one_hot(labels_N).double()
    count_C, sum_CD = one_hot_NC.sum(0), one_hot_NC.T @ unit_ND
    scores_NC = unit_ND @ F.normalize(sum_CD, dim=1).T
    without_ND = sum_CD[labels_N] - unit_ND
    own_N = (unit_ND * F.normalize(without_ND, dim=1)).sum(1)
    scores_NC = scores_NC.scatter(1, labels_N[:, None], own_N[:, None])
    scores_NC[:, count_C == 0] = -torch.inf
    return float(margins(scores_NC, labels_N)[count_C[labels_N] > 1].mean())


def silhouette(features_ND: Float[Tensor, "N D"], labels_N: Int[Tensor, "N"]) -> float:
    """Rousseeuw (1987): the mean of (b - a) / max(a, b).

    a is an item's mean distance to the others of its class, b that to the items of the nearest other class. An item
    that is alone in its class counts 0.
    """
    features_ND = features_ND.double()
    one_hot_NC = F.one_hot(labels_N).double()
    count_C = one_hot_NC.sum(0)
    found = []
    for rows in torch.arange(len(features_ND)).split(_ROWS):
        total_NC = torch.cdist(features_ND[rows], features_ND) @ one_hot_NC
        own_N1 = labels_N[rows, None]
        a_N = (total_NC.gather(1, own_N1) / (count_C[own_N1] - 1).clamp_min(1))[:, 0]
        mean_NC = torch.where(count_C > 0, total_NC / count_C, torch.inf).scatter(1, own_N1, torch.inf)
        b_N = mean_NC.min(1).values
        value_N = (b_N - a_N) / torch.maximum(a_N, b_N).clamp_min(torch.finfo(torch.float64).tiny)
        found.append(value_N.where(count_C[labels_N[rows]] > 1, 0.0))
    return float(torch.cat(found).mean())
