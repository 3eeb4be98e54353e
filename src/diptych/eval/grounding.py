"""How much captions and pictures of a run hang together: before cycles can teach anything, this must be above zero.

T2I2T learns from pictures drawn for loose texts. A network whose pictures do not depend on the text can then only learn
to write whatever the picture shows; the same holds the other way round.

Shapes: B rows, N image tokens, L text tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.models.itit import Encoded
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
        tokens, right, wrong = (part[rows].to(diptych.device) for part in (tokens_BN, ids_BL, others_BL))
        share = len(tokens) / len(ids_BL)
        read = _shown(diptych, tokens)
        caption += share * (_caption_loss(diptych, read, wrong) - _caption_loss(diptych, read, right)).item()
        picture += share * (_picture_loss(diptych, tokens, wrong) - _picture_loss(diptych, tokens, right)).item()
    return Grounding(caption, picture)


def _shown(diptych: Diptych, tokens_BN: Tensor) -> Encoded:
    """The encoder's pass over whole pictures."""
    every_BN = torch.arange(tokens_BN.shape[1], device=tokens_BN.device).expand_as(tokens_BN)
    return without_text(diptych.model, tokens_BN, Hiding(torch.zeros_like(tokens_BN, dtype=torch.bool), every_BN))


def _caption_loss(diptych: Diptych, read: Encoded, ids_BL: Tensor) -> Tensor:
    valid_BL = ids_BL != diptych.text_encoder.pad_id
    return i2t_loss(diptych.model, read, ids_BL, valid_BL, smoothing=0.0, encoder_gradient=1.0)


def _picture_loss(diptych: Diptych, tokens_BN: Tensor, ids_BL: Tensor) -> Tensor:
    """With every token hidden, and none of them in the encoder."""
    valid_BL = ids_BL != diptych.text_encoder.pad_id
    hidden = Hiding(torch.ones_like(tokens_BN, dtype=torch.bool), tokens_BN[:, :0])
    features_BLF = diptych.text_encoder.features(ids_BL, valid_BL)
    return t2i_loss(diptych.model, tokens_BN, features_BLF, valid_BL, hidden, smoothing=0.0)
