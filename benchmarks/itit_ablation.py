"""What each loss on unpaired data is worth, on the built-in scenes: Tables 2 and 5, Figures 4 and 5 of the ITIT paper.

    python benchmarks/itit_ablation.py --out runs/ablation [--parts table2 table5 figure4 figure5] [--rows 3 7 10 14 15]
        [--seeds 1 2 3] [--steps 800 | --seconds 90] [--pairs 80] [--curve 40 80 160 360] [--json FILE]
        [--set model.dropout=0.2 ...]

A cell is `itit-tiny` with the demo's settings, some of the losses and some of the data, of one seed. It is scored on
held-out combinations, and its scores stay in ``OUT/cells``. A repeat of the command trains what is missing, and goes on
with a cell that was killed. Several processes may share OUT if their seeds differ. ``OUT/ablation.md`` and the figures
tell what is there so far. ``--seconds`` gives each cell as many steps as fit into so much processor time, in the place
of equal steps. It fails when a cell is missing, and not for an order that differs from the paper's.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from itit_all_pairs import changed, seconds_per_step

from diptych.data.scenes import ScenesSource
from diptych.data.splits import Subset, hold_back
from diptych.data.store import Store
from diptych.itit.controls import regression_on_pixels
from diptych.itit.data import DataConfig, DataSplit, TrainingInputs
from diptych.itit.demo import CAPTIONS, PAIRS, STAGES, UNPAIRED, demo_recipe
from diptych.itit.evaluation import EvaluateConfig, evaluate
from diptych.itit.objective import LossWeights
from diptych.itit.recipes import itit_tiny
from diptych.itit.training import ItitRun
from diptych.report.figures import Panel, curves
from diptych.rng import derive_seed
from diptych.run_folder import write_json

IMAGES = 360 + 2 * UNPAIRED
SWAPPED = 0.5
"""Share of the captions of the noisy pairs of row 4 that belong to other images."""
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Shares of swapped captions of Figure 5."""
STARTS = (0, 30, 100, 200, 400)
"""Steps of Table 5 at which the cycles begin."""
SCORES = {
    "captions exact": "caption_accuracy",
    "images exact": "image_accuracy",
    "attributes right (captions)": "caption_attributes",
    "attributes right (images)": "image_attributes",
    "CIDEr-D": "cider",
}
"""Column -> metric. Attributes are the shapes and colours of the things."""
Data = Literal["pairs", "unpaired", "noisy pairs", "the pairs themselves"]
"""What the losses see: pairs alone; unpaired images and texts beside them; the unpaired images as pairs, some of whose
captions are swapped; or the images and texts of the pairs once more, as if they were unpaired."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training: which losses, on how many pairs, with which other data."""

    losses: tuple[str, ...]
    pairs: int
    data: Data = "pairs"
    swapped: float = 0.0
    start: int | None = None
    """Step at which the cycles begin; None takes the recipe's."""

    @property
    def name(self) -> str:
        """A name for files."""
        words = [f"{self.pairs:05d}", *self.losses, self.data, *([f"{self.swapped:g}"] if self.swapped else [])]
        words += [] if self.start is None else [f"from-{self.start}"]
        return "-".join(words).replace(" ", "_").lower()


BOTH = ("T2I", "I2T")
RECIPE = (*BOTH, "half T2I2T", "half I2T2I", "I2I")
"""The losses of `itit-tiny`."""


def table2(pairs: int) -> dict[str, Cell]:
    """The rows of Table 2, and one with the losses of `itit-tiny`."""
    rows: list[tuple[tuple[str, ...], Data]] = [
        (("T2I",), "pairs"),
        (("I2T",), "pairs"),
        (BOTH, "pairs"),
        (BOTH, "noisy pairs"),
        ((*BOTH, "T2T"), "unpaired"),
        ((*BOTH, "I2I"), "unpaired"),
        ((*BOTH, "T2T", "I2I"), "unpaired"),
        ((*BOTH, "half T2I2T"), "unpaired"),
        ((*BOTH, "half I2T2I"), "unpaired"),
        ((*BOTH, "half T2I2T", "half I2T2I"), "unpaired"),
        ((*BOTH, "T2I2T"), "unpaired"),
        ((*BOTH, "I2T2I"), "unpaired"),
        ((*BOTH, "T2I2T", "I2T2I"), "the pairs themselves"),
        ((*BOTH, "T2I2T", "I2T2I"), "unpaired"),
        (RECIPE, "unpaired"),
    ]
    return {
        str(number): Cell(losses=losses, pairs=pairs, data=data, swapped=SWAPPED if data == "noisy pairs" else 0.0)
        for number, (losses, data) in enumerate(rows, 1)
    }


def table5(pairs: int) -> dict[str, Cell]:
    """The losses of `itit-tiny` with cycles that begin at other steps; its own start is row 15 of Table 2."""
    own = itit_tiny().objective.cycle_start_step
    starts = {f"from {start}": None if start == own else start for start in STARTS}
    return {name: Cell(losses=RECIPE, pairs=pairs, data="unpaired", start=start) for name, start in starts.items()}


def figure4(numbers: Sequence[int], every: int) -> dict[str, Cell]:
    """Quality against the number of pairs, with and without unpaired data, and with every caption."""
    cells = {f"{pairs} pairs": Cell(losses=BOTH, pairs=pairs) for pairs in numbers}
    cells |= {f"{pairs} pairs, ITIT": Cell(losses=RECIPE, pairs=pairs, data="unpaired") for pairs in numbers}
    return cells | {"all pairs": Cell(losses=BOTH, pairs=every)}


def figure5(pairs: int) -> dict[str, Cell]:
    """The same added images and texts as pairs, a share of whose captions is swapped, or as unpaired data."""
    cells = {
        f"{share:g} swapped": Cell(losses=BOTH, pairs=pairs, data="noisy pairs", swapped=share) for share in SHARES
    }
    return cells | {"unpaired": Cell(losses=RECIPE, pairs=pairs, data="unpaired")}


# One cell


def recipe_of(cell: Cell, options: argparse.Namespace, seed: int) -> ItitRun:
    """The demo's run with the losses of the cell and the changes of ``--set``."""
    run = demo_recipe(quick=False, seed=seed)
    run.tokenizer = run.text_encoder = options.stages
    cycles: dict[str, Any] = {}
    for field, cycle in (("texts", "T2I2T"), ("images", "I2T2I")):
        cycles[field] = "full" if cycle in cell.losses else "half" if f"half {cycle}" in cell.losses else "off"
    weights = LossWeights(
        **{name: float(name.upper() in cell.losses) for name in ("t2i", "i2t", "t2t")},
        i2i=run.objective.weights.i2i,
        unpaired_i2i=float("I2I" in cell.losses),
    )
    start = run.objective.cycle_start_step if cell.start is None else cell.start
    run.objective = replace(run.objective, weights=weights, cycle_start_step=start, **cycles)
    run.train = replace(run.train, eval_every=10**9, device="cpu", quiet=True)
    changed(run, options.set)
    return run


def data_of(cell: Cell, inputs: TrainingInputs, seed: int) -> TrainingInputs:
    """The encoded data of the cell: ``inputs`` hold every item as a pair."""
    store = inputs.encoded.pairs.source
    assert isinstance(store, Store)
    split = hold_back(len(store), cell.pairs, 0)
    pairs = images = texts = Subset(store, split.pairs)
    if cell.data == "noisy pairs":
        noisy = with_swapped_captions(store, split.images, cell.swapped, seed=seed)
        pairs = Subset(noisy, np.sort(np.concatenate([split.pairs, split.images])))
    if cell.data == "unpaired":
        images, texts = Subset(store, split.images), Subset(store, split.texts)
    return replace(inputs, encoded=DataSplit(pairs=pairs, images=images, texts=texts))


def with_swapped_captions(store: Store, items: np.ndarray, share: float, *, seed: int) -> Store:
    """The store, in which a share of ``items`` have the captions of another one of them. All items have as many."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "swapped")))
    chosen = generator.permutation(items)[: round(share * len(items))]
    arrays = dict(store.arrays)
    for name in ("ids", "features"):
        assert len(arrays[name]) == CAPTIONS * len(store)
        arrays[name] = np.array(arrays[name])
        arrays[name][store.captions.rows(chosen)] = store.arrays[name][store.captions.rows(np.roll(chosen, 1))]
    return replace(store, arrays=arrays)


def train_cell(cell: Cell, inputs: TrainingInputs, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train and score the cell; what an earlier call began is continued."""
    run, data = recipe_of(cell, options, seed), data_of(cell, inputs, seed)
    folder = options.out / "runs" / f"{cell.name}-{seed}"
    run.train = replace(run.train, steps=_steps(run, data, folder, options))
    objective = run.build(data)
    began = time.process_time()
    trained = run.train_on(data, objective, folder)
    seconds = time.process_time() - began
    test = ScenesSource(level=3, split="test", seed=seed + 1, count=options.scored)
    with trained.eval_mode(objective):
        metrics = evaluate(run.diptych(objective, data), test, EvaluateConfig(beams=1)).metrics
    for side in ("caption", "image"):  # tells rows apart in which hardly a scene is right as a whole
        parts = [metrics[f"{side}_{kind}_{thing}"] for kind in ("shape", "colour") for thing in (1, 2, 3)]
        metrics[f"{side}_attributes"] = statistics.mean(parts)
    shutil.rmtree(folder)
    return {"cell": asdict(cell), "seed": seed, "steps": run.train.steps, "seconds": seconds, "metrics": metrics}


def _steps(run: ItitRun, inputs: TrainingInputs, folder: Path, options: argparse.Namespace) -> int:
    """``--steps``, or as many as fit into ``--seconds`` by the cost of a step with all losses."""
    if options.seconds is None:
        return options.steps
    decided = folder / "steps.json"
    if not decided.is_file():
        trial = replace(run, objective=replace(run.objective, cycle_start_step=0))
        cost = seconds_per_step(trial, inputs, folder / "timing")
        write_json(decided, {"steps": int(options.seconds / cost)})
    return json.loads(decided.read_text())["steps"]


def regression(pairs: int, options: argparse.Namespace, seed: int) -> float:
    """Captions exact of logistic regression on the pixels of as many pairs."""
    run = demo_recipe(quick=False, seed=seed)
    run.data = DataConfig(pairs=_spec(seed, options), max_pairs=pairs)
    return regression_on_pixels(run, ScenesSource(level=3, split="test", seed=seed + 1, count=options.scored)).exact


def _spec(seed: int, options: argparse.Namespace) -> str:
    return f"scenes:?level=3&seed={seed}&captions={CAPTIONS}&count={options.images}"


def prepared(options: argparse.Namespace, seed: int) -> TrainingInputs:
    """All images of the seed's world, encoded as pairs."""
    run = demo_recipe(quick=False, seed=seed)
    run.tokenizer = run.text_encoder = options.stages
    run.data = DataConfig(pairs=_spec(seed, options))
    return run.prepare(options.out / f"world-{seed}")


# All cells


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    parts = {
        "table2": {row: cell for row, cell in table2(options.pairs).items() if int(row) in options.rows},
        "table5": table5(options.pairs),
        "figure4": figure4(options.curve, options.images),
        "figure5": figure5(options.pairs),
    }
    wanted = {name: parts[name] for name in options.parts}
    settings = {name: getattr(options, name) for name in ("steps", "seconds", "scored", "images", "set")}
    for seed in options.seeds:
        inputs = None
        for cell in {cell.name: cell for part in wanted.values() for cell in part.values()}.values():
            file = options.out / "cells" / f"{cell.name}-{seed}.json"
            if file.is_file():
                if json.loads(file.read_text())["settings"] != settings:
                    sys.exit(f"{file}: made with other settings: give the same ones, or another --out")
                continue
            inputs = inputs or prepared(options, seed)
            found = train_cell(cell, inputs, options, seed) | {"settings": settings}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
            m = found["metrics"]
            told = f"captions {m['caption_accuracy']:.3f}, images {m['image_accuracy']:.3f} exact"
            print(f"{cell.name}, seed {seed}: {told}, {found['steps']} steps, {found['seconds']:.0f} s", flush=True)
            report(wanted, options)
    if "figure4" in wanted:
        for seed, pairs in ((seed, pairs) for seed in options.seeds for pairs in options.curve):
            file = options.out / "cells" / f"regression-{pairs:05d}-{seed}.json"
            if not file.is_file():
                write_json(file, {"caption_accuracy": regression(pairs, options, seed)})
    missing = report(wanted, options)
    print(verdict(wanted, options) if not missing else f"verdict: {missing} cells are missing")
    sys.exit(missing > 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the cells")
    parser.add_argument("--parts", nargs="*", default=["table2"], choices=["table2", "table5", "figure4", "figure5"])
    parser.add_argument("--rows", nargs="*", type=int, default=list(range(1, 16)), help="rows of Table 2")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=800, help="number of steps of each cell")
    parser.add_argument("--seconds", type=float, help="processor time of each cell, in place of --steps")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="number of pairs, of Figure 4 apart")
    parser.add_argument("--curve", nargs="*", type=int, default=[40, 80, 160, 360], help="pairs of Figure 4")
    parser.add_argument("--scored", type=int, default=500, help="number of held-out scenes scored")
    parser.add_argument("--images", type=int, default=IMAGES, help="number of images of the world, pairs included")
    parser.add_argument("--stages", default=str(STAGES), help="run folder whose tokenizer and text encoder are used")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the recipe to change")
    parser.add_argument("--json", type=Path, help="file for all numbers; default OUT/ablation.json")
    return parser.parse_args()


# Tables and figures


def scores_of(cell: Cell, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Metrics by seed, of the seeds that are there."""
    files = {seed: options.out / "cells" / f"{cell.name}-{seed}.json" for seed in options.seeds}
    found = {seed: json.loads(file.read_text()) for seed, file in files.items() if file.is_file()}
    return {seed: each["metrics"] | {name: each[name] for name in ("steps", "seconds")} for seed, each in found.items()}


def mean(scores: Mapping[int, Mapping[str, float]], key: str) -> float:
    values = [each[key] for each in scores.values()]
    return statistics.mean(values) if values else math.nan


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def report(parts: Mapping[str, Mapping[str, Cell]], options: argparse.Namespace) -> int:
    """Write markdown, JSON and figures of the cells that are there; return the number of missing ones."""
    lines, missing = [], 0
    found: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items()}}
    for part, cells in parts.items():
        lines += [f"## {part}", "", f"| | losses | data | {' | '.join(SCORES)} | steps | seconds |"]
        lines += ["|---" * (len(SCORES) + 5) + "|"]
        for label, cell in cells.items():
            scores = scores_of(cell, options)
            missing += len(options.seeds) - len(scores)
            found.setdefault(part, {})[label] = {"cell": asdict(cell), "scores": scores}
            untrained = {("T2I",): ("caption", "cider"), ("I2T",): ("image",)}.get(cell.losses, ())
            texts = [
                ""
                if key.startswith(untrained)
                else spread([m[key] for m in scores.values()], 0 if key == "cider" else 3)
                for key in SCORES.values()
            ]
            swapped = f", {cell.swapped:.0%} swapped" if cell.data == "noisy pairs" else ""
            cost = [f"{mean(scores, key):.0f}" if scores else "" for key in ("steps", "seconds")]
            data = f"{cell.pairs:,} pairs" + ("" if cell.data == "pairs" else f" and {cell.data}{swapped}")
            lines += [f"| {' | '.join([label, ' + '.join(cell.losses), data, *texts, *cost])} |"]
        if part == "figure4":
            lines += regression_lines(options)
        lines += [""]
    (options.out / "ablation.md").write_text("\n".join(lines))
    write_json(options.json or options.out / "ablation.json", found)
    write_figures(parts, options)
    return missing


def regression_lines(options: argparse.Namespace) -> list[str]:
    """A row for each number of pairs."""
    lines = []
    for pairs in options.curve:
        files = [options.out / "cells" / f"regression-{pairs:05d}-{seed}.json" for seed in options.seeds]
        values = [json.loads(file.read_text())["caption_accuracy"] for file in files if file.is_file()]
        lines += [f"| regression on pixels | | {pairs:,} pairs | {spread(values, 3)} |" + " |" * (len(SCORES) + 1)]
    return lines


def write_figures(parts: Mapping[str, Mapping[str, Cell]], options: argparse.Namespace) -> None:
    """``figure4_captions.svg`` and its like: the means over the seeds."""
    for part, axis in (("figure4", "pairs"), ("figure5", "share of captions swapped")):
        runs: dict[str, list[dict[str, float]]] = {}
        for cell in parts.get(part, {}).values():
            scores = scores_of(cell, options)
            if not scores or cell.pairs == options.images:
                continue
            title = {"pairs": "pairs only", "unpaired": "ITIT", "noisy pairs": "added as pairs"}[cell.data]
            means = {key: mean(scores, key) for key in SCORES.values()}
            # Unpaired data has no captions to swap: a level line.
            places = [cell.pairs] if part == "figure4" else [cell.swapped] if cell.data == "noisy pairs" else SHARES
            runs.setdefault(title, []).extend({axis: float(place), **means} for place in places)
        for side in ("caption", "image"):
            panel = Panel(title=f"{side}s exact", keys=[f"{side}_accuracy"])
            for figure in curves(runs, panels=[panel], over=axis):
                (options.out / f"{part}_{side}s.svg").write_bytes(figure)


def verdict(parts: Mapping[str, Mapping[str, Cell]], options: argparse.Namespace) -> str:
    """The paper's order in captions, and what the losses of the recipe reach of a network with every caption."""
    told = []
    if {"3", "7", "10", "14"} <= parts.get("table2", {}).keys():
        three, seven, ten, fourteen = (
            mean(scores_of(parts["table2"][row], options), "caption_accuracy") for row in ("3", "7", "10", "14")
        )
        holds = "holds" if three < seven < ten <= fourteen else "does not hold"
        told += [f"3 < 7 < 10 <= 14 in captions {holds}: {three:.3f}, {seven:.3f}, {ten:.3f}, {fourteen:.3f}"]
    if "figure4" in parts:
        cells, most = parts["figure4"], max(options.curve)
        ours, bound = (scores_of(cells[name], options) for name in (f"{most} pairs, ITIT", "all pairs"))
        shares = [mean(ours, key) / max(mean(bound, key), 1e-9) for key in ("caption_accuracy", "image_accuracy")]
        told += [
            f"ITIT with {most} pairs: {shares[0]:.0%} of the captions and {shares[1]:.0%} of the images of all pairs"
        ]
    return f"verdict: {'; '.join(told or ['all cells are there'])}"


if __name__ == "__main__":
    main()
