"""Validation while ITIT trains: samples, and `valid/NAME`, which are the scores of `diptych evaluate`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diptych.data.sources import open_source
from diptych.data.store import Store
from diptych.itit.data import DataConfig, DataSplit
from diptych.itit.evaluation import EvaluateConfig, ScoredImages, evaluate
from diptych.itit.pipeline import Diptych
from diptych.report.html import Captioned, Example, Section, SideBySide, Strip, Text
from diptych.report.sheet import Cell, comparison, save_png
from diptych.train.distributed import is_main_process
from diptych.train.logging import Measured

SHOWN = 8
"""Number of images in the samples."""


class Samples:
    """Eight captioned images, with the captions and the images that the network in training generates for them.

    They come from ``config.valid``, whose first images are also scored as `diptych evaluate` scores them. Without it
    they come from the pairs, and nothing is scored.
    """

    def __init__(
        self,
        diptych: Diptych,
        data: DataSplit,
        config: DataConfig,
        folder: Path,
        *,
        images: ScoredImages | None = None,
    ) -> None:
        """``images`` are those of ``config.valid``, if they have been read before."""
        self.images = images
        self.diptych, self.folder = diptych, folder
        self.valid = open_source(config.valid, columns=config.columns) if config.valid else None
        if self.valid is not None:
            self.scored = EvaluateConfig(limit=config.valid_images, max_skipped_share=config.max_skipped_share)
            self.images = images = images or ScoredImages.read(diptych, self.valid, self.scored)
            if is_main_process():
                for line in images.skipped.report(folder.parent / "skipped_valid.jsonl"):
                    print(line, file=sys.stderr, flush=True)
            self.pixels = list(images.pixels_BSS3[:SHOWN])
            self.texts = [self.valid.captions(item)[0] for item in images.items[:SHOWN]]
        else:
            assert isinstance(data.pairs.source, Store)
            pairs = data.pairs.source.pairs(data.pairs.items, seed=0)
            rows = np.arange(min(SHOWN, pairs.size))
            shown = pairs.take(rows, np.zeros_like(rows))
            self.pixels = list(diptych.tokenizer.decode(shown.tokens_BN).permute(0, 2, 3, 1).cpu().numpy())
            self.texts = diptych.text_encoder.detokenize(shown.ids_BL)

    @torch.no_grad()
    def run(self, step: int, objective: nn.Module) -> dict[str, Measured]:
        """Write ``samples/step-N.png``; return that sheet, and the scores as ``valid/NAME``."""
        captions, generated = self._generate()
        sheet = comparison(
            {
                "image": [Cell(image=p, caption=t) for p, t in zip(self.pixels, self.texts, strict=True)],
                "caption": [Cell(caption=text) for text in captions],
                "generated": [Cell(image=pixels) for pixels in generated],
            },
            title=f"step {step:,}",
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(self.folder / f"step-{step:08d}.png", sheet)
        if self.valid is None:
            return {"samples": sheet}
        scores = evaluate(self.diptych, self.valid, self.scored, images=self.images).metrics
        return {"samples": sheet} | {f"valid/{name}": value for name, value in scores.items() if name != "images"}

    def sections(self) -> list[Section]:
        """The samples and a cycle, for the report of a finished run."""
        return [Section("Samples", self._samples()), Section("A cycle", self._cycle())]

    def _generate(self) -> tuple[list[str], list[np.ndarray]]:
        """A caption for each image and an image for each text, with the network's present weights."""
        return self.diptych.caption(self.pixels), list(self.diptych.imagine_pixels(self.texts))

    def _samples(self) -> list[Any]:
        examples = []
        for text, real, caption, generated in zip(self.texts, self.pixels, *self._generate(), strict=True):
            shown = [
                Captioned(image=real, label="image"),
                Captioned(image=generated, label="generated"),
                Captioned(caption=caption, label="caption"),
            ]
            examples.append(Example(text, shown))
        about = "Each image under its own caption, with the image generated from it and the caption of the image."
        return [Text(about), SideBySide(examples)]

    def _cycle(self) -> list[Any]:
        steps = self.diptych.cycle(text=self.texts[0], rounds=3)
        return [Text("Text to image to text, three times in a row."), Strip([step.shown for step in steps])]
