"""Do memory and time of a batch stay the same from 10^3 to 10^8 items?

    python benchmarks/stream_scale.py --data FOLDER [--json FILE] [--sizes 1000 10000]

For each size a process of its own opens a store of so many items (256 image tokens and one text of 64 tokens each) and
makes batches of 512 rows as a training of ITIT does: 1,024 pairs, 512 images and 512 texts. The arrays are sparse files
that take no disk, except the counts of captions (4 bytes an item), so the texts are empty: that makes a batch cheaper
and what grows with the size easier to see. All steps are made twice: in the first turn the system reads the files, in
the second one they are in its cache. Told are the milliseconds of a batch in both turns, those of the arithmetic that
says which items are in it, and the largest resident memory. Exits with 1 if the process of 10^8 items takes 1 GB, or if
its batches of the second turn take 20 % longer than those of 10^4. Two minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diptych.data.store import STORE_MANIFEST, STORE_VERSION, Store
from diptych.data.streams import BatchSampler, Stream, shuffled

SIZES = [10**power for power in range(3, 9)]
TOKENS, LENGTH, ROWS = 256, 64, 512
STREAMS = {"pairs": 2, "images": 1, "texts": 1}
MOST_MEMORY, MOST_GROWTH, FROM, TO = 1e9, 1.2, 10**4, 10**8


def make(folder: Path, items: int) -> None:
    """A store of zeros, with one caption for each item."""
    folder.mkdir(parents=True)
    arrays = {
        "tokens": {"shape": [items, TOKENS], "dtype": "<i4"},
        "ids": {"shape": [items, LENGTH], "dtype": "<i4"},
        "counts": {"shape": [items], "dtype": "<i4"},
    }
    for name, about in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            header = {"descr": about["dtype"], "fortran_order": False, "shape": tuple(about["shape"])}
            np.lib.format.write_array_header_1_0(file, header)
            if name == "counts":
                for start in range(0, items, 2**20):
                    file.write(np.ones(min(2**20, items - start), "<i4").tobytes())
            else:
                file.truncate(file.tell() + 4 * int(np.prod(about["shape"])))
    manifest = {"version": STORE_VERSION, "made_by": {}, "items": items, "arrays": arrays, "skipped": 0}
    (folder / STORE_MANIFEST).write_text(json.dumps(manifest))


def memory(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Of this process alone, which has opened nothing before."""
    begun = memory("VmRSS")
    began = time.perf_counter()
    store = Store.open(folder)
    everything = range(len(store))
    streams: dict[str, Stream[Any]] = {
        "pairs": store.pairs(everything, seed=0),
        "images": store.images(everything),
        "texts": store.texts(everything),
    }
    sampler = BatchSampler(streams, multiples=STREAMS, batch_size=ROWS, seed=0)
    opened = time.perf_counter() - began
    turns, arithmetic = [], []
    for clock in (time.perf_counter, time.process_time):
        taken = []
        for step in range(steps):
            began = clock()
            sampler(step)
            taken.append(clock() - began)
        turns.append(1e3 * statistics.median(taken))
    for step in range(steps):
        began = time.process_time()
        for name, multiple in STREAMS.items():
            order = streams[name].shards or partial(shuffled, size=len(store))
            order(step * multiple * ROWS + np.arange(multiple * ROWS), seed=0)
        arithmetic.append(time.process_time() - began)
    return {
        "items": len(store),
        "open_seconds": opened,
        "first_turn_ms": turns[0],
        "second_turn_ms": turns[1],
        "arithmetic_ms": 1e3 * statistics.median(arithmetic),
        "imports_bytes": begun,
        "largest_bytes": memory("VmHWM"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder on a file system with sparse files")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.steps)))
        return
    found = []
    for items in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.data) as scratch:
            make(Path(scratch) / "store", items)
            command = [sys.executable, __file__, "--one", f"{scratch}/store", "--steps", str(arguments.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))
    print("| items | opened, s | first turn, ms | second turn, ms | arithmetic, ms | imports, MB | largest, MB |")
    print("|---|---|---|---|---|---|---|")
    for row in found:
        times = " | ".join(f"{row[name]:.1f}" for name in ("first_turn_ms", "second_turn_ms", "arithmetic_ms"))
        sizes = " | ".join(f"{row[name] / 1e6:,.0f}" for name in ("imports_bytes", "largest_bytes"))
        print(f"| {row['items']:,} | {row['open_seconds']:.2f} | {times} | {sizes} |")
    by_items = {row["items"]: row for row in found}
    few, many = by_items.get(FROM), by_items.get(TO)
    growth = many["second_turn_ms"] / few["second_turn_ms"] if few and many else None
    held = [row["largest_bytes"] < MOST_MEMORY for row in found] + ([growth <= MOST_GROWTH] if growth else [])
    if arguments.json:
        arguments.json.write_text(json.dumps({"sizes": found, "growth": growth, "held": all(held)}, indent=1) + "\n")
    told = f"; 10^8 items take {growth:.2f} times as long as 10^4 (at most {MOST_GROWTH})" if growth else ""
    worst = max(row["largest_bytes"] for row in found)
    print(f"{'held' if all(held) else 'MISSED'}: at most {worst / 1e6:,.0f} MB resident (below 1,000){told}")
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
