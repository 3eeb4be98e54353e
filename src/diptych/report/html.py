"""The HTML report: one file, which fetches nothing when it is opened; and the report of a run of any recipe.

A report is sections, a section is blocks, and a block is a small dataclass that renders its own HTML. All text is
escaped, and images are data URIs.

``report.html`` of a run has samples, curves, validation scores and settings. It is made from the files of the run
folder, so it can be written while the run trains and after the run was interrupted.
"""

import base64
import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diptych.io import write_bytes
from diptych.report.figures import Panel, Record, curves, read_metrics
from diptych.report.terminal import HEADLINES, meaning_of
from diptych.run_folder import BASELINES, Kind, read_config

TINY = 128
"""Largest side in pixels of an image that is stored without loss and shown with sharp pixels."""
MAX_SIDE = 512
"""Side in pixels to which larger images are shrunk, so that a report can be sent by mail."""
LIGHT = "color: #1d2129; --rule: #dfe3e8"
DARK = "color: #e4e7ec; --rule: #323843"
Value = str | int | float | None
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


@runtime_checkable
class ReportBlock(Protocol):
    """A part of a section."""

    def render(self) -> str:
        """Its HTML."""


# The report

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<svg class="mark" viewBox="0 0 26 18" aria-hidden="true"><path d="M1 3.5 12.2 1v16L1 14.5Z" fill="currentColor"/>\
<path d="M25 3.5 13.8 1v16L25 14.5Z" fill="currentColor" opacity=".45"/></svg>
<h1>$heading</h1>
$lead
$links
</header>
<main>
$body
</main>
$footer
</body>
</html>
""")


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, which the top of the page links to, and the blocks under it."""

    title: str
    blocks: Sequence[ReportBlock]

    def render(self, anchor: str) -> str:
        """Its HTML, with ``anchor`` as its id."""
        body = "\n".join(block.render() for block in self.blocks)
        return f'<section id="{anchor}">\n<h2>{inline(self.title)}</h2>\n{body}\n</section>'


def write_report(
    path: str | os.PathLike[str], sections: Sequence[Section], *, title: str, lead: str = "", footer: str = ""
) -> Path:
    """Writes the report to ``path``. The file appears whole or not at all."""
    anchors = {f"section-{number}": section for number, section in enumerate(sections, start=1)}
    links = "\n".join(f'<a href="#{anchor}">{inline(section.title)}</a>' for anchor, section in anchors.items())
    page = PAGE.substitute(
        title=html.escape(title),
        style=(files("diptych.report") / "style.css").read_text(encoding="utf-8"),
        heading=inline(title),
        lead=f'<p class="lead">{inline(lead)}</p>' if lead else "",
        links=f"<nav>{links}</nav>" if len(sections) > 2 else "",
        body="\n".join(section.render(anchor) for anchor, section in anchors.items()),
        footer=f"<footer>{inline(footer)}</footer>" if footer else "",
    )
    return write_bytes(path, page.encode())


# The blocks


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs, separated by empty lines. A note stands out; code keeps its lines."""

    text: str
    kind: Literal["plain", "note", "code"] = "plain"

    def render(self) -> str:
        if self.kind == "code":
            return f"<pre>{html.escape(self.text.strip())}</pre>"
        return f'<div class="{self.kind}">{paragraphs(self.text)}</div>'


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTable:
    """The first cell of a row names it. Columns of numbers are aligned to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[Value]]
    caption: str = ""
    digits: int | Mapping[str, int] = 3
    """Number of decimals: of every column, or of each by its head; 3 for columns not named."""
    best: Mapping[str, Literal["high", "low"]] | None = None
    """Columns whose best value stands out, by their head, and whether high or low is best."""

    def render(self) -> str:
        if any(len(row) != len(self.head) for row in self.rows):
            raise ValueError(f"every row must have {len(self.head)} cells like the head {list(self.head)}")
        numeric = [_is_numeric([row[column] for row in self.rows]) for column in range(len(self.head))]
        kinds = [' class="number"' if is_numeric else "" for is_numeric in numeric]
        head = "".join(f'<th scope="col"{k}>{inline(name)}</th>' for name, k in zip(self.head, kinds, strict=True))
        best = [self._best(column) for column in range(len(self.head))]
        rows = [
            "".join(self._cell(value, column, numeric[column], best[column]) for column, value in enumerate(row))
            for row in self.rows
        ]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        caption = f"<figcaption>{inline(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure><div class="scroll">{table}</div>{caption}</figure>'

    def _best(self, column: int) -> float | None:
        values = [row[column] for row in self.rows]
        numbers = [value for value in values if isinstance(value, (int, float)) and value == value]
        direction = (self.best or {}).get(self.head[column])
        if direction is None or len(numbers) < 2:
            return None
        return max(numbers) if direction == "high" else min(numbers)

    def _cell(self, value: Value, column: int, numeric: bool, best: float | None) -> str:
        digits = self.digits if isinstance(self.digits, int) else self.digits.get(self.head[column], 3)
        text = inline(_format(value, digits))
        if column == 0:
            return f'<th scope="row">{text}</th>'
        if best is not None and value == best:
            return f'<td class="number best"><b>{text}</b></td>'
        return f'<td class="number">{text}</td>' if numeric else f"<td>{text}</td>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names and values: a plain list, or large figures for the few most important numbers."""

    items: Mapping[str, Value]
    size: Literal["list", "large"] = "list"
    digits: int = 3

    def render(self) -> str:
        rows = [f"<dt>{inline(k)}</dt><dd>{inline(_format(v, self.digits))}</dd>" for k, v in self.items.items()]
        if self.size == "large":
            rows = [f"<div>{row}</div>" for row in rows]
        return f'<dl class="{self.size}">{"".join(rows)}</dl>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """An image with a caption, and a label such as the model it is from. The image may be missing."""

    image: UInt8[np.ndarray, "H W 3"] | None = None
    caption: str = ""
    label: str = ""

    def render(self) -> str:
        label = f"<b>{inline(self.label)}</b>" if self.label else ""
        if self.image is None:
            return f'<figure><p class="card">{inline(self.caption)}</p><figcaption>{label}</figcaption></figure>'
        words = f"<figcaption>{label}{inline(self.caption)}</figcaption>" if label or self.caption else ""
        return f"<figure>{image_tag(self.image, alt=self.caption or self.label)}{words}</figure>"


@dataclass(frozen=True, slots=True)
class Example:
    """A heading, such as a text, and under it the true image and those that the models generated from it."""

    heading: str
    items: Sequence[Captioned]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Cards that show the results of several models for the same text or image, side by side."""

    examples: Sequence[Example]

    def render(self) -> str:
        cards = [
            f'<article><h3>{inline(example.heading)}</h3><div class="side">{_rendered(example.items)}</div></article>'
            for example in self.examples
        ]
        return f'<div class="comparison">{"".join(cards)}</div>'


@dataclass(frozen=True, slots=True)
class Strip:
    """A cycle: text -> image -> text -> ..."""

    steps: Sequence[str | UInt8[np.ndarray, "H W 3"]]

    def render(self) -> str:
        shown = [f'<p class="card">{inline(s)}</p>' if isinstance(s, str) else image_tag(s, alt="") for s in self.steps]
        return f'<ol class="strip">{"".join(f"<li>{step}</li>" for step in shown)}</ol>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Curves (SVG, from ``report.figures``) or sheets (PNG), side by side where there is room, with one caption."""

    images: Sequence[bytes]
    caption: str = ""

    def render(self) -> str:
        images = "".join(figure_tag(image, alt=self.caption) for image in self.images)
        caption = f"<figcaption>{inline(self.caption)}</figcaption>" if self.caption else ""
        return f'<figure><div class="figures">{images}</div>{caption}</figure>'


def _rendered(blocks: Sequence[ReportBlock]) -> str:
    return "".join(block.render() for block in blocks)


def _is_numeric(values: Sequence[Value]) -> bool:
    """Whether a column holds numbers alone, missing values apart."""
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, (int, float)) for value in present)


def _format(value: Value, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.{digits}f}".replace(",", "\u202f")  # a separator of thousands in every language
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else value


# HTML in small pieces


def inline(text: str) -> str:
    """Escaped text, in which `backticks` mark code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def paragraphs(text: str) -> str:
    """Escaped paragraphs of a text, in which empty lines separate them."""
    return "".join(f"<p>{inline(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()))


def image_tag(pixels: UInt8[np.ndarray, "H W 3"], *, alt: str) -> str:
    """An `<img>` that holds the image, as wide as its place."""
    image = Image.fromarray(pixels)
    size = "tiny" if max(image.size) <= TINY else "large"
    buffer = io.BytesIO()
    if size == "tiny":
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    source = data_uri("image/png" if size == "tiny" else "image/jpeg", buffer.getvalue())
    shape = f'width="{image.width}" height="{image.height}"'
    return f'<div class="image {size}"><img src="{source}" {shape} alt="{html.escape(alt)}"></div>'


def figure_tag(data: bytes, *, alt: str) -> str:
    """An `<img>` that holds a finished SVG or PNG. Scripts in an SVG do not run inside an `<img>`."""
    kind, data = ("image/svg+xml", dark_ready(data)) if data.lstrip()[:1] == b"<" else ("image/png", data)
    return f'<img src="{data_uri(kind, data)}" alt="{html.escape(alt)}">'


def data_uri(kind: str, data: bytes) -> str:
    """A data URI of the MIME type ``kind``."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def dark_ready(svg: bytes) -> bytes:
    """Sets the colours `currentColor` and `var(--rule)` of an SVG, for light and for dark pages."""
    style = f"<style>svg {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ svg {{ {DARK} }} }}</style>"
    head, tag, rest = svg.partition(b"<svg")
    opening, end, body = rest.partition(b">")
    return head + tag + opening + end + style.encode() + body


# The report of a run


def write_run_report(run: Path, *, samples: Sequence[Section] = (), state: str = "") -> Path:
    """Write ``run/report.html``. Without ``samples``, the newest sheets in ``run/samples`` are shown.

    The report begins with a comparison of the run with its baselines; ``state`` follows, which says how far the run is.
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
        blocks.append(ReportTable(head=["", *found["head"]], rows=found["rows"], best=best))  # type: ignore[arg-type]
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
        return f"best after step {step:,}, {score_line(scored[-1], best=select)} on {source}"
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    return f"loss {losses[-1]:.3g}, nothing was scored" if losses else ""


def validation_scores(run: Path, step: int) -> dict[str, float]:
    """The scores of the validation after ``step`` steps, by their names without `valid/`."""
    records = [each for each in read_metrics(run / "metrics.jsonl") if each.get("step") == step and "loss" not in each]
    return {n.removeprefix("valid/"): value for n, value in records[-1].items() if n.startswith("valid/")}


def score_line(numbers: Mapping[str, Any], *, best: str = "") -> str:
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
