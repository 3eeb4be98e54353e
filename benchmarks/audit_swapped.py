"""Does `diptych audit` find captions that belong to another image, and images that are there twice?

In a tenth of the pairs the captions are exchanged among one another. The score is the share of exchanged captions among
the tenth that fits worst; by chance it is a tenth. Auditors:

    left_out    two pretrained encoders, and regressions between their features that leave the audited pair out
    run         the finished run of --run, which has learned from other pairs
    halves      a dual encoder that learned from the other half of the pairs
    heart       control: one that learned from the same half (by heart)
    control     control: one whose heads are as they were drawn

Near duplicates, of photos: compressed again, at half the size, and mirrored, each beside its original.

    python benchmarks/audit_swapped.py --data flickr8k_96.tar --out DIR [--pairs 3000] [--seeds 0 1 2] [--steps 400]
        [--auditors left_out halves heart control]
    python benchmarks/audit_swapped.py --data scenes: --run runs/demo/itit --out DIR [--pairs 1000]
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from suggest_rounds import features

from diptych.data.audit import near_duplicates
from diptych.data.pixels import SkippedItems
from diptych.data.sources import open_source
from diptych.data.sources.decode import decode
from diptych.dual.evaluation import pair_fits
from diptych.dual.model import open_dual
from diptych.eval.probe import caption_fits
from diptych.io import write_bytes
from diptych.itit.evaluation import pair_fits as itit_fits
from diptych.itit.pipeline import Diptych
from diptych.registry import RECIPES
from diptych.run_folder import write_json

SHARE = 0.1
IMAGES, TEXTS = "package:efficientnet-lite0", "package:minilm-l6"
LEARNED = ("halves", "heart", "control")
BARS = {"run": 0.9, "left_out": 0.7}
"""The run on scenes, and the pretrained encoders on photos."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--recipe", default="clip-frozen")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--auditors", nargs="+", choices=("left_out", "run", *LEARNED))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    simple = given.data == "scenes:"
    spec = f"scenes:?level=3&seed=50&count={2 * given.pairs}" if simple else f"{given.data}?split=train"
    auditors = given.auditors or (["run"] if simple else ["left_out"])
    found = {**{name: [] for name in auditors}, **({} if simple else duplicates(spec, given.seeds[0]))}
    for seed in given.seeds:
        halves, whole, wrong = exchange(spec, given.out, pairs=given.pairs, seed=seed)
        for name in auditors:
            if name == "left_out":
                fits = left_out(spec, whole, given.out)
            elif name == "run":
                source = open_source(whole)
                diptych = Diptych.from_pretrained(given.run)
                fits = {source.key(each.item): each.fit for each in itit_fits(diptych, source, skipped=SkippedItems())}
            else:
                fits = learned(name, halves, given, seed)
            found[name].append(precision(fits, wrong))
        print(f"seed {seed}: " + ", ".join(f"{name} {found[name][-1]:.3f}" for name in auditors), flush=True)
    for name in auditors:
        print(f"{name}: {np.mean(found[name]):.3f} +- {np.std(found[name], ddof=len(given.seeds) > 1):.3f}")
    write_json(given.out / "audit.json", found)
    bars = {name: bar for name, bar in BARS.items() if name in auditors}
    passed = all(np.mean(found[name]) >= bar for name, bar in bars.items())
    print(f"{'passed' if passed else 'FAILED'}: bars {bars}")
    sys.exit(not passed)


def left_out(spec: str, whole: str, out: Path) -> dict[str, float]:
    """What `encoder_fits` gives. The features of images and first captions are computed once for all seeds."""
    source, audited = open_source(spec), open_source(whole)
    images, texts = features(source, np.arange(len(source)), out / "features.npz", captions=1)
    row = {source.key(item): item for item in range(len(source))}
    of_text = {source.captions(item)[0]: item for item in range(len(source))}
    keys = [audited.key(item) for item in range(len(audited))]
    chosen = [of_text[audited.captions(item)[0]] for item in range(len(audited))]
    fit_T = caption_fits(images[[row[key] for key in keys]], texts[chosen, 0], torch.arange(len(keys)))
    return dict(zip(keys, fit_T.tolist(), strict=True))


def learned(name: str, halves: list[str], given: argparse.Namespace, seed: int) -> dict[str, float]:
    """The fits of both halves, each by a dual encoder that learned from one of them."""
    fits = {}
    for half, (taught, audited) in enumerate(((0, 1), (1, 0))):
        taught = audited if name == "heart" else taught
        run = given.out / f"{name}-{seed}-{half}"
        recipe = RECIPES[given.recipe]()
        recipe.data.pairs = halves[taught]
        recipe.data.cache = given.out / f"features-{seed}-{taught}"
        recipe.train.seed, recipe.train.quiet = seed, True
        recipe.train.steps = 1 if name == "control" else given.steps
        recipe.optim.lr = 1e-12 if name == "control" else recipe.optim.lr
        recipe.fit(run, recipe=given.recipe)
        source = open_source(halves[audited])
        for each in pair_fits(open_dual(run, device="auto"), source, skipped=SkippedItems()):
            fits[source.key(each.item)] = each.fit
    return fits


def exchange(spec: str, out: Path, *, pairs: int, seed: int) -> tuple[list[str], str, set[str]]:
    """Two sources of half of ``pairs`` images each, with one caption each, of which a tenth is another image's.

    Also both as one source, and the keys of the images with such a caption.
    """
    source = open_source(spec)
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(source))[:pairs]
    captions = [source.captions(int(item))[0] for item in chosen]
    keys = [source.key(int(item)) for item in chosen]
    wrong = generator.permutation(pairs)[: int(SHARE * pairs)]
    for place, caption in zip(wrong, [captions[i] for i in np.roll(wrong, 1)], strict=True):
        captions[place] = caption
    rows = [json.dumps({"key": key, "captions": [text]}) + "\n" for key, text in zip(keys, captions, strict=True)]
    halves = []
    for half in (0, 1):
        file = write_bytes(out / f"half-{seed}-{half}.jsonl", "".join(rows[half::2]).encode())
        halves.append(f"{spec}&keep={file}")
    whole = write_bytes(out / f"all-{seed}.jsonl", "".join(rows).encode())
    return halves, f"{spec}&keep={whole}", {keys[place] for place in wrong}


def precision(fits: dict[str, float], wrong: set[str]) -> float:
    worst = sorted(fits, key=lambda key: fits[key])[: len(wrong)]
    return float(np.mean([key in wrong for key in worst]))


def duplicates(spec: str, seed: int) -> dict[str, float]:
    """The share of altered copies that are found, by kind, and of other photos that are taken for copies."""
    source = open_source(spec)
    items = np.random.default_rng(seed).permutation(len(source))[:500]
    originals = [source.image(int(item), 96) for item in items]
    found = {}
    for kind in ("compressed", "halved", "mirrored"):
        copies = [decode(alter(image, kind), 32) for image in originals]
        small = [decode(png(Image.fromarray(image)), 32) for image in originals]
        twins = near_duplicates([*small, *copies])
        found[f"recall/{kind}"] = float(np.mean([twins.get(500 + i) in (i, twins.get(i)) for i in range(500)]))
    found["false"] = len(near_duplicates(small)) / 500
    print({name: round(value, 4) for name, value in found.items()}, flush=True)
    return found


def alter(image: np.ndarray, kind: str) -> bytes:
    changed = Image.fromarray(image[:, ::-1] if kind == "mirrored" else image)
    if kind == "halved":
        changed = changed.resize((48, 48), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    changed.save(file, "JPEG", quality=50 if kind == "compressed" else 90)
    return file.getvalue()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
