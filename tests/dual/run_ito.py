"""Trains a run of test_training.py in processes that torchrun starts: run_ito.py OUT."""

import sys
from pathlib import Path

from test_training import small_run

if __name__ == "__main__":
    small_run().fit(Path(sys.argv[1]), recipe="ito-tiny")
