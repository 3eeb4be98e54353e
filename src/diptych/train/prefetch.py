"""Batches prepared ahead of their step, and batches cut into micro-batches."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import torch

from diptych.data.batch import Batch, Examples
from diptych.errors import UserError

BatchFn = Callable[[int, int, int], Batch]
"""(step, rank, world) to this process's rows of that step: a pure function, so that any step can be made again."""


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


def count_rows(batch: Batch) -> int:
    """Rows of all streams together."""
    return sum(len(examples) for examples in batch.streams.values())


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut every stream of ``batch`` into ``parts`` equal runs of rows.

    A micro-batch has the random numbers of one more process: part i of rank r in a world of w is rank r * parts + i
    in a world of w * parts. So every row keeps its numbers.

    Raises:
        UserError: a stream's rows do not divide by ``parts``.
    """
    if parts == 1:
        return [batch]
    streams = batch.streams
    for name, examples in streams.items():
        if len(examples) % parts:
            raise UserError(
                f"train.grad_accum_steps is {parts}, but a process gets {len(examples)} rows of {name}, "
                "which do not divide by it; change train.grad_accum_steps or train.batch_size."
            )
    rng = batch.rng
    return [
        Batch(
            rng=replace(rng, rank=rng.rank * parts + part, world=rng.world * parts),
            streams={name: _part(examples, part, parts) for name, examples in streams.items()},
        )
        for part in range(parts)
    ]


def _part(examples: Examples, part: int, parts: int) -> Examples:
    rows = len(examples) // parts
    return examples[part * rows : (part + 1) * rows]
