"""Few-shot supervised UML: all controls for each number of labelled images, from image files to the table.

    python benchmarks/uml_fewshot.py --data images/ --texts descriptions.json --encoder E --text-encoder T --json FILE
    python benchmarks/uml_fewshot.py --data caltech101.tar --meta meta.json --encoder E --text-encoder T --json FILE

`--encoder` and `--text-encoder` take folders or hub names of transformers, and runs of Diptych. `--meta` names a file
with the class names, splits, few-shot indices and descriptions of a published split. Without it, classes are those of
`--data`, a share of whose images is the test set, and few-shot images are drawn at random. Settings are chosen on
validation images only. A figure is written beside FILE. It fails when a control is missing or a number is not finite,
and not for a null result.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from diptych.data.class_texts import Shots, texts_of
from diptych.data.pixels import SkippedItems, image_batches
from diptych.data.sources import open_source
from diptych.data.sources.decode import SUFFIXES
from diptych.data.splits import Episode, Labelled, draw_episode, given_episodes, hold_out
from diptych.encoders import open_image_encoder, open_text_encoder
from diptych.eval.frechet import RandomFeatures
from diptych.experiments.few_shot import (
    CONTROLS,
    REGRESSION,
    FewShotConfig,
    FewShotResult,
    accuracy_figure,
    after_refit,
    as_json,
    few_shot,
    gain,
    regression,
    show,
    spread,
)
from diptych.uml.data import LabelledFeatures, class_text_features, labelled_image_features

TEMPLATES = ("a photo of a {}.",)


@dataclass(kw_only=True)
class Options:
    data: str
    """Source of labelled images."""
    encoder: str
    """Image encoder; random is an untrained network, which any trained one should beat."""
    text_encoder: str
    """Text encoder: a folder, hub name or run."""
    json: Path
    """File for all numbers; the figure is written beside it."""
    meta: Path | None = None
    """File of class names, splits, few-shot indices and descriptions."""
    texts: str | None = None
    """Texts about the classes: a JSON file or a folder; if not given, the descriptions of `meta`, else a template."""
    templates: bool = False
    """Whether texts are made from a template although there are descriptions."""
    test_share: float = 0.3
    """Share of the images of each class that is the test set, if `meta` is not given."""
    cache: Path = Path("runs/features")
    """Folder for the features of the encoders."""
    grid: FewShotConfig = field(default_factory=FewShotConfig)
    """Settings of the few-shot grid."""


@dataclass
class Task:
    labelled: Labelled
    episodes: dict[tuple[int, int], Episode]
    test: np.ndarray
    texts: list[list[str]]


def published(options: Options) -> Task:
    assert options.meta is not None
    meta = json.loads(options.meta.read_text())
    source = open_source(options.data)
    keys = [source.key(item) for item in range(len(source))]
    told = {stem(file): (label, split) for file, label, split in meta["items"]}
    items = [told[stem(key)] for key in keys]
    labels_N = np.array([label for label, _ in items], np.int64)
    labelled = Labelled(source=source, classes=tuple(meta["classnames"]), labels_N=labels_N)
    texts = [[text for text in meta["descriptions"][name] if text.strip()] for name in meta["classnames"]]
    if options.templates or options.texts:
        texts = texts_of(options.texts, labelled.classes, templates=TEMPLATES)
    test = np.flatnonzero([split == "test" for _, split in items])
    return Task(labelled, given_episodes(meta, keys), test, texts)


def stem(file: str) -> str:
    """Sources of tars name their items without a suffix, those of folders with it."""
    return str(Path(file).with_suffix("")) if Path(file).suffix.lower() in SUFFIXES else file


def drawn(options: Options) -> Task:
    labelled = Labelled.of(open_source(options.data))
    parts = hold_out(labelled.labels_N, options.test_share, seed=0)
    labels_N = labelled.labels_N[parts.train]
    grid, episodes = options.grid, {}
    for shots in grid.shots:
        for seed in grid.seeds:
            found = draw_episode(labels_N, shots, seed=seed)
            episodes[shots, seed] = Episode(train=parts.train[found.train], valid=parts.train[found.valid])
    return Task(labelled, episodes, parts.valid, texts_of(options.texts, labelled.classes, templates=TEMPLATES))


def features_of_images(options: Options, labelled: Labelled) -> LabelledFeatures:
    """Features of all images, in their order: none may be unreadable."""
    every, skipped = np.arange(len(labelled.labels_N)), SkippedItems(max_skipped_share=0.0)
    if options.encoder != "random":
        encoder = open_image_encoder(options.encoder)
        return labelled_image_features(encoder, labelled, every, cache=options.cache, skipped=skipped, workers=2)
    network = RandomFeatures()
    readable = image_batches(labelled.source, every, size=RandomFeatures.SIZE, skipped=skipped)
    return LabelledFeatures(
        vectors_ND=np.concatenate([network(pixels) for pixels, _ in readable]), labels_N=labelled.labels_N
    )


def worst(results: list[FewShotResult]) -> float:
    """The lowest mean accuracy of a control and number of shots less that of logistic regression, in points."""
    shots = {each.shots for each in results}
    below = [spread(results, name, k)[0] - spread(results, REGRESSION, k)[0] for name in CONTROLS for k in shots]
    return 100 * min(below, default=math.nan)


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    began = time.process_time()
    task = published(options) if options.meta else drawn(options)
    grid, every = options.grid, np.arange(len(task.labelled.labels_N))
    if options.encoder == options.text_encoder:  # two towers of one model: their spaces are one
        grid = replace(grid, head=replace(grid.head, projection="identity"))
    images = features_of_images(options, task.labelled)
    shots: Shots = "mean" if grid.text_shots == "mean" else "all"
    encoder = open_text_encoder(options.text_encoder)
    texts = class_text_features(encoder, task.texts, shots=shots, cache=options.cache, seed=0)
    encoded = time.process_time() - began
    print(f"{len(every):,} images and {len(texts.labels_N):,} texts encoded: {encoded:.0f} s of CPU", flush=True)
    results = few_shot(images, texts, task.episodes, task.test, grid, say=lambda line: print(line, flush=True))
    results += regression(images, task.episodes, task.test, grid)
    title = f"{len(task.labelled.classes)} classes"
    show(results, title=title)
    refitted = after_refit(results)
    if refitted:
        show(refitted, title=f"{title}, after a refit on the images to learn from and to select on")
    seconds = time.process_time() - began
    found = as_json(results) | {"refitted": as_json(refitted) if refitted else None, "worst": worst(results)}
    found |= {"options": asdict(replace(options, grid=grid)), "cpu_seconds": seconds}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
    options.json.with_suffix(".svg").write_bytes(accuracy_figure(results, title=title))
    print(f"at worst {worst(results):+.2f} points from logistic regression; refitted {worst(refitted):+.2f}")
    whole = {each.control for each in results} == {*CONTROLS, REGRESSION} and all(
        math.isfinite(o.accuracy) for o in results
    )
    print(f"verdict: {gain(results, 'UML', 'image only')} ({seconds:.0f} s of CPU)" if whole else "verdict: not whole")
    sys.exit(not whole)


if __name__ == "__main__":
    main(tyro.cli(Options))
