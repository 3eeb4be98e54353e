"""Endless shuffled streams, and the batch of every step as a pure function of (seed, step, rank).

Resuming therefore needs no state of a loader, and :func:`prefetch` lets threads prepare batches ahead of their step.

Shapes: B rows of one process.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from diptych.data.batch import Batch, Examples
from diptych.errors import UserError
from diptych.rng import StepRNG, derive_seed, mix64

BatchFn = Callable[[int, int, int], Batch]
"""(step, rank, world) to this process's rows of that step: a pure function, so that any step can be made again."""
_ROUNDS = 4
_SHUFFLED_WHOLE = 2**19
"""Items of the largest store that is shuffled as a whole."""
_NEIGHBOURS, _TOGETHER = 2**9, 2**7
"""Items of a larger store that stay neighbours, and how many such blocks are shuffled together."""


def shuffled(position: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Item and epoch at each ``position`` (int64 [B]) of an endless stream that shows all ``size`` items once an epoch.

    The order of an epoch is a keyed permutation computed position by position (a Feistel network over the next power
    of four, walked until it lands below ``size``), so that 400 million items need no table.
    """
    epoch = position // size
    return _permuted(position % size, np.int64(size), epoch, seed), epoch


def _permuted(item: np.ndarray, size: np.ndarray | np.int64, nonce: np.ndarray, seed: int) -> np.ndarray:
    """Where the permutation of ``size`` numbers that ``nonce`` and ``seed`` name puts each ``item``, all [B]."""
    keys_RB = np.stack(
        [mix64(nonce.astype(np.uint64) ^ np.uint64(derive_seed(seed, "order", r))) for r in range(_ROUNDS)]
    )
    half, limit = _half_bits(size), np.asarray(size, np.uint64)
    found, rows, walking = np.empty(item.shape, np.uint64), np.arange(len(item)), item.astype(np.uint64)
    while len(rows):
        walking = _feistel(walking, half, keys_RB)
        found[rows] = walking
        # Most have arrived. The last few take most of the calls, so a call must cost as little as it can.
        outside = np.flatnonzero(walking >= limit)
        rows, walking, keys_RB = rows[outside], walking[outside], keys_RB[:, outside]
        half, limit = (each[outside] if each.ndim else each for each in (half, limit))
    return found.astype(np.int64)


def _feistel(item: np.ndarray, half: np.ndarray, keys_RB: np.ndarray) -> np.ndarray:
    """Permutes the numbers of twice ``half`` bits."""
    low = (np.uint64(1) << half) - np.uint64(1)
    left, right = item >> half, item & low
    for key in keys_RB:
        mixed = mix64(right ^ key)
        mixed &= low
        mixed ^= left
        left, right = right, mixed
    left = left << half
    left |= right
    return left


def _half_bits(size: np.ndarray | np.int64) -> np.ndarray:
    """Half the bits of the next power of four from ``size`` on, at least 1."""
    _, bits = np.frexp((np.asarray(size) - 1).astype(np.float64))  # exact below 2^53
    return np.asarray(np.maximum(1, (bits + 1) // 2), np.uint64)


@dataclass(frozen=True, slots=True)
class ShardOrder:
    """As `shuffled`, but ``together`` shards at a time: for data of which only a part is at hand.

    Each epoch takes the shards in an order of its own and shuffles the items of ``together`` of them after another.
    Items of one shard lie together in the stream. A batch touches ``together`` shards, twice as many where it spans
    two groups. Like `shuffled` it depends on nothing but position and seed; the order of shards is kept as a memo.
    """

    ends: np.ndarray
    """Number of the item behind the last one of each shard, int64 [shards], growing."""
    together: int
    _memo: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, position: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Item and epoch at each ``position``, all int64 [B]."""
        size = int(self.ends[-1])
        epoch, item = position // size, np.empty_like(position)
        for each in np.unique(epoch).tolist():
            rows = epoch == each
            item[rows] = self._of_epoch(position[rows] % size, each, seed)
        return item, epoch

    def _of_epoch(self, place: np.ndarray, epoch: int, seed: int) -> np.ndarray:
        shards, ends = self._shards(epoch, seed)
        group_ends = np.append(ends[self.together - 1 : -1 : self.together], ends[-1])
        group = np.searchsorted(group_ends, place, side="right")
        starts = np.concatenate([[0], group_ends[:-1]])[group]
        nonce = mix64(group.astype(np.uint64) + np.uint64(1)) ^ np.uint64(epoch)
        place = starts + _permuted(place - starts, group_ends[group] - starts, nonce, derive_seed(seed, "group"))
        number = np.searchsorted(ends, place, side="right")
        return place - ends[number] + self.ends[shards[number]]

    def _shards(self, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in their order of the epoch, and where each ends in it."""
        if (found := self._memo.get((epoch, seed))) is None:
            count = len(self.ends)
            shards = _permuted(np.arange(count), np.int64(count), np.full(count, epoch), derive_seed(seed, "shards"))
            found = shards, np.cumsum(np.diff(self.ends, prepend=0)[shards])
            if len(self._memo) > 4:  # two epochs meet in a batch, and threads are some batches ahead
                self._memo.clear()
            self._memo[epoch, seed] = found
        return found


def block_order(size: int) -> ShardOrder | None:
    """The order of the ``size`` items of a store; None, which shuffles all of them together, up to half a million.

    In a larger store blocks of 512 neighbours come in random order, and the items of 128 blocks at a time are shuffled
    together. So what the system reads beside an item is wanted soon: a store that does not fit into memory is read at
    the speed of a small one. The order depends on nothing but the size and the seed.
    """
    if size <= _SHUFFLED_WHOLE:
        return None
    return ShardOrder(np.append(np.arange(_NEIGHBOURS, size, _NEIGHBOURS), size), _TOGETHER)


def choose(count: np.ndarray, item: np.ndarray, epoch: np.ndarray, seed: int) -> np.ndarray:
    """A random number below ``count`` for each (item, epoch), all [B]: which of an image's captions is shown."""
    key = np.uint64(derive_seed(seed, "choose"))
    return (mix64(mix64(item.astype(np.uint64) ^ key) ^ epoch.astype(np.uint64)) % count.astype(np.uint64)).astype(int)


Rows = TypeVar("Rows", bound=Examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream(Generic[Rows]):
    """Examples of one kind that can be read by number."""

    size: int
    """Number of examples of an epoch."""
    take: Callable[[np.ndarray, np.ndarray], Rows]
    """Reads B examples, given the item (below ``size``) and the epoch of each, int64 [B]."""
    shards: ShardOrder | None = None
    """Shuffles some shards at a time; by default all items are shuffled together."""


class BatchSampler:
    """Gives the batch of any step to any process: a pure function of (step, rank, world).

    Each stream is shuffled anew every epoch, and no item is left out between two steps. The rows of the processes
    follow one another, so that together they are the batch of a single process. Where an objective takes several rows
    of a stream for each row of the batch, those of one batch row lie side by side.
    """

    def __init__(
        self, streams: dict[str, Stream[Any]], *, multiples: dict[str, int], batch_size: int, seed: int
    ) -> None:
        """Raises UserError for a stream that the objective needs and that is missing or empty.

        Args:
            streams: The streams by name. One that ``multiples`` does not name is not used.
            multiples: Rows of each stream per row of the batch: the ``streams`` of the objective.
            batch_size: Rows of the batch of all processes together.
            seed: Decides the order of the items, and seeds the random numbers of each step.
        """
        for name in multiples:
            if name not in streams:
                raise UserError(f"there is no stream {name!r}, which the objective learns from")
            if streams[name].size == 0:
                raise UserError(f"there are no items of the stream {name!r} to learn from")
        self.streams, self.multiples = streams, multiples
        self.batch_size, self.seed = batch_size, seed

    @property
    def epoch_steps(self) -> float:
        """Number of steps of an epoch: of one pass over the stream that the objective names first."""
        name, multiple = next(iter(self.multiples.items()))
        return self.streams[name].size / (multiple * self.batch_size)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of process ``rank`` of ``world``. Raises UserError where the processes cannot share the batch."""
        if self.batch_size % world:
            raise UserError(
                f"a batch of {self.batch_size} rows cannot be shared by {world} processes: change --train.batch-size"
            )
        items = {name: self._rows(name, step, rank, world) for name in self.multiples}
        return Batch(rng=StepRNG(self.seed, step, rank, world), streams=items)

    def _rows(self, name: str, step: int, rank: int, world: int) -> Examples:
        stream = self.streams[name]
        local = self.batch_size // world * self.multiples[name]
        position = (step * world + rank) * local + np.arange(local, dtype=np.int64)
        seed = derive_seed(self.seed, name)
        return stream.take(*(stream.shards(position, seed) if stream.shards else shuffled(position, stream.size, seed)))


def prefetch(
    batches: BatchFn, steps: range, *, rank: int, world: int, device: torch.device, workers: int
) -> Generator[Batch]:
    """The batches of ``steps`` in order, on ``device``; ``workers`` threads prepare the next ones meanwhile.

    Close it (``contextlib.closing``) to drop the batches that nobody will ask for. An exception of ``batches`` is
    raised here at its step. Copies to a GPU are plain ones, made by the threads: they hold up no step.
    """

    def prepare(step: int) -> Batch:
        return batches(step, rank, world).to(device)

    if workers == 0:
        yield from map(prepare, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batches")
    try:
        rest = iter(steps)
        ahead = deque(pool.submit(prepare, step) for step in islice(rest, workers + 1))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(prepare, step) for step in islice(rest, 1))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
