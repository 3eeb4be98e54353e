import threading
from contextlib import closing

import pytest
import torch
from toy_objective import ROWS, toy_batches

from diptych.data.batch import Batch, ImageTokenExamples, LabelledVectorExamples
from diptych.errors import UserError
from diptych.rng import StepRNG
from diptych.train.prefetch import count_rows, prefetch, split

CPU = torch.device("cpu")


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("steps", [range(0), range(3, 5), range(2, 20)])
def test_batches_come_in_order_whatever_the_workers(workers, steps):
    supply = prefetch(toy_batches, steps, rank=1, world=2, device=CPU, workers=workers)
    batches = list(supply)
    assert [batch.rng.step for batch in batches] == list(steps)
    for step, batch in zip(steps, batches, strict=True):
        assert torch.equal(batch["images"].tokens_BN, toy_batches(step, 1, 2)["images"].tokens_BN)


def test_only_a_few_are_prepared_ahead():
    asked, lock = [], threading.Lock()

    def batches(step, rank, world):
        with lock:
            asked.append(step)
        return toy_batches(step, rank, world)

    with closing(prefetch(batches, range(1000), rank=0, world=1, device=CPU, workers=2)) as supply:
        next(supply)
    assert max(asked) <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_at_its_step(workers):
    def batches(step, rank, world):
        if step == 2:
            raise UserError("photo.png is unreadable.")
        return toy_batches(step, rank, world)

    supply = prefetch(batches, range(5), rank=0, world=1, device=CPU, workers=workers)
    assert [next(supply).rng.step for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match=r"photo\.png"):
        next(supply)


def test_micro_batches_keep_each_rows_content_and_draws():
    """Rows and random numbers of 2 ranks in 2 parts each, put together, are those of the whole."""
    whole = toy_batches(3, 0, 1)
    parts = [part for rank in range(2) for part in split(toy_batches(3, rank, 2), 2)]
    assert torch.equal(torch.cat([part["images"].tokens_BN for part in parts]), whole["images"].tokens_BN)
    drawn = [part.rng.uniform("noise", len(part["images"]), 5) for part in parts]
    assert torch.equal(torch.cat(drawn), whole.rng.uniform("noise", ROWS, 5))


def test_streams_of_different_sizes_are_cut_alike():
    batch = Batch(
        rng=StepRNG(0, 0),
        streams={
            "pairs": ImageTokenExamples(tokens_BN=torch.ones(4, 2).long()),
            "texts": LabelledVectorExamples(vectors_BD=torch.ones(6, 2), labels_B=torch.arange(6)),
        },
    )
    assert count_rows(batch) == 10
    first, second = split(batch, 2)
    assert (len(first["pairs"]), len(second["texts"]), set(first.streams)) == (2, 3, {"pairs", "texts"})
    assert second["texts"].labels_B.tolist() == [3, 4, 5]
    with pytest.raises(UserError, match=r"train\.grad_accum_steps is 4, but a process gets 6 rows of texts"):
        split(batch, 4)
