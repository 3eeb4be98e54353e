"""Arguments that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

Device = Literal["auto", "cpu", "cuda", "mps"]
"""As in nn/inference.py, which would import torch."""
Run = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
Images = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")]
