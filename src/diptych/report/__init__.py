"""Figures, contact sheets, the HTML report and the table of metrics. They know images and numbers, not models."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table


def print_metrics(metrics: Mapping[str, float], *, title: str, notes: Sequence[str] = ()) -> None:
    """Prints a table on stdout, under a title and with a line for each note."""
    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    console = Console(highlight=False)
    console.print(title, style="bold", markup=False, soft_wrap=True)  # over a narrow table a path would be broken
    console.print(table)
    for note in notes:
        console.print(f"Note: {note}", markup=False, soft_wrap=True)
