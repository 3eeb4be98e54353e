import platform
import subprocess
import sys

import pytest

from diptych.train.heap import keep_freed_memory

ALLOCATES = """
import ctypes, resource, sys
import torch
from diptych.train.heap import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_freed_memory_is_used_again_without_page_faults():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", ALLOCATES, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert keep_freed_memory()
    assert faults("keep") < 100 < 1000 < faults("leave")


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
