"""Does `diptych encode --engine ray` write the bytes of the local command, though a worker is killed in the middle?

    python benchmarks/ray_encode.py --out FOLDER [--data SRC] [--workers 2] [--json FILE]

Encodes SRC (default: 20,000 built-in scenes) to tokens, ids and text features by the tokenizers of `diptych demo`, with
the local engine and on a Ray cluster that is started on this machine. Half way through the second command, one of its
workers is killed by SIGKILL. Every file of the two stores must be equal, and every item must be there once. Needs the
extra `ray`; some minutes. Exits with 1 when a check fails.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from diptych.data.sources import open_source
from diptych.data.store import Store
from diptych.itit.demo import STAGES
from diptych.itit.recipes import itit_tiny
from diptych.run_folder import write_config


def tokenizers(folder: Path) -> Path:
    """A run folder that holds the tokenizers alone."""
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(STAGES / part, folder / part, dirs_exist_ok=True)
    write_config(folder, recipe="itit-tiny", run=itit_tiny())
    return folder


def encode(source: str, run: Path, out: Path, *more: str) -> subprocess.Popen:
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
    command = [sys.executable, "-m", "diptych", "encode", source, "--run", run, "--out", out, "--features", *more]
    return subprocess.Popen(list(map(str, command)))


def kill_a_worker(command: subprocess.Popen, out: Path, half: int) -> int:
    """Kill the process of a worker that is at work when half of the items are done. Returns how many were."""
    progress = out.with_name(f".{out.name}.partial") / "progress.json"
    while command.poll() is None:
        done = json.loads(progress.read_text())["done"] if progress.is_file() else 0
        if done >= half:
            for process in psutil.Process(command.pid).children(recursive=True):
                if process.cmdline()[:1] == ["ray::_Worker.run"]:
                    process.send_signal(signal.SIGKILL)
                    return done
        time.sleep(0.02)
    raise SystemExit("FAIL: the command ended before a worker was killed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes:?count=20000")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="CPUs of the cluster")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": given.workers})}
    run, count, seconds = tokenizers(given.out / "run"), len(open_source(given.data)), {}

    begin = time.perf_counter()
    assert encode(given.data, run, given.out / "local").wait() == 0
    seconds["local"] = time.perf_counter() - begin
    begin = time.perf_counter()
    command = encode(given.data, run, given.out / "ray", "--engine", "ray")
    killed_at = kill_a_worker(command, given.out / "ray", count // 2)
    assert command.wait() == 0
    seconds["ray"] = time.perf_counter() - begin

    names = sorted(file.name for file in (given.out / "local").iterdir())
    unequal = [
        name for name in names if (given.out / "local" / name).read_bytes() != (given.out / "ray" / name).read_bytes()
    ]
    unequal += [file.name for file in (given.out / "ray").iterdir() if file.name not in names]
    keys = (given.out / "ray/keys.txt").read_text().split("\n")[:-1]
    store = Store.open(given.out / "ray")
    once = len(set(keys)) == len(keys) == len(store) == count - store.manifest["skipped"]
    passed = not unequal and once
    found = {"items": len(store), "killed_at": killed_at, "seconds": seconds, "files": names, "unequal": unequal}
    if given.json:
        given.json.write_text(json.dumps({"passed": passed, **found}, indent=2) + "\n")
    print(*(f"{name} {value}" for name, value in found.items()), sep="\n")
    told = f"{len(store):,} of {count:,} items, each once: {once}; files that differ: {', '.join(unequal) or 'none'}"
    print(f"{'PASS' if passed else 'FAIL'}: a worker was killed after {killed_at:,} items; {told}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
