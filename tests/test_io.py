"""A file is whole or not there."""

import os

import pytest

from diptych.io import write_bytes


def test_makes_the_folder_and_replaces(tmp_path):
    path = write_bytes(tmp_path / "new" / "file.bin", b"first")
    assert write_bytes(path, b"second").read_bytes() == b"second"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "file.bin", b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
