"""Runs a script in several processes of this machine with the variables that torchrun sets, and imports torch once:

as_torchrun.py PROCESSES SCRIPT ARGUMENTS...

torchrun starts Python anew for itself and for each process. Here one process imports what the script imports, and the
others are copies of it. What torchrun adds, the end of a job of which a process has died, is tested with torchrun.
"""

import os
import runpy
import socket
import sys
from importlib import import_module
from pathlib import Path


def main(processes: int, script: Path, *arguments: str) -> int:
    """0 if each of the processes ended with 0, else 1."""
    sys.path.insert(0, str(script.parent))
    import_module(script.stem)
    import_module("torch._dynamo")  # optimizers import it at their first step
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = [str(script), *arguments]
            runpy.run_path(str(script), run_name="__main__")
            return 0
        children.append(child)
    return int(max(os.waitpid(child, 0)[1] for child in children) > 0)


def command(processes: int, script: Path, *arguments: object) -> list[str]:
    """The command line that does so."""
    return [sys.executable, __file__, str(processes), str(script), *map(str, arguments)]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
