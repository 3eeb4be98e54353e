"""``report.html`` of a run of any recipe: samples, curves, validation scores and settings.

It is made from the files of the run folder, so it can be written while the run trains and after it was interrupted.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.report.figures import Panel, Record, curves, read_metrics
from diptych.report.html import Facts, Figures, Section, Table, Text, write_report
from diptych.report.terminal import HEADLINES, meaning_of
from diptych.run_folder import BASELINES, Kind, read_config

_NO_CURVE = frozenset({"step", "epoch", "seconds", "evaluation_seconds", "lr", "skipped"})
_SHEETS = 2
"""Number of the newest sheets of samples that are shown."""
_NEXT: dict[Kind, str] = {
    "itit": "diptych evaluate {out} --data TEST",
    "dual": "diptych evaluate {out} --data TEST",
    "classifier": "diptych evaluate {out} --data TEST",
    "tokenizer": "diptych evaluate {out} --data TEST",
    "text encoder": "diptych fit itit-small --text-encoder {out} --data.pairs PAIRS --out RUN",
    "feature encoder": "diptych embed {out} STORE --out EMBEDDINGS",
}
"""What is done next with a finished run."""


def write_run_report(run: Path, *, samples: Sequence[Section] = (), state: str = "") -> Path:
    """Write ``run/report.html``. Without ``samples``, the newest sheets in ``run/samples`` are shown.

    ``state`` says in the first line how far the run is. Before it stands how the run does beside its baselines.
    """
    config = read_config(run)
    recipe = str(config.get("recipe", run.name))
    sections = run_sections(run, samples=samples)
    facts = {"recipe": recipe, **{f"{name} version": value for name, value in config["versions"].items()}}
    sections.append(Section("Settings", [Facts(items=facts), Text(_listed(config["run"]), kind="code")]))
    verdict, beside = _beside(run)
    sections = beside + sections
    lead = f"{run.name}: {' '.join(filter(None, (verdict, state)))}" if verdict or state else run.name
    return write_report(run / "report.html", sections, title=f"Diptych: {recipe}", lead=lead)


def run_sections(run: Path, *, samples: Sequence[Section] = ()) -> list[Section]:
    """The samples and the curves that a run folder holds so far. Without ``samples``, the newest of its sheets."""
    recipe = str(read_config(run).get("recipe", run.name))
    sections = [*(samples or _sheets(run)), *_curves(recipe, read_metrics(run / "metrics.jsonl"))]
    for stage in sorted((run / "stages").glob("*/metrics.jsonl")):
        name = stage.parent.name.replace("_", " ")
        sections += [Section(f"Stage: {name}", section.blocks) for section in _curves(name, read_metrics(stage))]
    return sections


def _beside(run: Path) -> tuple[str, list[Section]]:
    """The verdict on a run beside its baselines, and a table of them; nothing where there are none."""
    if not (run / BASELINES).is_file():
        return "", []
    found = json.loads((run / BASELINES).read_text())
    about = f"All on the same images of {found['source']}, scored by the same code."
    blocks: list[Any] = [Text(" ".join([about, *found["notes"]]))]
    if found["rows"]:
        best = {name: "high" if meaning_of(name).better == "higher" else "low" for name in found["head"]}
        blocks.append(Table(head=["", *found["head"]], rows=found["rows"], best=best))  # type: ignore[arg-type]
    return found["verdict"], [Section("Beside its baselines", blocks)]


def closing_line(run: Path, kind: Kind, *, score: str) -> str:
    """The last line of a finished run: its score, its report and the next command."""
    parts = [score, f"report: {run / 'report.html'}", f"next: {_NEXT[kind].format(out=run)}"]
    return f"{run}: " + "; ".join(part for part in parts if part)


def outcome(run: Path, *, step: int | None = None, select: str = "", source: str | None = None) -> str:
    """The result of a finished run in words: the scores after the selected ``step`` on ``source``, or the last loss."""
    records = read_metrics(run / "metrics.jsonl")
    scored = [record for record in records if record.get("step") == step and "loss" not in record]
    if scored:
        return f"best after step {step:,}, {told(scored[-1], best=select)} on {source}"
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    return f"loss {losses[-1]:.3g}, nothing was scored" if losses else ""


def validation_scores(run: Path, step: int) -> dict[str, float]:
    """The scores of the validation after ``step`` steps, by their names without `valid/`."""
    records = [each for each in read_metrics(run / "metrics.jsonl") if each.get("step") == step and "loss" not in each]
    return {n.removeprefix("valid/"): value for n, value in records[-1].items() if n.startswith("valid/")}


def told(numbers: Mapping[str, Any], *, best: str = "") -> str:
    """The scores of a validation in one line, those of headline first; ``best`` is the name that selects weights."""
    scores = {name.removeprefix("valid/"): value for name, value in numbers.items() if name.startswith("valid/")}
    chosen = [name for name in (best, *HEADLINES) if name in scores]
    return ", ".join(f"{name} {meaning_of(name).written(scores[name])}" for name in dict.fromkeys(chosen))


def _sheets(run: Path) -> list[Section]:
    """The newest sheets of samples."""
    files = sorted((run / "samples").glob("*.png"))[-_SHEETS:]
    if not files:
        return []
    steps = ", ".join(_name_of(file) for file in files)
    return [
        Section("Samples", [Text(f"The newest samples: {steps}."), Figures(images=[f.read_bytes() for f in files])])
    ]


def _name_of(sheet: Path) -> str:
    """`step-00000200` as `step 200`."""
    first, _, number = sheet.stem.partition("-")
    return f"{first} {int(number):,}" if number.isdigit() else sheet.stem


def _curves(name: str, records: Sequence[Record]) -> list[Section]:
    """Training and validation curves of everything that was logged."""
    keys = list(dict.fromkeys(key for record in records for key in record if key not in _NO_CURVE))
    losses = [key for key in keys if key == "loss" or key.startswith("loss/")]
    measures = [key for key in keys if key.startswith("measure/")]
    scores = sorted(key for key in keys if key not in [*losses, *measures, "grad_norm"])
    sections = []
    if losses:
        panels = [Panel(title=key.removeprefix("loss/"), keys=[key]) for key in [*losses, "grad_norm"]]
        panels += [_score_panel(key) for key in measures]
        sections.append(Section("Curves", [Figures(images=curves({name: records}, panels=panels, smooth=0.95))]))
    if scores:
        panels = [_score_panel(key) for key in scores]
        sections.append(Section("Validation", [Figures(images=curves({name: records}, panels=panels))]))
    return sections


def _score_panel(key: str) -> Panel:
    better = meaning_of(key).better
    return Panel(
        title=key.removeprefix("valid/").removeprefix("measure/"),
        keys=[key],
        label=f"{better} is better" if better else "",
    )


def _listed(fields: Mapping[str, Any], prefix: str = "") -> str:
    """One line for each field, nested ones with a dotted name."""
    lines = []
    for name, value in fields.items():
        lines.append(_listed(value, f"{prefix}{name}.") if isinstance(value, Mapping) else f"{prefix}{name} = {value}")
    return "\n".join(lines)
