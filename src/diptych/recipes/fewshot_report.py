"""What a few-shot grid found, as a table, a figure and plain sentences."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from diptych.eval.controls import COMPARISONS, CONTROLS, Outcome, gain, spread, table
from diptych.report.figures import Panel, curves


def show(outcomes: Sequence[Outcome], *, title: str) -> None:
    """The table with all controls, and what each comparison comes to."""
    from rich.console import Console
    from rich.table import Table

    head, *rows = table(outcomes)
    print(f"{title}: test accuracy, %, mean ± standard deviation over seeds")
    shown = Table(*head)
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)
    for better, worse in COMPARISONS:
        print(gain(outcomes, better, worse))


def accuracy_figure(outcomes: Sequence[Outcome], *, title: str) -> bytes:
    """Accuracy against shots, a line for each control, as SVG."""
    every = sorted({each.shots for each in outcomes})
    runs = {
        control: [{"shots": shots, "accuracy": 100 * spread(outcomes, control, shots)[0]} for shots in every]
        for control in CONTROLS
    }
    return curves(runs, panels=[Panel(title=title, keys=["accuracy"], label="test accuracy, %")], over="shots")[0]


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All single numbers, and the gains for each number of shots and over all."""
    every = sorted({each.shots for each in outcomes})
    gains = []
    for better, worse in COMPARISONS:
        gains.append(asdict(gain(outcomes, better, worse)) | {"shots": "all"})
        gains += [asdict(gain(outcomes, better, worse, shots=shots)) | {"shots": shots} for shots in every]
    return {"outcomes": [asdict(each) for each in outcomes], "gains": gains}
