"""What `import diptych` offers, and that it does not make anybody wait."""

import subprocess
import sys

import pytest

import diptych


def test_importing_diptych_imports_no_torch():
    code = (
        "import sys, diptych, diptych.io, diptych.run_folder\n"
        "print(dir(diptych), {'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.endswith("set()\n")
    assert "'Diptych'" in found.stdout


def test_a_pipeline_for_each_learner():
    assert diptych.__all__ == ["Classifier", "Diptych", "DualEncoder"]
    for name in diptych.__all__:
        assert getattr(diptych, name).__name__ == name
        assert callable(getattr(diptych, name).from_pretrained)


def test_another_name_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Triptych'"):
        _ = diptych.Triptych
