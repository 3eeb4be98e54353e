"""Does `diptych audit` find captions that belong to another image, and images that are there twice?

In a tenth of the pairs the captions are exchanged among one another. A dual encoder learns from one half of these pairs
and audits the other, and the reverse. The score is the share of exchanged captions among the tenth that fits worst; by
chance it is a tenth. Controls: audited by the run that learned from the same pairs (`heart`: by heart), or by heads as
they were drawn (`control`). Near duplicates: photos compressed again, at half the size, and mirrored, each
beside its original.

    python benchmarks/audit_swapped.py --data flickr8k_96.tar --out DIR [--pairs 2000] [--seeds 0 1 2] [--steps 400]
        [--arms precision heart control]
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from diptych.data.audit import near_duplicates
from diptych.data.pixels import SkippedItems
from diptych.data.sources import open_source
from diptych.data.sources.decode import decode
from diptych.dual.evaluation import pair_fits
from diptych.dual.model import open_dual
from diptych.io import write_bytes
from diptych.registry import RECIPES
from diptych.run_folder import write_json

SHARE = 0.1
NAMES = ("precision", "heart", "control")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="clip-frozen")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--arms", nargs="+", default=NAMES, choices=NAMES)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    spec = f"{given.data}?split=train"
    found = {**{name: [] for name in given.arms}, **duplicates(spec, given.seeds[0])}
    for seed in given.seeds:
        halves, wrong = exchange(spec, given.out, pairs=given.pairs, seed=seed)
        for name in given.arms:
            fits = {}
            for half, (learned, audited) in enumerate(((0, 1), (1, 0))):
                learned = audited if name == "heart" else learned
                run = given.out / f"{name}-{seed}-{half}"
                recipe = RECIPES[given.recipe]()
                recipe.data.pairs = halves[learned]
                recipe.data.cache = given.out / f"features-{seed}-{learned}"
                recipe.train.seed, recipe.train.quiet = seed, True
                recipe.train.steps = 1 if name == "control" else given.steps
                recipe.optim.lr = 1e-12 if name == "control" else recipe.optim.lr
                recipe.fit(run, recipe=given.recipe)
                source = open_source(halves[audited])
                for each in pair_fits(open_dual(run, device="auto"), source, skipped=SkippedItems()):
                    fits[source.key(each.item)] = each.fit
            found[name].append(precision(fits, wrong))
        print(f"seed {seed}: " + ", ".join(f"{name} {found[name][-1]:.3f}" for name in given.arms), flush=True)
    for name in given.arms:
        print(f"{name}: {np.mean(found[name]):.3f} +- {np.std(found[name], ddof=len(given.seeds) > 1):.3f}")
    write_json(given.out / "audit.json", found)


def exchange(spec: str, out: Path, *, pairs: int, seed: int) -> tuple[list[str], set[str]]:
    """Two sources of half of ``pairs`` images each, with one caption each, of which a tenth is another image's.

    Also the keys of the images with such a caption.
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
    return halves, {keys[place] for place in wrong}


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
