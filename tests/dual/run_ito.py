"""Trains a run of test_training.py in the processes of as_torchrun.py: run_ito.py OUT."""

import sys
from pathlib import Path

from test_training import small_run

if __name__ == "__main__":
    small_run().fit(Path(sys.argv[1]), recipe="ito-tiny")
