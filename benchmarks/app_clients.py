"""Many people at one page: 64 clients caption images for a minute, and each asks again as soon as it is answered.

    python benchmarks/app_clients.py --run runs/demo/itit --json clients.json
    python benchmarks/app_clients.py --run runs/demo/itit --tab imagine --clients 16

Starts `diptych app` in a process of its own and asks it as browsers do. Checks that there is no error and that the
longest wait is at most five times the median. Takes two minutes. With `--tab imagine` each client generates images of
texts of its own, with seeds of its own, and the images that it sees on the way are counted.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.data.scenes import ScenesSource

WORST = 5.0
"""Largest ratio of the longest wait to the median."""


def post(url: str, body: bytes, kind: str) -> Any:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def upload(address: str, file: Path) -> str:
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'.encode()
    body = head + file.read_bytes() + b"\r\n--x--\r\n"
    return post(f"{address}gradio_api/upload", body, "multipart/form-data; boundary=x")[0]


def ask(address: str, fn: int, data: list[Any], session: str) -> tuple[Any, int]:
    """One request through the page's queue: its answer, and how many images came before it."""
    body = {"data": data, "fn_index": fn, "session_hash": session, "event_data": None, "trigger_id": None}
    post(f"{address}gradio_api/queue/join?", json.dumps(body).encode(), "application/json")
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        partial = 0
        for line in stream:
            if not line.startswith(b"data:"):
                continue
            message = json.loads(line[5:])
            partial += message["msg"] == "process_generating"
            if message["msg"] == "process_completed":
                if not message["success"]:
                    raise RuntimeError(message["output"])
                return message["output"]["data"], partial
    raise RuntimeError("the stream ended without an answer")


@dataclass
class Seen:
    """What all clients saw."""

    waits: list[float] = field(default_factory=list)
    """Seconds."""
    partial: list[int] = field(default_factory=list)
    """Images before the last one, of each answer."""
    errors: list[str] = field(default_factory=list)


def client(number: int, address: str, fn: int, asks: Callable[[int], list[Any]], until: float, seen: Seen) -> None:
    """Asks ``asks(0)``, ``asks(1)`` and so on until the time is over."""
    asked = 0
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            answer, partial = ask(address, fn, asks(asked), f"client{number}x{asked}")
            if answer[0] is None or "note" in answer[0]:
                raise RuntimeError(answer)
            seen.waits.append(time.monotonic() - began)
            seen.partial.append(partial)
        except Exception as error:
            seen.errors.append(f"{type(error).__name__}: {error}")
        asked += 1


def captioning(address: str, run: str, file: Path) -> Callable[[int], list[Any]]:
    """What a client asks to have an image captioned with four beams."""
    image = {"path": upload(address, file), "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}
    return lambda asked: [run, [image], 4]


def imagining(run: str, number: int, settings: tuple[float, int]) -> Callable[[int], list[Any]]:
    """What a client asks to have images generated with ``settings``, guidance and steps."""
    text = ScenesSource(count=number + 1, level=3).captions(number)[0]
    return lambda asked: [run, text, 1000 * asked + number, *settings]


def everyone(given: argparse.Namespace, address: str, config: dict[str, Any], folder: Path) -> list[Any]:
    """What each client asks."""
    numbers = range(given.clients)
    if given.tab == "imagine":
        usual = {each["props"].get("label"): each["props"].get("value") for each in config["components"]}
        return [imagining(given.run, number, (usual["Guidance"], usual["Steps"])) for number in numbers]
    files = [folder / f"{number}.png" for number in numbers]
    for file, image in zip(files, ScenesSource(count=given.clients, level=3).images(numbers, 64), strict=True):
        Image.fromarray(image).save(file)
    return [captioning(address, given.run, file) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of an itit recipe")
    parser.add_argument("--tab", choices=["caption", "imagine"], default="caption")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    page = subprocess.Popen(
        [sys.executable, "-m", "diptych", "app", given.run, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert page.stdout is not None
        address = next(line.split()[1] for line in page.stdout if re.match("open http", line))
        with urllib.request.urlopen(f"{address}config", timeout=60) as answer:
            config = json.load(answer)
        fn = next(each["id"] for each in config["dependencies"] if each["api_name"] == given.tab)
        with tempfile.TemporaryDirectory() as folder:
            asks = everyone(given, address, config, Path(folder))
            seen = Seen()
            until = time.monotonic() + given.seconds
            threads = [
                threading.Thread(target=client, args=(number, address, fn, each, until, seen))
                for number, each in enumerate(asks)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        page.terminate()
        page.wait()
    if not seen.waits:
        sys.exit(f"FAILED: no answer; {seen.errors[:1]}")
    median, longest = statistics.median(seen.waits), max(seen.waits)
    found = {
        "tab": given.tab,
        "clients": given.clients,
        "seconds": given.seconds,
        "answers": len(seen.waits),
        "errors": len(seen.errors),
        "wait_median_s": round(median, 3),
        "wait_longest_s": round(longest, 3),
        "ratio": round(longest / median, 2),
        "partial_images_mean": round(statistics.mean(seen.partial), 1),
    }
    print(json.dumps(found, indent=1))
    for error in seen.errors[:3]:
        print(error, file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    good = not seen.errors and longest <= WORST * median
    print(
        f"{'passed' if good else 'FAILED'}: {len(seen.errors)} errors, longest wait {longest / median:.1f} x the median"
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
