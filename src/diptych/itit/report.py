"""Sample pictures and captions while a run trains, and the report at its end."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from diptych.data.pixels import read_captioned
from diptych.data.sources import open_source
from diptych.data.store import Store
from diptych.itit.data import DataConfig, DataSplit
from diptych.itit.evaluation import EvaluateConfig, evaluate
from diptych.itit.pipeline import Diptych
from diptych.report.figures import Panel, curves, read_metrics
from diptych.report.html import Captioned, Example, Facts, Figures, Section, Strip, Text, write_report
from diptych.report.html import Comparison as ComparisonBlock
from diptych.report.sheet import Cell, comparison, save_png
from diptych.run_folder import read_config
from diptych.train.logging import Measured

_SHOWN = 8
_SCORED = 128
LOSSES = ("t2i", "i2t", "i2i", "t2i2t", "i2t2i", "t2t", "unpaired_i2i")


class Samples:
    """Eight captioned images: what the network writes about them and draws for their captions.

    From ``data.valid`` (then the first 128 of it are also scored, quickly, with greedy captions), else some pairs.
    """

    def __init__(self, diptych: Diptych, parts: DataSplit, data: DataConfig, folder: Path) -> None:
        self.diptych, self.folder = diptych, folder
        self.valid = open_source(data.valid, columns=data.columns) if data.valid else None
        if self.valid is not None:
            items, pixels = read_captioned(self.valid, limit=_SHOWN, size=diptych.tokenizer.image_size)
            self.pixels = list(pixels)
            self.texts = [self.valid.captions(item)[0] for item in items]
        else:
            assert isinstance(parts.pairs.source, Store)
            pairs = parts.pairs.source.pairs(parts.pairs.items, seed=0)
            rows = np.arange(min(_SHOWN, pairs.size))
            shown = pairs.take(rows, np.zeros_like(rows))
            self.pixels = list(diptych.tokenizer.decode(shown.tokens_BN).permute(0, 2, 3, 1).cpu().numpy())
            self.texts = diptych.text_encoder.detokenize(shown.ids_BL)

    @torch.no_grad()
    def run(self, step: int, objective: nn.Module) -> dict[str, Measured]:
        """Write ``samples/step-N.png``; return that sheet and the quick scores."""
        self._generate()
        sheet = comparison(
            {
                "photo": [Cell(image=p, caption=t) for p, t in zip(self.pixels, self.texts, strict=True)],
                "caption": [Cell(caption=text) for text in self.captions],
                "drawn": [Cell(image=picture) for picture in self.drawn],
            },
            title=f"step {step:,}",
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(self.folder / f"step-{step:08d}.png", sheet)
        if self.valid is None:
            return {"samples": sheet}
        scores = evaluate(self.diptych, self.valid, EvaluateConfig(limit=_SCORED, beams=1)).metrics
        return {"samples": sheet} | {f"valid/{name}": value for name, value in scores.items() if name != "images"}

    def _generate(self) -> None:
        self.captions = self.diptych.caption(self.pixels)
        self.drawn = list(self.diptych.imagine(self.texts))

    def report(self, run: Path, *, recipe: str) -> None:
        """``report.html``: curves, samples, a cycle and the settings."""
        self._generate()  # nothing has been yet if the run was finished before
        records = read_metrics(run / "metrics.jsonl")
        losses = [Panel(title=name, keys=[f"loss/{name}"]) for name in LOSSES]
        scores = sorted({key for record in records for key in record if key.startswith("valid/")})
        panels = [Panel(title="loss", keys=["loss"]), *losses]
        examples = [
            Example(text, [Captioned(image=real, label="image"), Captioned(image=drawn, label="drawn"),
                           Captioned(caption=written, label="caption")])
            for text, real, drawn, written in zip(self.texts, self.pixels, self.drawn, self.captions, strict=True)
        ]  # fmt: skip
        about = "Each image under its own caption; what the network drew for the caption and wrote about the image."
        cycle = Strip([step.shown for step in self.diptych.cycle(text=self.texts[0], rounds=3)])
        sections = [
            Section("Samples", [Text(about), ComparisonBlock(examples)]),
            Section("A cycle", [Text("Text to picture to text, three times over."), cycle]),
            Section("Curves", [Figures(images=curves({recipe: records}, panels=panels, smooth=0.95))]),
        ]  # fmt: skip
        if scores:
            shown = [Panel(title=name.removeprefix("valid/"), keys=[name]) for name in scores]
            sections.append(Section("Validation", [Figures(images=curves({recipe: records}, panels=shown))]))
        config = read_config(run)
        facts = {"recipe": recipe, **{f"{name} version": value for name, value in config["versions"].items()}}
        sections.append(Section("Settings", [Facts(items=facts), Text(_listed(config["run"]), kind="code")]))
        write_report(run / "report.html", sections, title=f"Diptych: {recipe}", lead=str(run.name))


def _listed(fields: dict, prefix: str = "") -> str:
    lines = []
    for name, value in fields.items():
        lines.append(_listed(value, f"{prefix}{name}.") if isinstance(value, dict) else f"{prefix}{name} = {value}")
    return "\n".join(lines)
