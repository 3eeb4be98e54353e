"""Figures as SVG: curves of ``metrics.jsonl`` and of other records, and reliability diagrams.

The ink of the SVG is ``currentColor`` and its rules are ``var(--rule)``, so that a page can set both for a dark
background. A viewer that knows neither shows black ink and grey rules.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE = "#1d2129", "#dfe3e8"  # replaced in the finished SVG
SERIES = ("#3b7be0", "#e0722b", "#1f9d76", "#b04fc4", "#c2983a", "#d1495b")
"""Colours that differ for any colour vision, and are legible on white and on near-black."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a dollar or an underscore in a name is just that
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "diptych",  # the same curves give the same bytes
}

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One small figure with a curve for each of some keys of the records."""

    title: str
    keys: Sequence[str]
    """Keys of the records to plot. A key that no run has is left out."""
    label: str = ""
    """Label of the y axis."""


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a ``metrics.jsonl``, none if there is no file. Lines that were cut short are left out."""
    path = Path(path)
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def curves(
    runs: Mapping[str, Sequence[Record]], *, panels: Sequence[Panel], over: str = "step", smooth: float = 0.0
) -> list[bytes]:
    """One SVG per panel with all runs in it, ``over`` ("step", "seconds") along the x axis.

    ``smooth`` in [0, 1) is the weight of the past in a running mean; the raw values stay behind it, faint. Panels for
    which no run has a number are left out. Colours tell runs apart, or keys where there is only one run.
    """
    shown = [panel for panel in panels if any(points(run, key, over)[0] for run in runs.values() for key in panel.keys)]
    return [one_figure(runs, panels=[panel], over=over, smooth=smooth) for panel in shown]


def one_figure(
    runs: Mapping[str, Sequence[Record]], *, panels: Sequence[Panel], over: str, smooth: float = 0.0
) -> bytes:
    """One SVG with all panels, two side by side; otherwise as :func:`curves`."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        # No pyplot: nothing global to leak.
        figure = Figure(figsize=(4.8 * columns, 2.8 * rows))
        for place, panel in enumerate(panels, start=1):
            _draw(figure.add_subplot(rows, columns, place), panel, runs, over=over, smooth=smooth)
        return _written(figure)


def reliability_figure(bins: Sequence[tuple[float, float, float, int]], *, title: str, label: str) -> bytes:
    """An SVG of predictions from 0 to 1 against what was found, for bins of (predicted, found, error, count).

    Bars span two standard errors (``error``) both ways.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    predicted, found, errors, counts = zip(*bins, strict=True)
    spread = [2 * error for error in errors]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 4.2))
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1.2)
        axes.errorbar(predicted, found, yerr=spread, fmt="o", color=SERIES[0], markersize=4, linewidth=1.2)
        for x, y, up, count in zip(predicted, found, spread, counts, strict=True):
            axes.annotate(f"{count}", (x, y + up), (0, 2), textcoords="offset points", ha="center", fontsize=7)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel=label, title=title)
        axes.tick_params(length=0)
        return _written(figure)


def points(records: Sequence[Record], key: str, over: str) -> tuple[list[float], list[float]]:
    """x and y of the records that have a finite number for both ``over`` and ``key``."""
    pairs: list[tuple[Any, Any]] = [(record.get(over), record.get(key)) for record in records]
    finite = [(float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y)]
    return [x for x, _ in finite], [y for _, y in finite]


def running_mean(values: Sequence[float], weight: float) -> list[float]:
    """Exponential running mean without a bias to its start: y_n = sum_k w^(n-k) v_k / sum_k w^(n-k)."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1.0
        means.append(total / mass)
    return means


def _draw(axes: "Axes", panel: Panel, runs: Mapping[str, Sequence[Record]], *, over: str, smooth: float) -> None:
    lines = [(name, key, *points(run, key, over)) for name, run in runs.items() for key in panel.keys]
    by_run = len(runs) > 1
    for name, key, x, y in lines:
        if not x:
            continue
        colour = SERIES[(list(runs).index(name) if by_run else list(panel.keys).index(key)) % len(SERIES)]
        dash = "-" if not by_run else ("-", (0, (4, 2)), (0, (1, 1.5)))[list(panel.keys).index(key) % 3]
        parts = [name] * by_run + [key.removeprefix("loss/").removeprefix("measure/")] * (
            len(panel.keys) > 1 or not by_run
        )
        marker = "o" if len(x) < 25 else None  # a single measurement must be visible too
        if smooth and marker is None:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.25)
            y = running_mean(y, smooth)
        axes.plot(
            x, y, color=colour, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.5, label=", ".join(parts)
        )
    axes.set_title(panel.title)
    axes.set_xlabel(over.replace("_", " "))
    axes.set_ylabel(panel.label)
    axes.tick_params(length=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_formatter(_short)
    axes.locator_params(axis="x", nbins=6)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8.5)


def _short(value: float, _: float) -> str:
    """10000 -> 10k, as long step counts would overlap."""
    if abs(value) >= 1_000_000:
        return f"{value / 1_000_000:g}M"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _written(figure: "Figure") -> bytes:
    """``figure`` as an SVG, with margins as wide as its labels need.

    A layout engine that the figure keeps would draw everything once more, and a constrained one measure it twice.
    """
    from matplotlib.layout_engine import TightLayoutEngine

    TightLayoutEngine(pad=0.4).execute(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue())


def _themed(svg: bytes) -> bytes:
    return svg.replace(INK.encode(), b"currentColor").replace(RULE.encode(), f"var(--rule, {RULE})".encode())
