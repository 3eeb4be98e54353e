"""The runs that a page is made for, the tabs that they give it, and the images that its users send."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from diptych.data.sources.decode import ImageLimits, decode
from diptych.errors import UserError
from diptych.nn.inference import Device
from diptych.run_folder import PARTS, Kind, kind_of

Tab = Literal["Caption", "Draw", "Cycle", "Label", "Search", "Classify", "Audit", "Train"]
LIMITS = ImageLimits(max_pixels=50_000_000)
"""Of images that users send: fewer pixels than of a source, as several are decoded at once."""
AT_ONCE = 64
"""Largest number of images in one request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenRun:
    """A run folder, finished or not."""

    folder: Path
    kind: Kind
    finished: bool
    network: Any = None
    """:class:`Diptych`, :class:`DualEncoder` or :class:`Classifier` of a finished run of these kinds."""

    @property
    def name(self) -> str:
        """What the page calls it."""
        return str(self.folder)


def open_runs(folders: Sequence[Path], *, device: Device) -> list[GivenRun]:
    """All runs with their networks. Raises UserError for a folder that is no run, and for a damaged one."""
    found = []
    for folder in dict.fromkeys(folders):
        kind = kind_of(folder)
        finished = all((folder / part).is_dir() for part in PARTS[kind])
        network = _open(folder, kind, device) if finished else None
        found.append(GivenRun(folder=folder, kind=kind, finished=finished, network=network))
    return found


def _open(folder: Path, kind: Kind, device: Device) -> Any:
    if kind == "itit":
        from diptych.itit.pipeline import Diptych

        return Diptych.from_pretrained(folder, device=device)
    if kind == "dual":
        from diptych.dual.model import open_dual

        return open_dual(folder, device=device)
    if kind == "classifier":
        from diptych.uml.classifier import Classifier

        return Classifier.from_pretrained(folder, device=device)
    return None


def networks(runs: Sequence[GivenRun], *kinds: Kind) -> dict[str, Any]:
    """The networks of finished runs of some kinds, by the names of the runs."""
    return {run.name: run.network for run in runs if run.finished and run.kind in kinds}


def tabs_of(runs: Sequence[GivenRun]) -> list[Tab]:
    """The tabs for which there is a run."""
    tabs: list[Tab] = []
    if networks(runs, "itit"):
        tabs += ["Caption"]
    return tabs


def read_images(files: Sequence[str] | None, size: int) -> list[UInt8[np.ndarray, "S S 3"]]:
    """Images that a user sent, as a network sees them.

    Raises UserError, one line, where there are none or too many, and for one that cannot be read.
    """
    if not files:
        raise UserError("no image: drop one, or choose a file")
    if len(files) > AT_ONCE:
        raise UserError(f"{len(files)} images: at most {AT_ONCE} at once; `diptych caption` takes whole folders")
    return [decode(Path(file), size, name=os.path.basename(file), limits=LIMITS) for file in files]
