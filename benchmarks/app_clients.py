"""Many people at one page: 64 clients caption images for a minute, and each asks again as soon as it is answered.

    python benchmarks/app_clients.py --run runs/demo/itit --json clients.json

Starts `diptych app` in a process of its own and asks it as browsers do. Checks that there is no error and that the
longest wait is at most five times the median. Takes two minutes.
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


def ask(address: str, fn: int, data: list[Any], session: str) -> Any:
    """One request through the page's queue, and its answer."""
    body = {"data": data, "fn_index": fn, "session_hash": session, "event_data": None, "trigger_id": None}
    post(f"{address}gradio_api/queue/join?", json.dumps(body).encode(), "application/json")
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=120) as stream:
        for line in stream:
            if not line.startswith(b"data:"):
                continue
            message = json.loads(line[5:])
            if message["msg"] == "process_completed":
                if not message["success"]:
                    raise RuntimeError(message["output"])
                return message["output"]["data"]
    raise RuntimeError("the stream ended without an answer")


def client(number: int, address: str, fn: int, run: str, file: Path, until: float, waits: list, errors: list) -> None:
    path = upload(address, file)
    image = {"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}
    asked = 0
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            [answer] = ask(address, fn, [run, [image], 4], f"client{number}x{asked}")
            if 'class="found"' not in answer:
                raise RuntimeError(answer)
            waits.append(time.monotonic() - began)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        asked += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of an itit recipe")
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
            functions = json.load(answer)["dependencies"]
        fn = next(each["id"] for each in functions if each["api_name"] == "caption")
        with tempfile.TemporaryDirectory() as folder:
            pixels = ScenesSource(count=given.clients, level=3).images(range(given.clients), 64)
            files = [Path(folder) / f"{number}.png" for number in range(given.clients)]
            for file, image in zip(files, pixels, strict=True):
                Image.fromarray(image).save(file)
            waits: list[float] = []
            errors: list[str] = []
            until = time.monotonic() + given.seconds
            threads = [
                threading.Thread(target=client, args=(number, address, fn, given.run, file, until, waits, errors))
                for number, file in enumerate(files)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        page.terminate()
        page.wait()
    median, longest = statistics.median(waits), max(waits)
    found = {
        "clients": given.clients,
        "seconds": given.seconds,
        "answers": len(waits),
        "errors": len(errors),
        "wait_median_s": round(median, 3),
        "wait_longest_s": round(longest, 3),
        "ratio": round(longest / median, 2),
    }
    print(json.dumps(found, indent=1))
    for error in errors[:3]:
        print(error, file=sys.stderr)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    good = not errors and longest <= WORST * median
    print(f"{'passed' if good else 'FAILED'}: {len(errors)} errors, longest wait {longest / median:.1f} x the median")
    sys.exit(not good)


if __name__ == "__main__":
    main()
