"""Trains a run of test_training.py in the processes of as_torchrun.py: run_itit.py OUT TOKENIZERS."""

import sys
from pathlib import Path

from test_training import tiny_run_without_dropout

if __name__ == "__main__":
    tiny_run_without_dropout(sys.argv[2]).fit(Path(sys.argv[1]), recipe="itit-tiny")
