"""The runs that a page is made for, the tabs that they give it, and the images that its users send."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from diptych.app.decisions import Labels, Ranking
from diptych.data.sources import open_finite
from diptych.data.sources.columns import Columns
from diptych.data.sources.decode import ImageLimits, decode
from diptych.dual.search import Index
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """All that a page is made for."""

    runs: Sequence[GivenRun]
    indexes: Mapping[str, Index]
    """What Search looks through, by the names of the folders."""
    labels: Labels | None = None
    ranking: Ranking | None = None

    def networks(self, *kinds: Kind) -> dict[str, Any]:
        """The networks of finished runs of some kinds, by the names of the runs."""
        return {run.name: run.network for run in self.runs if run.finished and run.kind in kinds}

    @property
    def tabs(self) -> list[Tab]:
        """The tabs for which there is a run, and data where they need it."""
        itit, dual = bool(self.networks("itit")), bool(self.networks("dual"))
        wanted: dict[Tab, bool] = {
            "Caption": itit,
            "Draw": itit,
            "Cycle": itit,
            "Label": itit and self.labels is not None,
            "Search": bool(self.indexes),
            "Classify": dual or bool(self.networks("classifier")),
            "Audit": (itit or dual) and self.ranking is not None,
            "Train": any((run.folder / "metrics.jsonl").is_file() or not run.finished for run in self.runs),
        }
        return [tab for tab, there in wanted.items() if there]


def open_given(
    folders: Sequence[Path],
    *,
    indexes: Sequence[Path] = (),
    data: str | None = None,
    out: Path | None = None,
    sidecars: bool = False,
    device: Device = "auto",
) -> Given:
    """Open the runs, the indexes of :func:`embed_run`, and the data to label and to audit.

    Decisions on the data go to the folder ``out``. Raises UserError for what cannot be opened, for an index that no run
    has made, and where nothing is left to show.
    """
    runs = open_runs(folders, device=device)
    found = {str(folder): _open_index(folder, runs) for folder in indexes}
    labels = ranking = None
    if data is not None:
        assert out is not None
        source = open_finite(data, Columns())
        labels = Labels(source, file=out / "labels.jsonl", sidecars=sidecars)
        ranking = Ranking(source, out=out) if source.has_captions else None
    given = Given(runs=runs, indexes=found, labels=labels if labels and labels.open else None, ranking=ranking)
    if not given.tabs:
        raise UserError(
            f"{', '.join(map(str, folders))}: nothing a page can show; give runs of itit, dual or uml recipes, and "
            "--index for the search of dual runs"
        )
    return given


def _open_index(folder: Path, runs: Sequence[GivenRun]) -> Index:
    refused = f"{folder}: an index is searched with the run that made it: give a dual run too"
    for run in runs:
        if run.finished and run.kind == "dual":
            try:
                return Index(run.folder, folder, encoder=run.network)
            except UserError as error:
                refused = str(error)
    raise UserError(refused)


def read_images(files: Sequence[str] | None, size: int) -> list[UInt8[np.ndarray, "S S 3"]]:
    """Images that a user sent, as a network sees them.

    Raises UserError, one line, where there are none or too many, and for one that cannot be read.
    """
    if not files:
        raise UserError("no image: drop one, or choose a file")
    if len(files) > AT_ONCE:
        raise UserError(f"{len(files)} images: at most {AT_ONCE} at once; `diptych caption` takes whole folders")
    return [decode(Path(file), size, name=os.path.basename(file), limits=LIMITS) for file in files]
