"""Endless shuffled streams, and the batch of every step as a pure function of (seed, step, rank).

Resuming therefore needs no state of a loader, and :func:`prefetch` lets threads prepare batches ahead of their step.

Shapes: B rows of one process.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


def shuffled(position: np.ndarray, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Item and epoch at each ``position`` (int64 [B]) of an endless stream that shows all ``size`` items once an epoch.

    The order of an epoch is a keyed permutation computed position by position (a Feistel network over the next power
    of four, walked until it lands below ``size``), so that 400 million items need no table.
    """
    epoch = position // size
    keys = [mix64(epoch.astype(np.uint64) ^ np.uint64(derive_seed(seed, "order", r))) for r in range(_ROUNDS)]
    half = np.uint64(max(1, (int(size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    item = (position % size).astype(np.uint64)
    outside = np.ones(item.shape, bool)
    while outside.any():
        left, right = item[outside] >> half, item[outside] & low
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key[outside]) & low)
        item[outside] = left << half | right
        outside = item >= np.uint64(size)
    return item.astype(np.int64), epoch


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
        return stream.take(*shuffled(position, stream.size, derive_seed(self.seed, name)))


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
