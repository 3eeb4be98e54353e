"""Beam search with GIT's length penalty.

Shapes: B rows, W beams of a row, X hypotheses to choose from, L text tokens, V vocabulary.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diptych.errors import UserError
from diptych.itit.model import EOS, PAD


@runtime_checkable
class Decoding(Protocol):
    """A text decoder that has read part of a text, such as :class:`diptych.itit.model.TextDecoding`."""

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B V] of the token after ``ids_B``, the newest token of each row."""
        ...

    def reorder(self, rows_B: Tensor) -> None:
        """Let row b continue the text of row ``rows_B[b]``."""
        ...


def beam_search(
    decoding: Decoding,
    rows: int,
    *,
    beams: int,
    length: int,
    banned_V: Bool[Tensor, "V"],
    length_power: float = 0.6,
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B"]]:
    """The text with the best log p / ((5 + length) / 6) ** length_power of each row, and that score.

    The length counts `</s>`. GIT's penalty (after Wu et al., 2016) is not what `transformers` calls
    ``length_penalty``. With beams >= V ** L this is exhaustive search.

    Args:
        decoding: holds rows * beams rows, the beams of a row side by side.
        beams: hypotheses of a row that are continued at each position.
        length: most tokens of a text, `</s>` included. A text that is cut there ends in `</s>` too.
        banned_V: ids that no text may contain.

    Raises:
        UserError: less than one beam.
    """
    if beams < 1:
        raise UserError(f"{beams} beams: at least one is needed")
    device, vocab_size = banned_V.device, len(banned_V)
    first_row_B1 = torch.arange(rows, device=device)[:, None] * beams
    ids_BWL = torch.full((rows, beams, length), PAD, device=device)
    alive_BW = torch.full((rows, beams), -torch.inf, device=device)
    alive_BW[:, 0] = 0.0  # one hypothesis to begin with, not the same one W times
    best_ids_BWL, best_BW = ids_BWL.clone(), torch.full((rows, beams), -torch.inf, device=device)
    newest = torch.full((rows * beams,), PAD, device=device)

    for position in range(length):
        penalty = ((5 + position + 1) / 6) ** length_power
        log_p = decoding.step(newest).float().log_softmax(-1).masked_fill(banned_V, -torch.inf)
        total_BWV = alive_BW[..., None] + log_p.unflatten(0, (rows, beams))

        ended_BWL = ids_BWL.clone()
        ended_BWL[..., position] = EOS
        pool_BX = torch.cat([best_BW, total_BWV[..., EOS] / penalty], dim=1)
        best_BW, chosen_BW = pool_BX.topk(beams, dim=1)
        best_ids_BWL = _pick(torch.cat([best_ids_BWL, ended_BWL], dim=1), chosen_BW)
        if position + 1 == length:
            break

        total_BWV[..., EOS] = -torch.inf
        alive_BW, flat_BW = total_BWV.flatten(1).topk(beams, dim=1)
        parent_BW, token_BW = flat_BW // vocab_size, flat_BW % vocab_size
        ids_BWL = _pick(ids_BWL, parent_BW)
        ids_BWL[..., position] = token_BW
        decoding.reorder((first_row_B1 + parent_BW).flatten())
        newest = token_BW.flatten()
        # log p only falls, and no later length divides by more than the last one does.
        reachable_BW = alive_BW / ((5 + length) / 6) ** length_power
        if bool((reachable_BW.amax(1) < best_BW.amax(1)).all()):
            break
    return best_ids_BWL[:, 0], best_BW[:, 0]


def _pick(values_BXL: Tensor, index_BW: Tensor) -> Tensor:
    return values_BXL.gather(1, index_BW[..., None].expand(-1, -1, values_BXL.shape[-1]))
