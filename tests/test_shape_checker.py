"""The suite itself: wrong shapes are caught in it, or its green would mean less than it seems to."""

import sys
from importlib import import_module

import jaxtyping
import pytest
import torch

from diptych.data.batch import ImageTokenExamples, LabelledVectorExamples


def test_a_wrong_number_of_axes_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match="tokens_BN"):
        ImageTokenExamples(tokens_BN=torch.zeros(2, 3, 4, dtype=torch.int64))


def test_two_sizes_for_one_axis_are_caught():
    with pytest.raises(jaxtyping.TypeCheckError, match="labels_B"):
        LabelledVectorExamples(vectors_BD=torch.zeros(2, 3), labels_B=torch.zeros(5, dtype=torch.int64))


def test_parameters_are_checked_where_the_result_is_self():
    items = ImageTokenExamples(tokens_BN=torch.zeros(5, 2, dtype=torch.int64))
    assert len(items.to("cpu")) == 5
    with pytest.raises(jaxtyping.TypeCheckError, match="device"):
        items.to(3.5)


def test_the_hook_leaves_the_bytecode_of_other_modules_alone(tmp_path, monkeypatch):
    """Otherwise the first run of the suite compiles torch a second time."""
    (tmp_path / "checked_here.py").write_text("import imported_there\n")
    (tmp_path / "imported_there.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    with jaxtyping.install_import_hook("checked_here", "shape_checker.check"):
        import_module("checked_here")
    files = {path.name.split(".")[0]: "jaxtyping" in path.name for path in (tmp_path / "__pycache__").iterdir()}
    assert files == {"checked_here": True, "imported_there": False}
