import threading
from contextlib import closing

import numpy as np
import pytest
import torch

from diptych.data import streams
from diptych.data.batch import ImageTokenExamples
from diptych.data.streams import BatchSampler, ShardOrder, Stream, block_order, choose, prefetch, shuffled
from diptych.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_every_epoch_shows_every_item_once(size):
    item, epoch = shuffled(np.arange(3 * size), size, seed=1)
    for number in range(3):
        assert sorted(item[epoch == number]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    item, _ = shuffled(np.arange(2000), 1000, seed=1)
    other, _ = shuffled(np.arange(1000), 1000, seed=2)
    assert (item[:1000] == item[1000:]).mean() < 0.02
    assert (item[:1000] == other).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), item[:1000])[0, 1]) < 0.1


def test_large_numbers_need_no_table():
    item, _ = shuffled(np.arange(10**12, 10**12 + 1000), 400_000_000, seed=0)
    assert len(set(item)) == 1000
    assert item.min() >= 0
    assert item.max() < 400_000_000


def test_the_order_is_that_of_earlier_versions():
    item, _ = shuffled(np.array([0, 1, 99, 100, 101, 10**6]), 100, seed=1)
    assert item.tolist() == [28, 83, 81, 6, 61, 74]
    item, _ = shuffled(np.array([0, 1, 2, 10**10]), 400_000_000, seed=7)
    assert item.tolist() == [373111383, 375244271, 296488425, 351936728]


def order_of(sizes, together):
    return ShardOrder(np.cumsum(sizes), together)


@pytest.mark.parametrize("sizes", [[1], [5, 1, 9, 2, 64], [10] * 7])
@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_shard_by_shard_every_epoch_shows_every_item_once(sizes, together):
    total = sum(sizes)
    item, epoch = order_of(sizes, together)(np.arange(3 * total), 1)
    for number in range(3):
        assert sorted(item[epoch == number]) == list(range(total))


def test_a_batch_touches_few_shards_and_all_of_a_group_evenly():
    order, shards = order_of([100] * 50, 4), np.repeat(np.arange(50), 100)
    touched = [len(set(shards[order(np.arange(64) + 64 * step, 3)[0]])) for step in range(70)]
    assert max(touched) <= 8
    assert np.median(touched) == 4
    first, _ = order(np.arange(400), 3)  # one group: where an item is shown says nothing of its place in its shard
    assert np.bincount(shards[first])[np.unique(shards[first])].tolist() == [100] * 4
    assert abs(np.corrcoef(np.arange(400), first % 100)[0, 1]) < 0.15
    assert abs(np.corrcoef(np.arange(400), shards[first])[0, 1]) < 0.15


def test_shards_meet_others_in_each_epoch_and_with_each_seed():
    order, shards = order_of([10] * 40, 2), np.repeat(np.arange(40), 10)

    def groups(epoch, seed):
        item, _ = order(np.arange(400) + 400 * epoch, seed)
        return {frozenset(shards[item[start : start + 20]]) for start in range(0, 400, 20)}

    assert len(groups(0, 1)) == 20
    assert len(groups(0, 1) & groups(1, 1)) <= 4
    assert len(groups(0, 1) & groups(0, 2)) <= 4


def test_the_order_of_shards_is_a_pure_function_of_the_position():
    sizes, position = [7, 30, 1, 12, 25], np.arange(400)
    whole = order_of(sizes, 2)(position, 5)
    anew = order_of(sizes, 2)
    for row in np.random.Generator(np.random.PCG64(0)).permutation(400):
        item, epoch = anew(position[row : row + 1], 5)
        assert (item[0], epoch[0]) == (whole[0][row], whole[1][row])


def test_processes_share_the_rows_of_a_stream_with_shards():
    def sampler():
        stream = Stream(
            size=75,
            take=lambda index, epoch: ImageTokenExamples(tokens_BN=torch.from_numpy(index)[:, None]),
            shards=order_of([7, 30, 1, 12, 25], 2),
        )
        return BatchSampler({"pairs": stream}, multiples={"pairs": 1}, batch_size=8, seed=0)

    for step in (0, 9, 3):
        parts = [labels(sampler()(step, rank, 4)) for rank in range(4)]
        assert [row for part in parts for row in part] == labels(sampler()(step))


def test_a_large_store_is_shuffled_in_blocks_and_a_small_one_whole(monkeypatch):
    monkeypatch.setattr(streams, "_SHUFFLED_WHOLE", 99)
    monkeypatch.setattr(streams, "_NEIGHBOURS", 4)
    monkeypatch.setattr(streams, "_TOGETHER", 3)
    assert block_order(99) is None
    for size in (100, 101, 104):
        item, _ = block_order(size)(np.arange(2 * size), 1)
        assert sorted(item[:size]) == sorted(item[size:]) == list(range(size))
        assert len(set(item[:12] // 4)) <= 4  # three blocks; one may be the short last one
        assert len(set(item[:48] // 4)) >= 12


def test_choose_is_even_and_differs_from_epoch_to_epoch():
    count, items = np.full(5000, 5), np.arange(5000)
    first, second = (choose(count, items, np.full(5000, epoch), seed=0) for epoch in (0, 1))
    assert np.abs(np.bincount(first, minlength=5) / 5000 - 0.2).max() < 0.02
    assert 0.15 < (first == second).mean() < 0.25


def batches(size=10, multiple=1, batch_size=4, seed=0):
    stream = Stream(size=size, take=lambda index, epoch: ImageTokenExamples(tokens_BN=torch.from_numpy(index)[:, None]))
    return BatchSampler({"pairs": stream}, multiples={"pairs": multiple}, batch_size=batch_size, seed=seed)


def labels(batch):
    return batch["pairs"].tokens_BN[:, 0].tolist()


def test_a_batch_is_a_pure_function_of_its_step():
    one, two = batches(), batches()
    assert labels(one(7)) == labels(two(7))
    assert [labels(one(s)) for s in (3, 1, 2)] == [labels(two(s)) for s in (3, 1, 2)]
    assert one(7).rng.step == 7


def test_steps_follow_each_other_without_gap_or_repetition():
    shown = [label for step in range(5) for label in labels(batches()(step))]
    assert sorted(shown[:10]) == list(range(10))
    assert sorted(shown[10:]) == list(range(10))


@pytest.mark.parametrize("multiple", [1, 2])
def test_processes_share_the_rows_of_one(multiple):
    whole = batches(multiple=multiple)(3)
    parts = [batches(multiple=multiple)(3, rank, 2) for rank in (0, 1)]
    assert labels(parts[0]) + labels(parts[1]) == labels(whole)
    assert (parts[1].rng.rank, parts[1].rng.world) == (1, 2)


def test_what_cannot_be():
    with pytest.raises(UserError, match="4 rows cannot be shared by 3 processes"):
        batches()(0, 0, 3)
    with pytest.raises(UserError, match="there is no stream 'texts'"):
        BatchSampler({}, multiples={"texts": 1}, batch_size=4, seed=0)
    with pytest.raises(UserError, match="there are no items of the stream '"):
        batches(size=0)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("steps", [range(0), range(3, 5), range(2, 20)])
def test_batches_come_in_order_whatever_the_workers(workers, steps):
    supply = prefetch(batches(), steps, rank=1, world=2, device=CPU, workers=workers)
    made = list(supply)
    assert [batch.rng.step for batch in made] == list(steps)
    for step, batch in zip(steps, made, strict=True):
        assert torch.equal(batch["pairs"].tokens_BN, batches()(step, 1, 2)["pairs"].tokens_BN)


def test_only_a_few_are_prepared_ahead():
    asked, lock = [], threading.Lock()

    def noted(step, rank, world):
        with lock:
            asked.append(step)
        return batches()(step, rank, world)

    with closing(prefetch(noted, range(1000), rank=0, world=1, device=CPU, workers=2)) as supply:
        next(supply)
    assert max(asked) <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_at_its_step(workers):
    def broken(step, rank, world):
        if step == 2:
            raise UserError("photo.png is unreadable.")
        return batches()(step, rank, world)

    supply = prefetch(broken, range(5), rank=0, world=1, device=CPU, workers=workers)
    assert [next(supply).rng.step for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match=r"photo\.png"):
        next(supply)
