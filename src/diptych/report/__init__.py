"""Figures, contact sheets, the HTML report and the table of metrics. They know images and numbers, not models."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from diptych.report.scores import meaning_of


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
