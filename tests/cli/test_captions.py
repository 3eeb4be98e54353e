"""`diptych caption`: what it prints and writes, and how mistakes and kills end."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.data.sources import open_source

# Captions on the terminal


def test_caption(call, run, photo):
    status, out, err = call("caption", run, photo, photo)
    assert (status, err) == (0, "")
    first, second, rest = out.split("\n")
    assert (first, rest) == (second, "")
    text = first.removeprefix(f"{photo}: ")
    assert call("caption", run, photo)[1] == f"{text}\n"
    first = text
    status, out, _ = call("caption", run, photo, "--json")
    record = json.loads(out)
    assert (record["file"], record["caption"]) == (str(photo), first)
    assert record["score"] < 0
    status, out, _ = call("caption", run, photo, "--json", "--beams", "1")
    assert json.loads(out)["score"] is None
    exact = json.loads(call("caption", run, photo, "--json", "--precision", "fp32")[1])["score"]
    near = json.loads(call("caption", run, photo, "--json", "--precision", "int8")[1])["score"]
    assert near != exact
    assert near == pytest.approx(exact, rel=0.03)
    half = json.loads(call("caption", run, photo, "--json", "--precision", "fp32", "--visible", 0.5)[1])["score"]
    assert half != exact


@pytest.mark.slow
def test_a_caption_in_a_process_of_its_own(run, photo, tmp_path):
    """Nothing but captions on stdout, and nothing on stderr."""
    command = [sys.executable, "-m", "diptych", "caption", str(run), str(photo), "--json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["file"] == str(photo)


def test_all_images_of_sources_are_captioned(call, run, photo, tmp_path, mistaken):
    (tmp_path / "photos/inner").mkdir(parents=True)
    for name in ("a.png", "inner/b.png", "cut.png"):
        (tmp_path / "photos" / name).write_bytes(photo.read_bytes()[: 90 if name == "cut.png" else None])
    (tmp_path / "table.csv").write_text("file_name,caption\n./photos/a.png,x\n")
    folder = tmp_path / "photos"
    status, out, err = call("caption", run, folder, tmp_path / "table.csv", "scenes:?count=2", tmp_path / "none.csv")
    assert status == 1
    names = [line.split(": ")[0] for line in out.splitlines()]
    assert names == [str(folder / "a.png"), str(folder / "inner/b.png"), str(folder / "a.png"), *names[3:]]
    assert len(names) == 5
    assert [part in err for part in ("cut.png", "none.csv")] == [True, True]
    assert err.count("\n") == 2
    mistaken(call("caption", run, tmp_path / "none.jpg", folder / "*.jpg"), "none.jpg: does not exist", "*.jpg")
    assert len(call("caption", run, f"{folder}/*.png")[1].splitlines()) == 1


# Captions of a whole data set


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out.parquet", "out.json"])
def test_captions_of_a_data_set(call, run, set_of_images, tmp_path, mistaken, name):
    out = tmp_path / name
    status, told, err = call("caption", run, set_of_images, "--out", out, "--beams", 1)
    assert status == 1
    assert "05.png: is not an image" in err
    assert told == f"37 images captioned; 2 that have captions left out: {out}\n"
    source = open_source(str(out))
    assert [Path(source.key(i)).name for i in range(3)] == ["00.png", "01.png", "02.png"]
    assert len(source) == 37
    expected = call("caption", run, set_of_images / "00.png", "--beams", 1)[1].strip()
    assert source.captions(0) == ([expected] if expected else [])
    assert source.image(0, 8).shape == (8, 8, 3)
    mistaken(call("caption", run, set_of_images, "--out", out), f"{name}: exists already")
    every = call("caption", run, set_of_images, "--out", tmp_path / f"all-{name}", "--all", "--beams", 1)
    assert every[1].startswith("39 images captioned: ")


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl", "out.parquet", "out.json"])
def test_several_captions_of_each_image(call, run, set_of_images, tmp_path, mistaken, name):
    ranked = ("--candidates", 2, "--best-of", 3)
    record = json.loads(call("caption", run, set_of_images / "00.png", "--json", *ranked)[1])
    texts = [each["caption"] for each in record["candidates"]]
    assert len(set(texts)) == 2
    assert texts[0] == record["caption"]
    assert call("caption", run, set_of_images / "00.png", "--best-of", 3)[1] == f"{texts[0]}\n"
    out = tmp_path / name
    assert call("caption", run, set_of_images, "--out", out, *ranked)[0] == 1
    kept = open_source(str(out)).captions(0)
    assert kept == ([texts[0]] if texts[0] else [])  # the others are no captions
    if name == "out.jsonl":
        assert json.loads(out.read_text().splitlines()[0])["candidates"] == texts
    mistaken(call("caption", run, set_of_images, "--candidates", 2), "only --json and --out FILE tell more than one")
    mistaken(call("caption", run, set_of_images, "--best-of", 1), "--best-of 1: must be 2 or more")
    mistaken(call("caption", run, set_of_images, "--visible", 0), "--visible 0: give a share above 0")
    mistaken(call("caption", run, set_of_images, "--visible", 2), "--visible 2: give a share above 0")


def test_captions_have_a_confidence_where_a_run_is_calibrated(call, run, set_of_images, tmp_path, mistaken):
    status, out, err = call("caption", run, "--calibrate", "scenes:?split=test&count=120")
    assert (status, out) == (0, "")
    assert "right in every attribute; on 60 other captions" in err
    assert sorted(path.name for path in (run / "confidence").iterdir()) == ["confidence.json", "reliability.svg"]
    record = json.loads(call("caption", run, set_of_images / "00.png", "--json")[1])
    assert record["confidence"] == 0  # random weights are never right
    assert call("caption", run, set_of_images, "--out", tmp_path / "a.csv")[0] == 1
    assert (tmp_path / "a.csv").read_text().splitlines()[0] == "file_name,caption,score,confidence"
    assert len(open_source(str(tmp_path / "a.csv"))) == 37
    assert call("caption", run, set_of_images, "--out", tmp_path / "a.tasks.json")[0] == 1
    assert json.loads((tmp_path / "a.tasks.json").read_text())[0]["predictions"][0]["score"] == 0
    _, out, err = call("caption", run, set_of_images / "00.png", "--json", "--beams", 3)
    assert "confidence" not in json.loads(out)
    assert "is of other weights or settings and is not used" in err
    mistaken(call("caption", run, "--calibrate", "scenes:?count=40"), "has learned from these pairs")
    mistaken(call("caption", run, "--calibrate", "data.valid"), "had no --data.valid")


def test_captioning_that_is_killed_goes_on(call, run, set_of_images, tmp_path, mistaken, monkeypatch):
    from diptych.data import caption_file

    call("caption", run, set_of_images, "--out", tmp_path / "whole.csv")
    add, killed = caption_file.CaptionFile.add, []

    def add_and_die(self, made):
        add(self, made)
        if len(killed) < 2:
            killed.append(len(self.made))
            raise KeyboardInterrupt

    monkeypatch.setattr(caption_file.CaptionFile, "add", add_and_die)
    parts = tmp_path / "parts.csv"
    for _ in range(2):
        assert call("caption", run, set_of_images, "--out", parts)[0] == 130
        assert not parts.exists()
    with open(tmp_path / ".parts.csv.partial", "a") as file:
        file.write('{"file": "a line that was cut sh')
    mistaken(call("caption", run, set_of_images, "--out", parts, "--beams", 3), "begun by another run")
    out = call("caption", run, set_of_images, "--out", parts)[1]
    assert out.startswith(f"37 images captioned, {killed[1]} of them before;")
    assert parts.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / ".parts.csv.partial").exists()


def test_shards_are_one_source(call, run, set_of_images, tmp_path, mistaken):
    for number in range(3):
        call("caption", run, set_of_images, "--out", tmp_path / "c.tasks.json", "--beams", 1, "--shard", f"{number}/3")
    names = [f"c-0000{number}-of-00003.tasks.json" for number in range(3)]
    assert sorted(path.name for path in tmp_path.glob("c*")) == names
    source = open_source(str(tmp_path / "c-*.tasks.json"))
    assert sorted(Path(source.key(i)).stem for i in range(len(source))) == [
        f"{n:02}" for n in range(40) if n not in (3, 5, 7)
    ]
    mistaken(call("caption", run, set_of_images, "--out", tmp_path / "d.csv", "--shard", "3/3"), "--shard 3/3: ", "0/4")
    mistaken(call("caption", run, set_of_images, "--shard", "0/3"), "--shard 0/3: goes with --out")
    mistaken(
        call("caption", run, set_of_images / "00.png", "--out", tmp_path / "d.csv", "--shard", "0/2"), "of 1 image"
    )


def test_captions_beside_the_images(call, run, set_of_images, tmp_path, mistaken):
    status, out, _ = call("caption", run, set_of_images, "--out", "sidecars", "--beams", 1)
    assert (status, out.split(";")[0]) == (1, "37 images captioned")
    assert (set_of_images / "03.txt").read_text() == "my own caption\n"
    assert len(list(set_of_images.glob("*.txt"))) == 39
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(set_of_images / "00.png", "00.png")
    mistaken(call("caption", run, tmp_path / "t.tar", "--out", "sidecars"), "00 is no file")
    mistaken(call("caption", run, "scenes:?count=2", "--out", "sidecars", "--all"), "--all: goes with --out FILE")
    mistaken(call("caption", run, set_of_images, "--out", "x.txt"), "x.txt: give a name that ends in .csv")


CAPTION = "from diptych.cli import main; main()"
KILLED = ["c.csv", "c.jsonl", "c.parquet", "c.json", "c.tasks.json", "c.images.parquet", "c.tar"]


def killed_at_random(run, folder, out, *, kills: int, count: int, rng) -> int:
    """Repeats the command until it ends, killing it ``kills`` times after random numbers of captions, and once more
    while the file is put together, if that can be met; gives the number of kills.
    """
    command = [sys.executable, "-c", CAPTION, "caption", str(run), str(folder), "--out", str(out), "--beams", "1"]
    partial, fresh = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.fresh")
    met, limits = 0, sorted(rng.integers(1, count, kills).tolist())
    for kill in range(kills + 2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while kill <= kills and process.poll() is None:
            begun = partial.is_file() and kill < kills and partial.read_bytes().count(b"\n") > limits[kill]
            if begun or (kill == kills and fresh.exists()):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        err = process.communicate(timeout=600)[1]
        met += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), err
        if out.is_file():  # a kill after that leaves the file whole, and beside it what it was made from
            break
    assert out.is_file()
    return met


def each_once(out, count: int) -> None:
    """The source that was written has each image once, in order."""
    source = open_source(str(out))
    assert len(source) == count
    levels = [int(source.image(i, 8)[0, 0, 0]) * 256 + int(source.image(i, 8)[0, 0, 1]) for i in range(count)]
    assert levels == list(range(count))
    assert {path.name for path in out.parent.iterdir()} <= {out.name, f".{out.name}.partial"}


def many_images(folder, count: int):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number // 256, number % 256, 0)).save(folder / f"{number:05d}.png")
    return folder


def test_a_command_that_is_killed_ends_with_each_image_once(run, tmp_path):
    folder = many_images(tmp_path / "photos", 300)
    out = tmp_path / "out/c.tar"
    assert killed_at_random(run, folder, out, kills=1, count=200, rng=np.random.default_rng(0)) >= 1
    each_once(out, 300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", KILLED)
def test_five_thousand_images_are_captioned_once_whatever_is_killed(run, tmp_path, name):
    folder = many_images(tmp_path / "photos", 5000)
    out = tmp_path / "out" / name
    assert killed_at_random(run, folder, out, kills=3, count=4900, rng=np.random.default_rng(len(name))) >= 3
    each_once(out, 5000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_thousand_texts_beside_images_survive_kills(run, tmp_path):
    folder = many_images(tmp_path / "photos", 5000)
    command = [sys.executable, "-c", CAPTION, "caption", str(run), str(folder), "--out", "sidecars", "--beams", "1"]
    for limit in sorted(np.random.default_rng(0).integers(1, 4900, 3).tolist()):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(list(folder.glob("*.txt"))) <= limit:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)
    assert {path.stem for path in folder.glob("[!.]*.txt")} == {f"{number:05d}" for number in range(5000)}
    assert all(path.read_text().endswith("\n") for path in folder.glob("[!.]*.txt"))
