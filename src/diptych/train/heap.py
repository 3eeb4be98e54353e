"""How a process that trains on a CPU holds memory."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the numbers of glibc's malloc.h
_GIGABYTE = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep what a step frees for the next step, and say whether it does; other C libraries are left alone.

    By default each tensor of more than a few megabytes goes back to the system when it is freed, and the next one comes
    as pages that must be faulted in and zeroed: a twentieth of a step's time. Blocks of a gigabyte still go back.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, _GIGABYTE) and libc.mallopt(_TRIM_THRESHOLD, 2 * _GIGABYTE - 1))
