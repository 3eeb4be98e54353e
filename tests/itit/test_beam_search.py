from itertools import product

import pytest
import torch

from diptych.errors import UserError
from diptych.itit.beam_search import beam_search
from diptych.itit.generation import greedy
from diptych.itit.model import EOS, PAD

V, L = 4, 3
NONE_BANNED = torch.zeros(V, dtype=torch.bool)


class Markov:
    """Logits that depend on the whole text so far, kept per row as a decoder's cache is."""

    def __init__(self, rows, seed=0):
        self.table = torch.randn(V ** (L + 1), V, generator=torch.Generator().manual_seed(seed)) * 2
        self.state = torch.zeros(rows, dtype=torch.long)
        self.shift = torch.arange(rows)

    def logits_of(self, state):
        return self.table[state % len(self.table)]

    def step(self, ids_B):
        self.state = self.state * V + ids_B
        return self.logits_of(self.state)

    def reorder(self, rows_B):
        self.state = self.state[rows_B]


def score(table, ids, power):
    """log p of a text by definition, with GIT's penalty."""
    state, total = 0, 0.0
    newest = PAD
    for token in ids:
        state = state * V + newest
        total += table[state % len(table)].log_softmax(-1)[token].item()
        newest = token
    return total / ((5 + len(ids)) / 6) ** power


@pytest.mark.parametrize("power", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_beam_search_with_enough_beams_is_brute_force(power, seed):
    beams = V**L
    decoding = Markov(beams, seed)
    ids, found = beam_search(decoding, 1, beams=beams, length=L, banned_V=NONE_BANNED, length_power=power)
    texts = [(*body, EOS) for n in range(L) for body in product([t for t in range(V) if t != EOS], repeat=n)]
    best = max(texts, key=lambda text: score(decoding.table, text, power))
    assert tuple(ids[0].tolist()) == best + (PAD,) * (L - len(best))
    assert found[0].item() == pytest.approx(score(decoding.table, best, power), abs=1e-5)


def test_rows_of_a_batch_do_not_mix():
    single = [beam_search(Markov(3, seed=1), 1, beams=3, length=L, banned_V=NONE_BANNED)[0] for _ in range(2)]
    both, _ = beam_search(Markov(6, seed=1), 2, beams=3, length=L, banned_V=NONE_BANNED)
    assert torch.equal(both, torch.cat(single))


def test_greedy_is_the_argmax_and_pads_after_the_end():
    decoding = Markov(2)
    ids = greedy(decoding, 2, length=L, banned_V=NONE_BANNED)
    state, newest, expected = 0, PAD, []
    for position in range(L):
        state = state * V + newest
        newest = int(decoding.logits_of(torch.tensor([state])).argmax()) if position + 1 < L else EOS
        expected.append(newest)
        if newest == EOS:
            break
    expected += [PAD] * (L - len(expected))
    assert ids.tolist() == [expected, expected]


@pytest.mark.parametrize("beams", [1, 3])
def test_banned_ids_never_appear_and_every_text_ends(beams):
    banned = torch.zeros(V, dtype=torch.bool)
    banned[2] = True
    for seed in range(10):
        if beams == 1:
            ids = greedy(Markov(2, seed), 2, length=L, banned_V=banned)
        else:
            ids, _ = beam_search(Markov(2 * beams, seed), 2, beams=beams, length=L, banned_V=banned)
        assert not (ids == 2).any()
        assert (ids == EOS).sum(1).eq(1).all()


def test_no_beams():
    with pytest.raises(UserError, match="at least one"):
        beam_search(Markov(1), 1, beams=0, length=L, banned_V=NONE_BANNED)
