"""The losses on captioned images: T2I, I2T and I2I.

Shapes: B rows, N image tokens, L text tokens, F width of the frozen text features.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.models.itit import ITIT, Encoded
from diptych.nn.gradients import scale_gradient
from diptych.objectives.hiding import Hiding
from diptych.objectives.losses import image_loss, text_loss
from diptych.sampling.autoregressive import PAD


def t2i_loss(
    model: ITIT,
    tokens_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    hiding: Hiding,
    *,
    smoothing: float,
) -> Float[Tensor, ""]:
    """L_T2I = - E sum over hidden k of log p(i_k | I_M, T), equation (2)."""
    encoded = with_text(model, tokens_BN, features_BLF, valid_BL, hiding)
    return image_loss(model.image_logits(encoded, hiding.hidden_BN), tokens_BN, hiding.hidden_BN, smoothing=smoothing)


def with_text(
    model: ITIT,
    tokens_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    hiding: Hiding,
) -> Encoded:
    """The encoder's pass over I_M and T, which T2I and the first half of T2I2T share."""
    return model.encode(
        model.embed_image(tokens_BN),
        hidden_BN=hiding.hidden_BN,
        keep_BK=hiding.keep_BK,
        features_BLF=features_BLF,
        valid_BL=valid_BL,
    )


def without_text(model: ITIT, tokens_BN: Int[Tensor, "B N"], hiding: Hiding) -> Encoded:
    """The encoder's pass over I_M and the empty text, which I2T and I2I share."""
    return model.encode(model.embed_image(tokens_BN), hidden_BN=hiding.hidden_BN, keep_BK=hiding.keep_BK)


def i2i_loss(
    model: ITIT, encoded: Encoded, tokens_BN: Int[Tensor, "B N"], hiding: Hiding, *, smoothing: float
) -> Float[Tensor, ""]:
    """Equation (2) with an empty text: it trains the unconditional branch of guidance."""
    return image_loss(model.image_logits(encoded, hiding.hidden_BN), tokens_BN, hiding.hidden_BN, smoothing=smoothing)


def i2t_loss(
    model: ITIT,
    encoded: Encoded,
    ids_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    *,
    smoothing: float,
    encoder_gradient: float,
) -> Float[Tensor, ""]:
    """L_I2T = - E sum over l of log p(t_l | I_M, t_0 .. t_{l-1}), equation (1).

    z <- 0.1 z + sg(0.9 z) between the encoder and the text decoder, with ``encoder_gradient`` for 0.1.
    """
    prefix = scale_gradient(encoded.image_BKD, encoder_gradient)
    return text_loss(model.text_logits(prefix, shift(ids_BL)), ids_BL, valid_BL, smoothing=smoothing)


def t2t_loss(
    model: ITIT, ids_BL: Int[Tensor, "B L"], valid_BL: Bool[Tensor, "B L"], *, smoothing: float
) -> Float[Tensor, ""]:
    """A language model without any image: the control of Table 2, rows 5 and 7."""
    return text_loss(model.text_logits(None, shift(ids_BL)), ids_BL, valid_BL, smoothing=smoothing)


def shift(ids_BL: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """t_0 .. t_{L-1}: what the text decoder reads to predict ``ids_BL``; t_0 = [BOS], for T5 its pad id."""
    inputs_BL = ids_BL.roll(1, dims=1)
    inputs_BL[:, 0] = PAD
    return inputs_BL
