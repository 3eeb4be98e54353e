"""ITO and the methods that it is compared with on Flickr8k: small towers, equal steps, retrieval on the test split.

    taskset -c 1 python benchmarks/ito_flickr8k.py --data flickr8k_96.tar [--runs DIR] [--json FILE]
        [--arms clip clip-2 clip-aug siglip slip slip-2 ito-0 ito ito-crops ...] [--seeds 0 1 2] [--steps 1800]
        [--photos 6000] [--figures DIR] [--minutes 5]

`--data` is a WebDataset tar with the splits train, dev and test and five captions a photo. A run that is finished is
not repeated, so the command may be stopped and given again; give each number of steps or photos a folder of its own.
`--photos` keeps the first of the training photos, which are then seen more often: over-fitting comes sooner.
The arms `clip-frozen`, `slip-frozen`, `ito-frozen` ... train heads on two pretrained towers (docs/encoders.md), by
default EfficientNet-Lite0 and MiniLM; all their runs share one folder of features. With `--minutes` each run has that
budget, computes its features itself, and takes as many steps as fit.
`--figures` draws R@1 and R@10 on dev over the steps, means over the seeds. Hyper-parameters were chosen on dev alone.
Fails if ITO's mean R@1 (both directions, mean of the seeds) is not at least 15 % above CLIP's; of frozen towers alone,
if the mean R@1 of any arm is not at least 10 % or its R@10 not at least 36 %. The whole comparison under a budget:

    python benchmarks/ito_flickr8k.py --data flickr8k_96.tar --arms clip-frozen clip-2-frozen slip-frozen ito-0-frozen
        ito-frozen --minutes 5 --runs runs/frozen5
"""

import argparse
import io
import json
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.data.augment import ViewConfig
from diptych.data.pixels import channels_first
from diptych.data.sources import open_source
from diptych.dual import recipes
from diptych.dual.metrics import retrieval
from diptych.dual.model import DualEncoder
from diptych.dual.towers import TowersEncoder
from diptych.dual.training import DualRun
from diptych.io import write_bytes
from diptych.report.figures import Panel, Record, curves, read_metrics
from diptych.run_folder import write_json
from diptych.train.pace import Budget

BAR = 1.15
FROZEN_BAR = {"r1": 0.10, "r10": 0.36}
R1 = "mean_r1"


CROPS = ViewConfig(jitter=0.0, grey=0.0, blur=0.0)  # crops and mirror images alone, with unchanged colours


def changed(recipe: Callable[[], DualRun], **fields: Any) -> Callable[[], DualRun]:
    """``recipe`` with other values in the given fields of its objective."""

    def build() -> DualRun:
        run = recipe()
        for name, value in fields.items():
            setattr(run.objective, name, value)
        return run

    return build


ARMS: dict[str, Callable[[], DualRun]] = {
    "clip": recipes.clip_tiny,
    "clip-aug": recipes.clip_aug_tiny,
    "clip-2": changed(recipes.clip_tiny, captions=2),  # as many as `ito-tiny` has
    "clip-aug-2": changed(recipes.clip_aug_tiny, captions=2),
    "ito-0": changed(recipes.ito_tiny, fusion_weight=0.0),  # two views, aligned
    "ito": recipes.ito_tiny,
    "siglip": recipes.siglip_tiny,
    "slip": recipes.slip_tiny,
    "slip-2": changed(recipes.slip_tiny, captions=2),
    "clip-aug-crops": changed(recipes.clip_aug_tiny, augment=CROPS),
    "clip-aug-2-crops": changed(recipes.clip_aug_tiny, captions=2, augment=CROPS),
    "ito-0-crops": changed(recipes.ito_tiny, fusion_weight=0.0, augment=CROPS),
    "ito-crops": changed(recipes.ito_tiny, augment=CROPS),
    "clip-frozen": recipes.clip_frozen,
    "siglip-frozen": recipes.siglip_frozen,
    "slip-frozen": recipes.slip_frozen,
    "ito-frozen": recipes.ito_frozen,
    "clip-2-frozen": changed(recipes.clip_frozen, captions=2),  # as many as `ito-frozen` has
    "ito-0-frozen": changed(recipes.ito_frozen, fusion_weight=0.0),
}


def one(arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and test a run, unless its result is there already."""
    out = options.runs / f"{arm}-{seed}"
    if (out / "result.json").is_file():
        return json.loads((out / "result.json").read_text())
    run = ARMS[arm]()
    run.data.pairs, run.data.valid = training_photos(options), f"{options.data}?split=dev"
    run.data.valid_images = 1000
    run.train.seed, run.train.device = seed, "cpu"
    if options.steps:
        run.train.steps = options.steps
    run.train.eval_every, run.train.checkpoint_every = max(1, run.train.steps // 10), max(1, run.train.steps // 4)
    if arm.endswith("-frozen"):
        run.data.cache = None if options.minutes else options.runs / "features"
    began, before = time.monotonic(), time.process_time()
    budget = Budget(options.minutes) if options.minutes else None
    result = run.fit(out, recipe=arm if arm.endswith("-frozen") else f"{arm}-tiny", budget=budget)
    whole = time.monotonic() - began
    curve = {r["step"]: r["valid/mean_r1"] for r in read_metrics(out / "metrics.jsonl") if "valid/mean_r1" in r}
    best = max(curve, key=lambda step: curve[step])
    found = test(out / "model", f"{options.data}?split=test", features=options.runs / "features") | {
        "dev_last": curve[max(curve)],
        "dev_best": curve[best],
        "dev_best_step": best,
        "steps": result.step,
        "seconds": result.seconds,
        "whole_seconds": whole,
        "cpu_seconds": time.process_time() - before,
    }
    write_json(out / "result.json", found | {"curve": curve})
    return found | {"curve": curve}


def training_photos(options: argparse.Namespace) -> str:
    """The source to train on; a tar of the first photos is written once."""
    if not options.photos:
        return f"{options.data}?split=train"
    few = options.runs / f"{options.photos}.tar"
    if not few.is_file():
        write_bytes(few, _first_photos(options.data, options.photos))
    return str(few)


def _first_photos(path: str, count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(path) as every, tarfile.open(fileobj=buffer, mode="w") as some:
        for name in sorted(name for name in every.getnames() if name.endswith(".json")):
            if count and json.loads(every.extractfile(name).read())["split"] == "train":
                count -= 1
                for each in (name, name.removesuffix(".json") + ".jpg"):
                    some.addfile(every.getmember(each), every.extractfile(each))
    return buffer.getvalue()


def test(folder: Path, spec: str, *, features: Path) -> dict[str, float]:
    """Retrieval among all test images and all their captions, and the distance between the modalities' means.

    ``features`` keeps those of pretrained towers, which are the same for all runs.
    """
    model, source = DualEncoder.from_pretrained(folder), open_source(spec)
    if isinstance(model, TowersEncoder):
        model.remember(features / "test")
    captions = [source.captions(item) for item in range(len(source))]
    pixels = channels_first(np.stack([source.image(item, model.image_size) for item in range(len(source))]))
    image_of_T = torch.tensor([item for item, texts in enumerate(captions) for _ in texts])
    images_ID = model.embed_images(pixels)
    texts_TD = model.embed_texts([text for texts in captions for text in texts])
    if isinstance(model, TowersEncoder):
        model.keep()
    gap = (images_ID.mean(0) - texts_TD.mean(0)).norm().item()
    return retrieval(images_ID, texts_TD, image_of_T=image_of_T).table() | {"gap": gap}


SHOWN = {
    "image_to_text/r1": "I>T R@1",
    "image_to_text/r5": "R@5",
    "image_to_text/r10": "R@10",
    "text_to_image/r1": "T>I R@1",
    "text_to_image/r5": "R@5",
    "text_to_image/r10": "R@10",
    R1: "mean R@1",
    "dev_last": "dev last",
    "dev_best": "dev best",
    "dev_best_step": "at step",
    "gap": "gap",
    "seconds": "seconds",
    "whole_seconds": "whole run",
    "steps": "steps",
}


def show(results: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':10}{'seeds':>6}" + "".join(f"{name:>14}" for name in SHOWN.values()))
    for arm, found in results.items():
        print(f"{arm:10}{len(found):>6}" + "".join(f"{_cell(key, found):>14}" for key in SHOWN))


def _cell(key: str, found: list[dict[str, float]]) -> str:
    values = [each[key] for each in found]
    if key in ("seconds", "whole_seconds", "steps", "dev_best_step"):
        return f"{statistics.mean(values):.0f}"
    factor = 1 if key == "gap" else 100
    spread = f" ± {statistics.stdev(values) * factor:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values) * factor:.2f}{spread}"


def draw_curves(options: argparse.Namespace) -> None:
    """`dev_r1.svg` and `dev_r10.svg`, in %, means over the seeds."""
    runs = {}
    for arm in options.arms:
        seeds = [read_metrics(options.runs / f"{arm}-{seed}" / "metrics.jsonl") for seed in options.seeds]
        at_step: dict[int, list[Record]] = {}
        for record in (r for records in seeds for r in records if "valid/mean_r1" in r):
            at_step.setdefault(record["step"], []).append(record)
        runs[arm] = [
            {"step": step}
            | {key: 100 * statistics.mean(_both_ways(r, key, under="valid/") for r in found) for key in ("r1", "r10")}
            for step, found in sorted(at_step.items())
        ]
    panels = [Panel(title=f"{name} on dev", keys=[key], label="%") for key, name in (("r1", "R@1"), ("r10", "R@10"))]
    for name, image in zip(("dev_r1.svg", "dev_r10.svg"), curves(runs, panels=panels), strict=True):
        write_bytes(options.figures / name, image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/ito_flickr8k"))
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["clip", "ito", "clip-aug", "ito-0", "siglip", "slip"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--photos", type=int, help="default: all")
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--minutes", type=float, help="budget of each run; default: the recipe's steps")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:  # all arms of a seed first: stopped early, the table is still a fair one
        for arm in options.arms:
            results[arm].append(one(arm, seed, options))
            print(f"{arm} seed {seed}: test {R1} {results[arm][-1][R1]:.4f}", flush=True)
    show(results)
    if options.figures:
        draw_curves(options)
    if options.json:
        write_json(options.json, results)
    sys.exit(not verdict(results))


def verdict(results: dict[str, list[dict[str, float]]]) -> bool:
    """Print the gains over CLIP in R@1, which is judged, and in R@5 and R@10, which are less noisy."""
    if all(arm.endswith("-frozen") for arm in results):
        return frozen_verdict(results)
    if not {"clip", "ito"} <= results.keys():
        print("verdict: needs the arms clip and ito")
        return False
    gains: dict[str, dict[str, float]] = {}
    for score in ("r1", "r5", "r10"):
        mean = {arm: statistics.mean(_both_ways(each, score) for each in found) for arm, found in results.items()}
        gains[score] = {arm: value / mean["clip"] - 1 for arm, value in mean.items() if arm != "clip"}
        print(f"{score} against CLIP at equal steps: " + ", ".join(f"{a} {g:+.1%}" for a, g in gains[score].items()))
    held = 1 + gains["r1"]["ito"] >= BAR
    print(f"verdict: the bar of ITO, R@1 +15 %, is {'met' if held else 'missed'}")
    return held


def frozen_verdict(results: dict[str, list[dict[str, float]]]) -> bool:
    """Print R@1 and R@10 of every arm, which are judged, and the differences from CLIP, paired by seed."""
    mean = {
        arm: {score: statistics.mean(_both_ways(each, score) for each in found) for score in FROZEN_BAR}
        for arm, found in results.items()
    }
    for arm, found in results.items():
        told = ", ".join(f"{score} {value:.1%}" for score, value in mean[arm].items())
        pairs = list(zip(found, results.get("clip-frozen", ()), strict=False)) if arm != "clip-frozen" else []
        gains = [100 * (_both_ways(one, "r1") - _both_ways(clip, "r1")) for one, clip in pairs]
        if len(gains) > 1:
            error = statistics.stdev(gains) / len(gains) ** 0.5
            told += f"; r1 against CLIP {statistics.mean(gains):+.2f} ± {error:.2f} points over {len(gains)} seeds"
        print(f"{arm}: {told}")
    held = all(value >= FROZEN_BAR[score] for scores in mean.values() for score, value in scores.items())
    print(f"verdict: the bar of frozen towers, r1 10 % and r10 36 % for every arm, is {'met' if held else 'missed'}")
    return held


def _both_ways(result: Mapping[str, float], score: str, *, under: str = "") -> float:
    return (result[f"{under}image_to_text/{score}"] + result[f"{under}text_to_image/{score}"]) / 2


if __name__ == "__main__":
    main()
