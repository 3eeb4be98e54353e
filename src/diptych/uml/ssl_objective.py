"""Self-supervised UML: every modality predicts its next embedding through the same trunk, nothing is paired.

    L = sum_m w_m MSE(g_m(h(f_m x))[:, :-1], x[:, 1:])

with f_m and g_m linear maps of modality m's own and h the shared causal transformer. A row of one position has no next
one and is reconstructed. The target modality trains alone at first.

Departure: padding is left out of loss, attention and mean, which the released code forgets.

Shapes: B rows, S positions, F width of a modality's features, D width of the trunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from diptych.data.batch import Batch
from diptych.train.objective import Losses, Objective
from diptych.uml.trunk import SharedTransformer


@dataclass(kw_only=True, slots=True)
class UmlSslConfig:
    aux_weight: float = 1.0
    """Weight of each modality beside the target (lambda); 0 is the control of a target that learns alone."""
    aux_start_step: int = 500
    """Step at which the other modalities join."""


class UmlSsl(Objective):
    """One stream of features a modality, by its name; the ``target`` is the one that is wanted in the end."""

    may_skip_parameters = True  # the other modalities join at `aux_start_step`

    def __init__(self, model: SharedTransformer, config: UmlSslConfig, *, target: str) -> None:
        super().__init__()
        self.model, self.config, self.target = model, config, target
        self.streams = dict.fromkeys(model.config.features, 1)

    def forward(self, batch: Batch, step: int) -> Losses:
        terms: dict[str, Tensor] = {}
        for name, items in batch.streams.items():
            if name == self.target or step >= self.config.aux_start_step:
                terms[name] = next_embedding_loss(self.model, items.features_BSF, items.valid_BS, modality=name)
        weighted = [loss * (1.0 if name == self.target else self.config.aux_weight) for name, loss in terms.items()]
        return Losses(torch.stack(weighted).sum(), {name: loss.detach() for name, loss in terms.items()})


def next_embedding_loss(
    model: SharedTransformer, x_BSF: Float[Tensor, "B S F"], valid_BS: Bool[Tensor, "B S"], *, modality: str
) -> Float[Tensor, ""]:
    """The mean over rows of each row's mean squared error, over the positions whose target is real."""
    x_BSF = model.standardised(x_BSF, valid_BS, modality=modality)
    predicted_BSF = model.predict(model.trunk(x_BSF, modality=modality), modality=modality)
    single_B1 = valid_BS.sum(1, keepdim=True) == 1
    wanted_BSF = torch.where(single_B1[..., None], x_BSF, x_BSF.roll(-1, dims=1))
    scored_BS = valid_BS & (single_B1 | F.pad(valid_BS[:, 1:], (0, 1)))
    error_BS = (predicted_BSF - wanted_BSF).square().mean(-1).masked_fill(~scored_BS, 0)
    return (error_BS.sum(1) / scored_BS.sum(1)).mean()
