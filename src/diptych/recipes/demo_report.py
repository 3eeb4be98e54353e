"""The report of `diptych demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.eval.generation import Evaluation
from diptych.pipeline import Diptych
from diptych.report.blocks import Captioned, Comparison, Example, Facts, Figures, Strip, Table, Text
from diptych.report.figures import Panel, curves, read_metrics
from diptych.report.html import Section, write_report

_SHOWN = 12
_ATTRIBUTES = ("shape", "colour", "size", "place", "background")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A trained network and what it did on the held-out scenes."""

    name: str
    """Of its run folder."""
    title: str
    metrics: dict[str, Any]
    evaluation: Evaluation
    diptych: Diptych


def write_demo_report(
    out: Path, contenders: list[Contender], *, metrics: dict[str, Any], pairs: int, unpaired: int
) -> Path:
    """``out/report.html``."""
    both = [contender for contender in contenders if contender.name in ("paired_only", "itit")]
    sections = [
        Section("What was learned", _learned(contenders, metrics)),
        Section("Captions", [Text("Scenes whose combination of shape, colour and place no network has seen, and what "
                                  "each wrote about them."), _captions(both)]),
        Section("Pictures", [Text("Drawn for the captions of such scenes."), _pictures(both)]),
        Section("Cycles", [block for contender in both for block in _cycle(contender)]),
        Section("Curves", _curves(out, contenders)),
    ]  # fmt: skip
    lead = (
        f"Two networks with the same initial weights, both given {pairs} captioned pictures. One also got {unpaired:,} "
        f"bare pictures and {unpaired:,} loose texts, and learned from them by cycle consistency."
    )
    return write_report(out / "report.html", sections, title="Diptych: demo", lead=lead)


def _learned(contenders: list[Contender], metrics: dict[str, Any]) -> list[Any]:
    head = ["", "captions exact", "pictures exact", "CIDEr", "distinct captions", "steps", "seconds"]
    keys = ("caption_accuracy", "image_accuracy", "cider", "distinct_captions", "steps", "seconds")
    rows = [[c.title, *(c.metrics[key] for key in keys)] for c in contenders]
    parts = [
        [f"{c.title}, {side}", *(c.metrics[f"{kind}_{name}"] for name in _ATTRIBUTES)]
        for c in contenders
        for side, kind in (("captions", "caption"), ("pictures", "image"))
    ]
    digits = {"CIDEr": 0, "steps": 0, "seconds": 0}
    scored = contenders[0].metrics["images"]
    return [
        Table(head=head, rows=rows, digits=digits, best=dict.fromkeys(head[1:4], "high"), caption=(
            f"On {scored:,} held-out scenes. Exact: all five attributes right, as read back by a parser and "
            "by a recogniser that learns nothing.")),
        Table(head=["right", *_ATTRIBUTES], rows=parts, caption="Attribute by attribute."),
        Facts(items={"pictures that survive the tokenizer": metrics["tokenizer"]["image_accuracy"],
                     "seconds in all": metrics["seconds"]}),
    ]  # fmt: skip


def _captions(both: list[Contender]) -> Comparison:
    shown = both[0].evaluation
    return Comparison(
        [
            Example(
                shown.references[row][0],
                [
                    Captioned(picture=shown.real_BSS3[row], label="scene"),
                    *(Captioned(caption=c.evaluation.captions[row], label=c.title) for c in both),
                ],
            )
            for row in range(min(_SHOWN, len(shown.keys)))
        ]
    )


def _pictures(both: list[Contender]) -> Comparison:
    shown = both[0].evaluation
    examples = []
    for row in range(min(_SHOWN, len(shown.keys))):
        drawn = [
            Captioned(picture=c.evaluation.drawn_BSS3[row], label=c.title)
            for c in both
            if c.evaluation.drawn_BSS3 is not None
        ]
        scene = Captioned(picture=shown.real_BSS3[row], label="scene")
        examples.append(Example(shown.references[row][0], [scene, *drawn]))
    return Comparison(examples)


def _cycle(contender: Contender) -> list[Any]:
    text = contender.evaluation.references[0][0]
    steps = [step.shown for step in contender.diptych.cycle(text=text, rounds=3)]
    return [Text(f"{contender.title}: text to picture to text, three times over."), Strip(steps)]


def _curves(out: Path, contenders: list[Contender]) -> list[Any]:
    runs = {c.title: read_metrics(out / c.name / "metrics.jsonl") for c in contenders}
    accuracy = [
        Panel(title="captions exact", keys=["caption_accuracy"]),
        Panel(title="pictures exact", keys=["image_accuracy"]),
    ]
    losses = [Panel(title=name, keys=[f"loss/{name}"]) for name in ("t2i", "i2t", "i2i", "t2i2t", "i2t2i")]
    variety = Panel(title="distinct captions in the cycle", keys=["loss/i2t2i/distinct_captions"])
    return [
        Figures(images=curves(runs, panels=accuracy, over="seconds"), caption="Accuracy over seconds of training."),
        Figures(images=curves(runs, panels=accuracy), caption="Accuracy over steps."),
        Figures(images=curves(runs, panels=[*losses, variety], smooth=0.95), caption="Losses over steps."),
    ]
