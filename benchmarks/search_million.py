"""Is a million embeddings searched exactly in half a second, in little memory?

    python benchmarks/search_million.py --data FOLDER [--json FILE] [--approximate] [--codes]

Makes a store of a million random unit vectors of width 512 in FOLDER (1 GB in half precision; an earlier one is used
again), and searches it with batches of 32 queries for the 10 nearest, on two threads. The result is compared with
float64 similarities, sorted. `--approximate` also builds the index of the extra `ann`, over vectors in clusters, as
embeddings are, and tells its recall. `--codes` does so for the index of `diptych embed --index ivfpq`, and tells the
memory in which it was built. Two minutes. Exits with 1 when a check fails.

On a busy machine the clock says little; the processor time of a search is told too.
"""

import argparse
import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diptych.data.store import VectorStore, write_vectors
from diptych.dual.search import Hits, build_ivfpq, nearest, nearest_approximate

ITEMS, WIDTH, QUERIES, HITS, THREADS = 1_000_000, 512, 32, 10, 2
MOST_SECONDS, MOST_MEMORY, LEAST_RECALL = 0.5, 1e9, 0.95
_CHUNK = 20_000


def make(folder: Path, *, clusters: int | None) -> VectorStore:
    """Unit vectors in all directions, or around ``clusters`` centres."""
    if VectorStore.is_one(folder):
        return VectorStore.open(folder)
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((clusters, WIDTH), np.float32) if clusters else np.zeros((1, WIDTH), np.float32)

    def batches() -> Iterator[np.ndarray]:
        for _ in range(ITEMS // _CHUNK):
            rows = centres[draw.integers(0, len(centres), _CHUNK)] + draw.standard_normal((_CHUNK, WIDTH), np.float32)
            yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)

    return write_vectors(folder, batches(), keys=map(str, range(ITEMS)), manifest={"clusters": clusters})


def queries_near(store: VectorStore, *, seed: int) -> torch.Tensor:
    """Some of the vectors, moved a little."""
    draw = np.random.default_rng(seed)
    rows = store.vectors[np.sort(draw.integers(0, ITEMS, QUERIES))].astype(np.float32)
    return F.normalize(torch.from_numpy(rows + 0.02 * draw.standard_normal(rows.shape, np.float32)), dim=1)


def timed(search: Callable[[torch.Tensor], Hits], store: VectorStore, *, rounds: int = 10) -> dict[str, float]:
    """Of the searches after a first one, which reads the file. Processor time is the sum over threads."""
    search(queries_near(store, seed=0))
    seconds, processor = [], []
    for seed in range(rounds):
        queries_QD = queries_near(store, seed=seed)
        begin, busy = time.perf_counter(), time.process_time()
        search(queries_QD)
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - busy)
    return {
        "median_seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "processor_seconds": statistics.median(processor),
    }


def sorted_similarities(queries_QD: torch.Tensor, store: VectorStore) -> torch.Tensor:
    """The 10 best float64 similarities of each query, the long way: all of them, sorted."""
    parts = [
        queries_QD.numpy().astype(np.float64) @ store.vectors[start : start + _CHUNK].astype(np.float64).T
        for start in range(0, ITEMS, _CHUNK)
    ]
    return torch.from_numpy(-np.sort(-np.concatenate(parts, 1), axis=1)[:, :HITS])


def exact(folder: Path) -> dict[str, Any]:
    store = make(folder / "million", clusters=None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = timed(lambda queries_QD: nearest(queries_QD, store.vectors, k=HITS), store)
    # The mapped store itself counts as resident too; libraries and keys were there before.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queries_QD = queries_near(store, seed=0)
    found = nearest(queries_QD, store.vectors, k=HITS).scores_QK
    return {
        **times,
        "memory_before": before,
        "memory_beyond_store": peak - store.vectors.nbytes,
        "largest_error": (found - sorted_similarities(queries_QD, store)).abs().max().item(),
    }


def approximate(folder: Path, *, codes: bool) -> dict[str, Any]:
    store = make(folder / "million_in_clusters", clusters=5000)
    index, found = store.folder / "ivfpq", {}
    shutil.rmtree(index, ignore_errors=True)  # search would use it
    if codes:
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        build_ivfpq(store)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found |= {"build_seconds": time.perf_counter() - begin, "memory_before": before, "peak_memory": peak}
        found |= {"bytes": sum(file.stat().st_size for file in index.iterdir())}
    queries_QD = torch.cat([queries_near(store, seed=seed) for seed in range(10)])  # 32 alone are too few for a recall
    begin = time.perf_counter()
    near = nearest_approximate(queries_QD, store, k=HITS)
    first = time.perf_counter() - begin
    right = nearest(queries_QD, store.vectors, k=HITS)
    pairs = zip(near.items_QK.tolist(), right.items_QK.tolist(), strict=True)
    times = timed(lambda some_QD: nearest_approximate(some_QD, store, k=HITS), store)
    recall = statistics.mean(len({*a} & {*b}) / HITS for a, b in pairs)
    return {**found, "first_search_seconds": first, **times, "recall": recall}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--approximate", action="store_true", help="also the index of the extra `ann`")
    parser.add_argument("--codes", action="store_true", help="also the index of `embed --index ivfpq`")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)

    found = {"exact": exact(options.data)}
    passed = found["exact"]["median_seconds"] < MOST_SECONDS and found["exact"]["memory_beyond_store"] < MOST_MEMORY
    passed = passed and found["exact"]["largest_error"] < 1e-5
    for name, wanted in (("approximate", options.approximate), ("codes", options.codes)):
        if wanted:
            found[name] = approximate(options.data, codes=name == "codes")
            passed = passed and found[name]["recall"] >= LEAST_RECALL
    for title, values in found.items():
        print(title, *(f"{name} {value:.4g}" for name, value in values.items()), sep="\n    ")
    if options.json:
        options.json.write_text(json.dumps({"passed": passed, **found}, indent=2) + "\n")
    seconds, memory = found["exact"]["median_seconds"], found["exact"]["memory_beyond_store"] / 1e6
    print(
        f"{'PASS' if passed else 'FAIL'}: {QUERIES} queries among {ITEMS:,} vectors of {WIDTH} in {seconds:.2f} s, "
        f"{memory:.0f} MB beyond the store"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
