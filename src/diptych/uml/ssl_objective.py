"""Self-supervised UML: each modality predicts its next feature through a shared trunk, without pairs.

    L = sum_m w_m MSE(g_m(h(f_m x))[:, :-1], x[:, 1:])

where f_m and g_m are linear maps of modality m alone and h is the causal transformer that all share. A row of one
position has no next one, so it is reconstructed. The target modality trains alone at first.

Departure: padding is left out of the loss, the attention and the mean. The released code includes it.

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
    """Settings of self-supervised UML."""

    aux_weight: float = 1.0
    """Weight of the loss of every modality but the target (lambda); 0 is the control: the target learns alone."""
    aux_start_step: int = 500
    """Step from which the other modalities' losses are added."""


class UmlSsl(Objective):
    """The network with its loss. Every modality has a stream of its own; ``target`` is the one to be represented."""

    may_skip_parameters = True  # the other modalities join at `aux_start_step`

    def __init__(self, model: SharedTransformer, config: UmlSslConfig, *, target: str) -> None:
        super().__init__()
        self.model, self.config, self.target = model, config, target
        self.streams = dict.fromkeys(model.config.features, 1)

    def forward(self, batch: Batch, step: int) -> Losses:
        terms: dict[str, Tensor] = {}
        for name, examples in batch.streams.items():
            if name == self.target or step >= self.config.aux_start_step:
                terms[name] = next_embedding_loss(self.model, examples.features_BSF, examples.valid_BS, modality=name)
        weighted = [loss * (1.0 if name == self.target else self.config.aux_weight) for name, loss in terms.items()]
        return Losses(torch.stack(weighted).sum(), {name: loss.detach() for name, loss in terms.items()})


def next_embedding_loss(
    model: SharedTransformer, x_BSF: Float[Tensor, "B S F"], valid_BS: Bool[Tensor, "B S"], *, modality: str
) -> Float[Tensor, ""]:
    """The mean squared error of each row over the positions whose next one is valid, then the mean over rows."""
    x_BSF = model.standardized(x_BSF, valid_BS, modality=modality)
    predicted_BSF = model.predict(model.trunk(x_BSF, modality=modality), modality=modality)
    single_B1 = valid_BS.sum(1, keepdim=True) == 1
    wanted_BSF = torch.where(single_B1[..., None], x_BSF, x_BSF.roll(-1, dims=1))
    scored_BS = valid_BS & (single_B1 | F.pad(valid_BS[:, 1:], (0, 1)))
    error_BS = (predicted_BSF - wanted_BSF).square().mean(-1).masked_fill(~scored_BS, 0)
    return (error_BS.sum(1) / scored_BS.sum(1)).mean()
