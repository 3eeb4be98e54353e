"""A file is whole or not there; weights are told apart and read back."""

import os

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin

from diptych.errors import UserError
from diptych.io import load_network, replace_folder, weights_digest, write_bytes


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


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_folder_that_is_replaced_is_never_lost(killed_at, tmp_path, monkeypatch):
    fresh, target = tmp_path / "fresh", tmp_path / "target"
    for folder in (fresh, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    replace, calls = os.replace, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(fresh, target)
    assert {file.read_text() for file in tmp_path.rglob("name")} == {"fresh", "target"}
    replace_folder(fresh, target)
    assert [(path.name, (path / "name").read_text()) for path in tmp_path.iterdir()] == [("target", "fresh")]


class Net(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))


def test_the_digest_follows_the_weights(tmp_path):
    first, second = Net(), Net()
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.weight[0] += 1e-6
    assert weights_digest(first) != weights_digest(second)


def test_a_network_is_read_back_in_silence_or_refused_in_one_line(tmp_path, capsys):
    Net().save_pretrained(tmp_path / "net")
    assert weights_digest(load_network(Net, tmp_path / "net")) == weights_digest(Net())
    assert capsys.readouterr() == ("", "")
    (tmp_path / "net/model.safetensors").write_bytes(b"cut")
    for folder in (tmp_path / "net", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="the network cannot be read") as error:
            load_network(Net, folder)
        assert "\n" not in str(error.value)
