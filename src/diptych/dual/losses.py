"""Losses that compare all rows of a batch with one another, as pure functions of embeddings.

They take the rows of all processes (`nn/functional.py` gathers them) and do not depend on the number of processes.
Similarities and losses are fp32, whatever the precision of the towers. All embeddings are L2-normalized.

Shapes: B rows, V image views of a row, M captions of a row, D width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def similarities(
    a_BD: Float[Tensor, "B D"], b_BD: Float[Tensor, "B D"], scale: Float[Tensor, ""] | float
) -> Float[Tensor, "B B"]:
    """s a b': the scaled cosines of all rows of a with all rows of b, in fp32 also under autocast."""
    with torch.autocast(a_BD.device.type, enabled=False):
        return scale * (a_BD.float() @ b_BD.float().T)


def info_nce(
    image_BD: Float[Tensor, "B D"], text_BD: Float[Tensor, "B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """CLIP's loss: [ CE(s I T', i) + CE(s T I', i) ] / 2, where text i belongs to image i."""
    logits_BB = similarities(image_BD, text_BD, scale)
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2


def multi_view_info_nce(
    images_VBD: Float[Tensor, "V B D"], texts_MBD: Float[Tensor, "M B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """ITO's L_align: the mean of :func:`info_nce` over all pairs of an image view and a caption."""
    return torch.stack([info_nce(image, text, scale) for image in images_VBD for text in texts_MBD]).mean()


def nt_xent(first_BD: Float[Tensor, "B D"], second_BD: Float[Tensor, "B D"], scale: Tensor | float) -> Tensor:
    """NT-Xent (SimCLR): [ l(S_1, S_2) + l(S_2, S_1) ] / 2 with

    l(a, b) = CE([ s a b' | s a a' - inf I ], i): a row finds its other view among all other vectors of both views.
    """
    return (_one_way(first_BD, second_BD, scale) + _one_way(second_BD, first_BD, scale)) / 2


def _one_way(a_BD: Tensor, b_BD: Tensor, scale: Tensor | float) -> Tensor:
    itself_BB = torch.eye(len(a_BD), dtype=torch.bool, device=a_BD.device)
    within_BB = similarities(a_BD, a_BD, scale).masked_fill(itself_BB, -torch.inf)
    logits_BX = torch.cat([similarities(a_BD, b_BD, scale), within_BB], dim=1)
    return F.cross_entropy(logits_BX, torch.arange(len(a_BD), device=a_BD.device))


def multi_view_nt_xent(views_VBD: Float[Tensor, "V B D"], scale: Tensor | float) -> Float[Tensor, ""]:
    """The mean of :func:`nt_xent` over all pairs of views; with two views, as in the papers, that pair's."""
    count = len(views_VBD)
    pairs = [(v, w) for v in range(count) for w in range(v + 1, count)]
    return torch.stack([nt_xent(views_VBD[v], views_VBD[w], scale) for v, w in pairs]).mean()


def sigmoid_loss(
    image_BD: Float[Tensor, "B D"], text_BD: Float[Tensor, "B D"], scale: Float[Tensor, ""], bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """SigLIP's loss: -1/B sum_ij log sigmoid( z_ij (s I_i T_j' + b) ), z_ij = 1 where i = j and -1 elsewhere."""
    logits_BB = similarities(image_BD, text_BD, scale) + bias
    sign_BB = 2 * torch.eye(len(logits_BB), device=logits_BB.device) - 1
    return -F.logsigmoid(sign_BB * logits_BB).sum() / len(logits_BB)
