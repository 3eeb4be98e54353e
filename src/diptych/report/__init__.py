"""Figures, contact sheets, the HTML report and the table of metrics. They know images and numbers, not models."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from diptych.report.scores import HEADLINES, meaning_of

_COLUMNS = 4
"""Number of scores beside one another in a table of baselines, which has to fit into a terminal."""


def print_metrics(metrics: Mapping[str, float], *, title: str, notes: Sequence[str] = ()) -> None:
    """Prints a table on stdout, with the direction in which each is better, under a title and above the notes."""
    table = Table("metric", "value", "better", "")
    for name, value in metrics.items():
        meaning = meaning_of(name)
        table.add_row(name, meaning.written(value), meaning.better, meaning.scale)
    console = Console(highlight=False)
    console.print(title, style="bold", markup=False, soft_wrap=True)  # over a narrow table a path would be broken
    console.print(table)
    for note in notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)


def print_comparison(
    head: Sequence[str], rows: Sequence[Sequence[str | float | None]], *, title: str, notes: Sequence[str]
) -> None:
    """Prints a run beside its baselines on stdout, above the notes: the headline scores, the first one always.

    ``head`` names the scores. A row is a name and a value for each score.
    """
    console = Console(highlight=False)
    if rows:
        console.print(title, style="bold", markup=False, soft_wrap=True)
    shown = [place for place, name in enumerate(head) if place == 0 or name in HEADLINES][:_COLUMNS]
    if rows:
        table = Table("", *(head[place] for place in shown))
        for name, *values in rows:
            cells = [(head[place], values[place]) for place in shown]
            table.add_row(str(name), *("" if v is None else meaning_of(n).written(float(v)) for n, v in cells))
        console.print(table)
    for note in filter(None, notes):
        console.print(note, markup=False, soft_wrap=True)
