import sys

import numpy as np
import pytest
from PIL import Image

from diptych import cli


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """As in a process that `main` has started: it switches the progress bars off before the libraries are imported."""
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", False)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line in this process; gives status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diptych", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = stopped.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def run(save_itit_run, tmp_path):
    return save_itit_run(tmp_path / "run", steps=2)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def mistaken():
    """Checks for status 2, nothing on stdout and one line on stderr, with these parts."""

    def check(found: tuple[int, str, str], *parts: object) -> None:
        status, out, err = found
        assert (status, out) == (2, "")
        assert err.startswith("diptych: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        for part in parts:
            assert str(part) in err

    return check


@pytest.fixture
def set_of_images(photo, tmp_path):
    """40 images, of which two are captioned and one cannot be read."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.png").write_bytes(photo.read_bytes() if i != 5 else b"no image")
    (folder / "03.txt").write_text("my own caption\n")
    (folder / "07.txt").write_text("another of mine\n")
    return folder
