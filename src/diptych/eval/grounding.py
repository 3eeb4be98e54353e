"""How much captions and pictures of a run hang together: before cycles can teach anything, this must be above zero.

T2I2T learns from pictures drawn for loose texts. A network whose pictures do not depend on the text can then only learn
to write whatever the picture shows; the same holds the other way round.

Shapes: B rows, N image tokens, L text tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.objectives.hiding import Hiding
from diptych.objectives.paired import i2t_loss, t2i_loss, without_text
from diptych.pipeline import Diptych

_ROWS = 64


@dataclass(frozen=True, slots=True)
class Grounding:
    """Nats a token that the right partner saves against another row's: 0 where nothing was learned. As a wrong partner
    misleads a sure network, it may exceed the mutual information of the two."""

    caption: float
    """Of a caption's tokens, from seeing its picture (I2T)."""
    picture: float
    """Of a picture's tokens, from reading its caption with the whole picture hidden (T2I)."""


@torch.no_grad()
def grounding(diptych: Diptych, tokens_BN: Tensor, ids_BL: Tensor) -> Grounding:
    """Over pairs of image tokens and text ids, each against the next row's."""
    caption = picture = 0.0
    others_BL = ids_BL.roll(1, 0)
    for start in range(0, len(ids_BL), _ROWS):
        rows = slice(start, start + _ROWS)
        tokens, share = tokens_BN[rows].to(diptych.device), len(tokens_BN[rows]) / len(ids_BL)
        right, wrong = (_losses(diptych, tokens, ids[rows].to(diptych.device)) for ids in (ids_BL, others_BL))
        caption += share * (wrong[0] - right[0]).item()
        picture += share * (wrong[1] - right[1]).item()
    return Grounding(caption, picture)


def _losses(diptych: Diptych, tokens_BN: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """I2T from the whole picture and T2I from none of it, without smoothing."""
    model, valid_BL = diptych.model, ids_BL != diptych.text_encoder.pad_id
    every_BN = torch.arange(tokens_BN.shape[1], device=tokens_BN.device).expand_as(tokens_BN)
    nothing_BN = torch.zeros_like(tokens_BN, dtype=torch.bool)
    shown = without_text(model, tokens_BN, Hiding(nothing_BN, every_BN))
    caption = i2t_loss(model, shown, ids_BL, valid_BL, smoothing=0.0, encoder_gradient=1.0)
    features_BLF = diptych.text_encoder.features(ids_BL, valid_BL)
    hidden = Hiding(~nothing_BN, every_BN[:, :0])
    picture = t2i_loss(model, tokens_BN, features_BLF, valid_BL, hidden, smoothing=0.0)
    return caption, picture
