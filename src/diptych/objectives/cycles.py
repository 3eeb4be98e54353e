"""The cycle losses on loose texts (T2I2T) and on bare images (I2T2I), section 3.2 of ITIT.

Both synthesise the missing side without gradient, pass it through the network once more to get logits that do have
one, take the likeliest tokens *straight through*, and ask the other direction to give back the original.

Shapes: B rows, N image tokens, L text tokens, F width of the frozen text features, D encoder width, V vocabulary.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.data.batch import Draws
from diptych.models.itit import ITIT
from diptych.models.text_encoder import TextEncoder
from diptych.nn.gradients import straight_through_embedding
from diptych.objectives.hiding import Hiding
from diptych.objectives.paired import i2t_loss, shift, t2i_loss, with_text, without_text


def reimagined(
    model: ITIT,
    pseudo_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    hiding: Hiding,
    *,
    gumbel: float,
    draws: Draws,
) -> Float[Tensor, "B N D"]:
    """~I of T2I2T, embedded: the synthesised I' with its hidden part predicted once more, with gradient.

    (b) The T2I pass on (I'_M, T). The gradient stops after the encoder: with two encoder gradients training became
    unstable. (c) ~i_k = argmax p(i_k | I'_M, T), straight through a Gumbel-softmax of strength ``gumbel``.
    Where I'_M was visible ~I keeps I'.
    """
    with torch.no_grad():
        first = with_text(model, pseudo_BN, features_BLF, valid_BL, hiding)
    logits_BNC = model.image_logits(first.detach(), hiding.hidden_BN).float()
    if gumbel:
        logits_BNC = logits_BNC + gumbel * draws.gumbel("gumbel", *logits_BNC.shape, device=logits_BNC.device)
    predicted_BND = straight_through_embedding(logits_BNC, model.token_embedding.weight)
    return torch.where(hiding.hidden_BN[..., None], predicted_BND, model.embed_image(pseudo_BN))


def t2i2t_loss(
    model: ITIT,
    image_BND: Float[Tensor, "B N D"],
    ids_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    hiding: Hiding,
    *,
    smoothing: float,
    encoder_gradient: float,
) -> Float[Tensor, ""]:
    """L_T2I2T = - E sum over l of log p(t_l | ~I_M, t_0 .. t_{l-1}), equation (3).

    (d) ~I (full cycle: from :func:`reimagined`; half cycle: the embedded I') is hidden in part and captioned.
    """
    encoded = model.encode(image_BND, hidden_BN=hiding.hidden_BN, keep_BK=hiding.keep_BK)
    return i2t_loss(model, encoded, ids_BL, valid_BL, smoothing=smoothing, encoder_gradient=encoder_gradient)


def rewritten(
    model: ITIT,
    text_encoder: TextEncoder,
    tokens_BN: Int[Tensor, "B N"],
    pseudo_BL: Int[Tensor, "B L"],
    valid_BL: Bool[Tensor, "B L"],
    hiding: Hiding,
    *,
    banned_V: Bool[Tensor, "V"],
) -> Float[Tensor, "B L F"]:
    """Frozen features of ~T of I2T2I: the synthesised T' with every token predicted once more, with gradient.

    (b) The I2T pass on (I_M, T'), its gradient stopped after the encoder. (c) ~t_l = argmax p(t_l | I_M, t'_0 ..
    t'_{l-1}), straight through a plain softmax. (d) ~T goes through the frozen text encoder, which lets the gradient
    through to its input. ~T ends where T' ended.
    """
    with torch.no_grad():
        first = without_text(model, tokens_BN, hiding)
    logits_BLV = model.text_logits(first.image_BKD.detach(), shift(pseudo_BL)).float()
    logits_BLV = logits_BLV.masked_fill(banned_V, -torch.inf)
    embedded_BLF = straight_through_embedding(logits_BLV, text_encoder.embedding.weight)
    return text_encoder.features_from_embeddings(embedded_BLF, valid_BL)


def i2t2i_loss(
    model: ITIT,
    tokens_BN: Int[Tensor, "B N"],
    features_BLF: Float[Tensor, "B L F"],
    valid_BL: Bool[Tensor, "B L"],
    hiding: Hiding,
    *,
    smoothing: float,
) -> Float[Tensor, ""]:
    """L_I2T2I = - E sum over hidden k of log p(i_k | I_M, ~T), equation (4).

    It is equation (2) with ~T for T: features of :func:`rewritten` (full cycle) or of T' (half cycle).
    """
    return t2i_loss(model, tokens_BN, features_BLF, valid_BL, hiding, smoothing=smoothing)
