import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

TEST = "scenes:?split=test&count=8"


def test_caption(call, run, photo):
    status, out, err = call("caption", run, photo, photo)
    assert (status, err) == (0, "")
    first, second, rest = out.split("\n")
    assert (first, rest) == (second, "")
    status, out, _ = call("caption", run, photo, "--json")
    record = json.loads(out)
    assert (record["file"], record["caption"]) == (str(photo), first)
    assert record["score"] < 0
    status, out, _ = call("caption", run, photo, "--json", "--beams", "1")
    assert json.loads(out)["score"] is None


@pytest.mark.slow
def test_a_caption_in_a_process_of_its_own(run, photo, tmp_path):
    """Nothing but captions on stdout, and nothing on stderr."""
    command = [sys.executable, "-m", "diptych", "caption", str(run), str(photo), "--json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["file"] == str(photo)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_imagine(call, run, tmp_path, mistaken):
    status, out, err = call("imagine", run, "a red circle", "a blue square", "--out", tmp_path / "drawn", "--seed", 3)
    assert (status, err) == (0, "")
    assert str(tmp_path / "drawn/sheet.png") in out
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["000.png", "001.png", "sheet.png"]
    assert read(tmp_path / "drawn/000.png").shape == (32, 32, 3)
    assert (read(tmp_path / "drawn/000.png") != read(tmp_path / "drawn/001.png")).any()
    call("imagine", run, "a red circle", "a blue square", "--out", tmp_path / "again", "--seed", 3)
    np.testing.assert_array_equal(read(tmp_path / "drawn/001.png"), read(tmp_path / "again/001.png"))
    settings = ["--steps", 1, "--guidance", 0.5, "--temperature", 0]
    call("imagine", run, "a red circle", "--out", tmp_path / "other", "--seed", 3, *settings)
    assert (read(tmp_path / "drawn/000.png") != read(tmp_path / "other/000.png")).any()
    mistaken(call("imagine", run, "a", "--out", tmp_path / "none", "--steps", 0), "0 drawing steps")
    assert not (tmp_path / "none").exists()


def test_ten_thousand_characters_are_cut_by_the_tokenizer(call, run, tmp_path):
    status, _, err = call("imagine", run, "a small red circle " * 527, "--out", tmp_path / "drawn")
    assert (status, err) == (0, "")
    assert (tmp_path / "drawn/sheet.png").stat().st_size > 0


def test_cycle(call, run, photo, tmp_path, mistaken):
    status, out, err = call("cycle", run, "--text", "a red circle", "--rounds", 2, "--out", tmp_path / "text")
    assert (status, err) == (0, "")
    assert out.startswith("0: a red circle\n1: ")
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == ["001.png", "003.png", "strip.png"]
    call("cycle", run, "--image", photo, "--rounds", 1, "--out", tmp_path / "image")
    assert sorted(path.name for path in (tmp_path / "image").iterdir()) == ["000.png", "002.png", "strip.png"]
    mistaken(call("cycle", run, "--out", tmp_path / "none"), "give one of them")
    mistaken(call("cycle", run, "--text", "a", "--image", photo, "--out", tmp_path / "none"), "give one of them")
    assert not (tmp_path / "none").exists()


def png_of_zeros(width: int, height: int) -> bytes:
    """One bit a pixel: four hundred million pixels in fifty kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("cut.jpg", jpeg()[:-500], "cut.jpg"),
        ("stub.jpg", jpeg()[:30], "stub.jpg"),
        ("empty.png", b"", "empty (0 bytes)"),
        ("huge.png", png_of_zeros(20_000, 20_000), "20000 x 20000 pixels"),
        ("text.png", b"not an image\n", "not an image"),
        ("two\nlines.png", b"", "two\\nlines.png"),
        ("missing.png", None, "does not exist"),
        ("folder.png", ..., "is not a file"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("g") else "",
)
def test_an_unusable_image(call, run, photo, tmp_path, name, content, told, mistaken):
    file = tmp_path / name
    if content is ...:
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    mistaken(call("caption", run, photo, file), told)
    if name != "two\nlines.png":
        mistaken(call("cycle", run, "--image", file, "--out", tmp_path / "out"), file, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["caption", "imagine", "cycle", "encode", "evaluate"])
def test_a_run_that_is_not_there_or_damaged(call, run, photo, tmp_path, command, mistaken):
    out = tmp_path / "out"

    def arguments(run):
        return {
            "caption": ["caption", run, photo],
            "imagine": ["imagine", run, "a red circle", "--out", out],
            "cycle": ["cycle", run, "--text", "a red circle", "--out", out],
            "encode": ["encode", TEST, "--run", run, "--out", out],
            "evaluate": ["evaluate", run, "--data", TEST, "--out", out],
        }[command]

    mistaken(call(*arguments(tmp_path / "nowhere")), tmp_path / "nowhere")
    for part in ("model", "text_encoder", "tokenizer"):
        if (command, part) != ("encode", "model"):
            (weights,) = (run / part).glob("*.safetensors")
            weights.write_bytes(weights.read_bytes()[:-1000])
            mistaken(call(*arguments(run)), run / part)
    assert not out.exists()
